"""Training and inference on two processes against one: DDP, FSDP2, tensor parallel, for every model.

The runs are scripts of their own, distributed_*.py, one torchrun each; the tests here judge what they found. Bounds are
five times the largest error measured over all models, relative to the largest value of a tensor, in float32. Those of
weights under tensor parallelism are wider: AdamW divides by a gradient's size, so that of one near zero shows more.
"""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_fsdp import PADDED
from distributed_steps import EVEN, STEPS, adamw, steps, weights
from processes import results
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import softplus
from zoo import ZOO, relative

pytestmark = pytest.mark.slow

PROCESSES = 2
GRADIENTS = 2.2e-5  # measured: 4.3e-6 with AVX-512, 1.5e-6 with AVX2
WEIGHTS = 1.4e-5  # measured: 2.7e-6
LOGITS = 2.5e-6  # measured: 4.8e-7
TP_WEIGHTS = 3.6e-5  # measured: 7.1e-6
BFLOAT16 = 0.08  # measured: 2.1e-2; bfloat16 has 8 bits, 4e-3
ADAPTER_BFLOAT16 = 0.18  # of an adapter's gradients; measured: 3.7e-2
MOVED = 1e-2  # what three steps change, at least; measured: 1.7e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all pytest processes of a session."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "distributed").mkdir(exist_ok=True)
    return base / "distributed"


@pytest.fixture(scope="module")
def ddp(folder):
    return results(folder, "distributed_ddp.py", PROCESSES, ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def fsdp(folder):
    return results(folder, "distributed_fsdp.py", PROCESSES)


@pytest.fixture(scope="module")
def adapters(folder):
    return results(folder, "distributed_adapters.py", PROCESSES)


@pytest.fixture(scope="module")
def tp(folder):
    return results(folder, "distributed_tp.py", PROCESSES)


def apart(got, want):
    """(Largest relative difference, its name) of tensors by name."""
    assert got.keys() == want.keys()
    return max((relative(got[name], want[name]), name) for name in want)


def unwrapped(tensors):
    """Without what torch's checkpoint wrapper puts into names."""
    return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in tensors.items()}


def trained_alike(found, alone):
    assert apart(found["weights"], alone["weights"]) < (WEIGHTS,)
    assert apart(alone["before"], alone["weights"]) > (MOVED,)


def test_ddp_equals_one_process(entry, ddp):
    for rank in ddp:
        found, alone = rank[entry.name]["accelerate"], rank[entry.name]["alone"]
        assert (found["type"], found["processes"]) == ("DistributedType.MULTI_CPU", PROCESSES)
        assert found["wrapped"] == "DistributedDataParallel"
        trained_alike(found, alone)
        assert apart(found["gradients"], alone["gradients"]) < (GRADIENTS,)
    assert apart(*(rank[entry.name]["accelerate"]["weights"] for rank in ddp))[0] == 0


def test_ddp_resumes_with_the_same_bits(entry, ddp):
    for rank in ddp:
        found = rank[entry.name]["accelerate"]
        assert apart(found["resumed"], found["weights"])[0] == 0


def test_ddp_trainer_equals_one_process(entry, ddp):
    for rank in ddp:
        found, alone = rank[entry.name]["trainer"], rank[entry.name]["alone"]
        assert (found["processes"], found["wrapped"]) == (PROCESSES, "DistributedDataParallel")
        trained_alike(found, alone)


def test_ddp_without_summing_gradients_would_be_seen(ddp):
    one, other = (rank["unsynced"] for rank in ddp)
    assert apart(one, ddp[0]["ssd"]["alone"]["weights"]) > (100 * WEIGHTS,)  # measured: 5e-2
    assert apart(one, other) > (100 * WEIGHTS,)


@pytest.mark.parametrize("attention", ["compact", "dense"])
@pytest.mark.parametrize("scope", ["all", "selected"])
def test_ddp_taipan_selects_nothing_on_one_process(scope, attention, ddp):
    one, other = (rank["unselected"][scope, attention] for rank in ddp)
    assert one["gradients"].keys() == one["weights"].keys()  # each parameter has one, so that no process waits
    assert apart(one["weights"], other["weights"])[0] == 0
    assert apart(one["weights"], ddp[0]["taipan"]["alone"]["weights"]) > (WEIGHTS,)  # the selection did matter


