"""What `shard_model` and its savers take and refuse, on one process; `test_distributed.py` trains on two."""

import pytest
import torch
from added_adapters import needs_add_adapter
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.distributed.tensor import DTensor
from zoo import ZOO

from scrubjay import save_adapter, shard_model, whole_state


def test_sharding_needs_a_process_group():
    with pytest.raises(ValueError, match="needs a process group"):
        shard_model(ZOO[0].build())


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_an_adapter_of_a_sharded_model_is_saved_whole(entry, tmp_path):
    tuned = shard_model(get_peft_model(entry.build(), LoraConfig(target_modules="all-linear", init_lora_weights=False)))
    state = whole_state(tuned)
    assert all(isinstance(p, DTensor) for p in tuned.parameters() if p.requires_grad)
    save_adapter(tuned, tmp_path)
    again = PeftModel.from_pretrained(entry.build(), tmp_path).state_dict()
    assert set(again) == set(state)
    assert any("lora_B" in name for name in state)
    assert all(torch.equal(again[name], state[name]) for name in state)


@needs_add_adapter
@pytest.mark.usefixtures("group")
def test_an_adapter_that_transformers_added_is_saved_whole(entry, tmp_path):
    model = entry.build()
    model.add_adapter(LoraConfig(target_modules="all-linear", init_lora_weights=False))
    state = whole_state(shard_model(model))
    model.save_pretrained(tmp_path)
    again = entry.build()
    again.load_adapter(tmp_path)
    again = again.state_dict()
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.usefixtures("group")
def test_a_model_is_sharded_once(adapted):
    model = ZOO[0].build()
    model = shard_model(get_peft_model(model, LoraConfig(target_modules="all-linear")) if adapted else model)
    with pytest.raises(ValueError, match="sharded already"):
        shard_model(model)


@pytest.mark.usefixtures("group")
def test_what_cannot_be_sharded_is_refused():
    prompted = get_peft_model(ZOO[0].build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"outside of it: prompt_encoder.default.embedding.weight. Train .* with DDP"):
        shard_model(prompted)
    integers = ZOO[0].build()
    whole = integers.model.layers[0].mixer.in_proj.weight.to(torch.int8)
    integers.model.layers[0].mixer.in_proj.weight = torch.nn.Parameter(whole, requires_grad=False)
    with pytest.raises(ValueError, match=r"bitsandbytes' 4 bits; got torch.int8. Load the model with"):
        shard_model(integers)
