"""Weights that lie elsewhere until their own module is called, as accelerate keeps them on the CPU or on a disk."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from adore_cases import decoder as small_decoder
from peft_cases import SMALL
from zoo import tokens

from scrubjay import AdoreCache, RecycledCache
from scrubjay.modeling.cache_argument import named
from scrubjay.modeling.controller import Controller

OPTIONS = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, "cpu"),
    "disk": lambda model, folder: disk_offload(model, folder, "cpu"),
}


def found(model, ids, mask):
    """Logits with and without a cache, and tokens."""
    with torch.no_grad():
        return (
            model(ids, attention_mask=mask, use_cache=False).logits,
            model(ids, attention_mask=mask, use_cache=True).logits,
            model.generate(ids, attention_mask=mask, **OPTIONS),
        )


@pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device type:UserWarning"
)
@pytest.mark.parametrize("where", OFFLOADS)
def test_an_offloaded_model_gives_the_same_bits(entry, where, tmp_path):
    model, ids = (
        entry.build(**SMALL.get(entry.name, {}) | ({"label_k": 4} if entry.name == "adore" else {})),
        tokens(2, 16),
    )
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    want = found(model, ids, mask)
    OFFLOADS[where](model, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    for got, wanted in zip(found(model, ids, mask), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("where", OFFLOADS)
@pytest.mark.parametrize("mode", ["query", "distance", "static"])
@pytest.mark.parametrize("pos", ["relative", "learned", "absolute"])
def test_an_offloaded_controller_gives_the_same_scores(mode, pos, where, tmp_path):
    controller, embeds = Controller(32, 16, mode, pos).eval(), torch.randn(2, 9, 32)

    def scores():
        positions, real = torch.arange(9).expand(2, 9), torch.ones(2, 9, dtype=torch.bool)
        with torch.no_grad():
            features, state = controller.read(embeds, positions, real, None)
            table = controller.table(16, embeds)
            one = controller.score(features, positions, torch.full((2, 1), 9), state, table)
            return one, controller(embeds, torch.tensor([3, 8]))

    want = scores()
    OFFLOADS[where](controller, tmp_path)
    for got, wanted in zip(scores(), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("where", OFFLOADS)
@pytest.mark.parametrize("make", [AdoreCache, RecycledCache])
def test_caches_of_an_offloaded_decoder_are_saved_and_loaded(make, where, tmp_path):
    model, ids = small_decoder(), tokens(1, 20) % 61
    settings = {"cache_size": 6, "rebuild": 2} if make is AdoreCache else {"budget": 6, "stride": 3}
    OFFLOADS[where](model, tmp_path / "weights")
    with torch.no_grad(), make(model, **settings) as cache:
        model(ids, **named(cache))
        cache.save(tmp_path / "cache.safetensors")
        with make.load(tmp_path / "cache.safetensors", model) as again:
            assert torch.equal(model(ids[:, :1], **named(again)).logits, model(ids[:, :1], **named(cache)).logits)