def shared(found, rank):
    """DTensors everywhere but in a controller that is not trained; this process has half of each, or one row more."""
    assert found["spread"]
    controller = {name for name in found["weights"] if name.startswith("model.controller.")}
    assert set(found["plain"]) == controller == found["weights"].keys() - found["spread"].keys()
    for share in found["spread"].values():
        assert share == 0.5 or 0.5 < (share if rank == 0 else 1 - share) < 0.51


def test_fsdp2_equals_one_process(entry, fsdp):
    for rank, found in enumerate(fsdp):
        mine = found[entry.name]
        assert mine["processes"] == PROCESSES
        shared(mine["sharded"], rank)
        trained_alike(mine["sharded"], mine["alone"])
        assert apart(mine["sharded"]["gradients"], mine["alone"]["gradients"]) < (GRADIENTS,)


@pytest.mark.parametrize("way", ["checkpointed", "wrapped"])
def test_fsdp2_with_activation_checkpointing_has_the_same_bits(entry, way, fsdp):
    for found in fsdp:
        mine = found[entry.name]
        for what in ("weights", "gradients"):
            assert apart(unwrapped(mine[way][what]), mine["sharded"][what])[0] == 0


def test_fsdp2_over_two_axes_averages_over_the_replicas(entry, fsdp):
    """Each process has the whole of each parameter, as a DTensor of a mesh of replicas."""
    for found in fsdp:
        mine, alone = found[entry.name]["replicated"], found[entry.name]["alone"]
        assert mine["spread"].keys() == found[entry.name]["sharded"]["spread"].keys()
        assert set(mine["spread"].values()) == {1.0}
        trained_alike(mine, alone)
        assert apart(mine["gradients"], alone["gradients"]) < (GRADIENTS,)
    assert apart(*(found[entry.name]["replicated"]["weights"] for found in fsdp))[0] == 0


def test_fsdp2_with_offloaded_weights_has_the_same_bits(entry, fsdp):
    for rank, found in enumerate(fsdp):
        mine = found[entry.name]
        shared(mine["offloaded"], rank)
        assert apart(mine["offloaded"]["weights"], mine["sharded"]["weights"])[0] == 0


def test_fsdp2_computes_in_bfloat16(entry, fsdp):
    for found in fsdp:
        mine, alone = found[entry.name]["bfloat16"], found[entry.name]["alone"]
        assert 1e-4 < relative(mine["bfloat16"], mine["float32"]) < BFLOAT16
        assert mine["kept in"] == {torch.float32}
        assert apart(mine["weights"], alone["weights"]) < (BFLOAT16,)
        assert apart(mine["weights"], alone["before"]) > (MOVED,)


def test_fsdp2_leaves_in_float32_what_the_model_keeps_so(recurrent, fsdp):
    kept = set(recurrent.build()._keep_in_fp32_modules_strict)
    for found in fsdp:
        dtypes = found[recurrent.name]["bfloat16"]["dtypes"]
        exact = {name for name in dtypes if kept & set(name.split(".")) and " <-" not in name}
        assert {name.rpartition(".")[2] for name in exact} & kept or any(".gate." in name for name in exact)
        assert {dtypes[name] for name in exact} == {torch.float32}
        assert dtypes["model.layers.1 <-"] == torch.float32  # the residual stream
        projections = {name: dtype for name, dtype in dtypes.items() if name.endswith("_proj.weight")}
        assert set(projections.values()) == {torch.bfloat16}


def test_fsdp2_resumes_with_the_same_bits(entry, fsdp):
    for found in fsdp:
        mine = found[entry.name]
        assert apart(mine["dcp"]["resumed"], mine["dcp"]["weights"])[0] == 0
        assert apart(mine["dcp"]["weights"], mine["sharded"]["weights"])[0] == 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # torch says so of any single process
def test_fsdp2_resumes_on_one_process(entry, fsdp, folder):
    model = entry.build(seed=1).train()
    optimizer = adamw(model)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / "distributed_fsdp" / f"{entry.name}_dcp")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    steps(model, optimizer, STEPS - 1, STEPS)
    assert apart(weights(model), fsdp[0][entry.name]["alone"]["weights"]) < (WEIGHTS,)


def test_fsdp2_saves_a_whole_model(entry, fsdp, folder):
    loaded = entry.model.from_pretrained(folder / "distributed_fsdp" / f"{entry.name}_saved")
    assert apart(weights(loaded), fsdp[0][entry.name]["sharded"]["weights"])[0] == 0
    assert loaded.config.architectures == [entry.model.__name__]


def test_fsdp2_generates_what_one_process_does(entry, fsdp):
    for found in fsdp:
        tokens = found[entry.name]["generated"]
        assert torch.equal(tokens["sharded"], tokens["alone"])


def test_fsdp2_by_accelerate(entry, fsdp):
    """With the settings of examples/accelerate/64_gpus.yaml and the precision of examples/pretrain.py."""
    blocks = [f"model.layers.{i}" for i in range(entry.config().num_hidden_layers)]
    for found in fsdp:
        mine, alone = found[entry.name]["accelerate"], found[entry.name]["alone"]
        assert mine["groups"] == sorted(["", "lm_head", "model.embed_tokens", "model.norm", *blocks])
        assert mine["spread"].keys() == mine["weights"].keys()
        assert apart(mine["weights"], alone["weights"]) < (BFLOAT16,)
        assert apart(mine["weights"], alone["before"]) > (MOVED,)
        residual = mine["dtypes"]["model.layers.1 <-"]
        assert residual == (torch.float32 if entry.recurrent else torch.bfloat16)


RANGES = {  # of parameters that are drawn with a shape of their own, as (function, low, high)
    "A_log": (torch.exp, 1, 16),
    "dt_bias": (softplus, 1e-3, 0.1),
    "mem_gate_bias": (lambda bias: torch.cat([softplus(bias[:16]) * 9, bias[16:].sigmoid()]), 9e-4, 0.9),
}


def test_fsdp2_fills_a_model_that_was_made_without_memory(entry, fsdp):
    """As one process would: the same where nothing is drawn, of the same distribution where something is."""
    torch.manual_seed(0)
    alone = entry.model(entry.config(**PADDED if entry.name.startswith("rodimus") else {}))
    want, buffers = dict(alone.named_parameters()), dict(alone.named_buffers())
    first, second = (found[entry.name]["from nothing"] for found in fsdp)
    for name, share in first["spread"].items():
        assert 0.5 <= share < 0.51
        assert torch.equal(first["weights"][name], second["weights"][name])
    assert first["spread"].keys() == {name for name in want if not name.startswith("model.controller.")}
    for name in first["spread"]:
        got, whole = first["weights"][name], want[name].detach()
        function, low, high = RANGES.get(name.rpartition(".")[2], (None, 0, 0))
        if function is not None:
            assert low * 0.999 < function(got).min() < function(got).max() < high * 1.001
            assert got.unique().numel() == got.numel()
        elif whole.std() == 0 or name.endswith("gate.bias"):
            assert torch.equal(got, whole)
        else:  # six standard deviations of a mean and of a deviation
            assert abs(got.mean() - whole.mean()) < 6 * (2 / whole.numel()) ** 0.5 * whole.std()
            assert abs(got.std() / whole.std() - 1) < 6 / whole.numel() ** 0.5
    assert apart(first["buffers"] | {"": torch.ones(1)}, buffers | {"": torch.ones(1)})[0] == 0
    assert first["tied"] == (alone.lm_head.weight is alone.get_input_embeddings().weight)
    if entry.name.startswith("rodimus"):
        rows = first["weights"]["model.embed_tokens.weight"].abs().amax(1)
        assert rows.eq(0).nonzero().flatten().tolist() == [PADDED["pad_token_id"]]
    assert torch.isfinite(first["loss"])


def test_fsdp2_refusals(fsdp):
    for found in fsdp:
        assert "parameters of one dtype; got ['torch.bfloat16', 'torch.float32']" in found["refused"]["mixed"]
        assert "Linear holds no block" in found["refused"]["no blocks"]


def test_tensor_parallel_equals_one_process(entry, tp):
    for found in tp:
        assert found["processes"] == PROCESSES
        alone, parallel = found[entry.name]["alone"], found[entry.name]["parallel"]
        assert not alone["spread"]
        for name, share in parallel["spread"].items():
            assert share == (1.0 if name.endswith("out_proj.bias") else 0.5)  # a bias is added after the sum
        assert apart(parallel["before"], alone["before"])[0] == 0
        for what in ("logits", "steps"):
            assert relative(parallel[what], alone[what]) < LOGITS
        assert torch.equal(parallel["generated"], alone["generated"])


def test_tensor_parallel_splits_every_large_matrix(entry, tp):
    """What stays whole is small at full width: gates, one shared key head, Rodimus' keys and queries; a controller."""
    whole = ["controller.", "attn.k_proj", "mem_gate_proj"] + ["mixer.in_proj"] * entry.name.startswith("rodimus")
    whole += [] if entry.recurrent else ["embed_tokens"]  # transformers 5.17 splits an embedding that is tied
    model = entry.build(vocab_size=EVEN)
    large = {name for name, p in model.named_parameters() if p.numel() >= model.config.hidden_size**2}
    split = tp[0][entry.name]["parallel"]["spread"].keys()
    assert [name for name in large - split if not any(part in name for part in whole)] == []


def test_tensor_parallel_training_equals_one_process(entry, tp):
    for found in tp:
        alone, parallel = found[entry.name]["alone"], found[entry.name]["parallel"]
        assert apart(parallel["gradients"], alone["gradients"]) < (GRADIENTS,)
        assert apart(parallel["weights"], alone["weights"]) < (TP_WEIGHTS,)
        assert apart(alone["before"], alone["weights"]) > (MOVED / STEPS,)
    assert apart(*(found[entry.name]["parallel"]["weights"] for found in tp))[0] == 0


def test_tensor_parallel_plans_fit_the_model(entry, tp):
    assert [found[entry.name]["warnings"] for found in tp] == [[]] * PROCESSES


@pytest.mark.parametrize("name", [entry.name for entry in ZOO if not entry.recurrent])
def test_tensor_parallel_refuses_heads_that_devices_cannot_share(name, tp):
    """When the model is loaded."""
    for found in tp:
        assert "3 heads with 3 key heads cannot be shared evenly by 2 devices" in found["refused"][name]["heads"]
        assert "4 heads with 1 key heads cannot be shared evenly by 2 devices" in found["refused"][name]["key heads"]


def test_tensor_parallel_saves_a_whole_model(entry, tp, folder):
    loaded = entry.model.from_pretrained(folder / "distributed_tp" / f"{entry.name}_saved")
    assert apart(weights(loaded), tp[0][entry.name]["parallel"]["weights"])[0] == 0


def test_tensor_parallel_caches_choose_the_same_keys(tp):
    for found in tp:
        for (alone, full), (parallel, parallel_full) in found["choosing"]:
            assert relative(parallel, alone) < LOGITS
            assert parallel_full == full


def test_tensor_parallel_by_its_short_name(tp):
    for found in tp:
        assert found["short name"] == found["ssd"]["parallel"]["spread"]


@pytest.mark.parametrize("way", ["LoRA", "QLoRA"])
def test_fsdp2_trains_an_adapter_as_one_process_does(entry, way, adapters):
    for found in adapters:
        mine, alone = found[entry.name][way]["sharded"], found[entry.name][way]["alone"]
        assert found["processes"] == PROCESSES
        assert mine["plain"] == []
        assert all(0.4 < share < 0.6 or "lora_" in name for name, share in mine["spread"].items())
        assert apart(mine["gradients"], alone["gradients"]) < (GRADIENTS,)
        assert apart(mine["weights"], alone["weights"]) < (WEIGHTS,)
        assert apart(alone["before"], alone["weights"]) > (MOVED,)
        assert torch.equal(mine["generated"], alone["generated"])


@pytest.mark.parametrize("way", ["LoRA", "QLoRA"])
def test_fsdp2_saves_a_whole_adapter_whichever_process_is_late(entry, way, adapters, folder):
    first, second = (found[entry.name][way]["sharded"] for found in adapters)
    held = load_file(folder / "distributed_adapters" / f"{entry.name}_{way.lower()}" / "adapter_model.safetensors")
    assert apart(held, first["weights"])[0] == 0
    assert first["there"]
    assert second["there"]  # and so for the process that wrote nothing
    assert second["state"] == {}
    assert {name.replace(".default", "") for name in first["state"]} >= set(held)


@pytest.mark.parametrize("storage", ["uint8", "floats"])
def test_fsdp2_computes_in_bfloat16_and_leaves_4_bits_as_they_are(entry, storage, adapters):
    for found in adapters:
        exact, low = (found[entry.name][storage][dtype] for dtype in ("float32", "bfloat16"))
        assert 1e-4 < relative(low["logits"], exact["logits"]) < BFLOAT16
        assert apart(low["gradients"], exact["gradients"]) < (ADAPTER_BFLOAT16,)
        assert torch.equal(low["logits"], found[entry.name]["uint8"]["bfloat16"]["logits"])
