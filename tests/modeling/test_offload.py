"""accelerate brings the weights of a module when that module is called, and not before: nothing else may read them."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from zoo import ZOO, tokens

from scrubjay import AdoreCache, AdoreForCausalLM
from scrubjay.modeling.inputs.cache_argument import CACHE, named

# transformers 5.17 takes the device of the weights, which is none between two calls, for the model's
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on:UserWarning")
CPU = torch.device("cpu")
OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
}
# Caches that must choose within the test's few tokens.
CHOOSING = {
    "adore": {"cache_size": 12, "label_k": 6, "recent": 2, "rebuild": 2},
    "recycled": {"budget": 8, "stride": 3, "recent": 2},
}
CONTROLLERS = [
    {"score_mode": "query", "controller_pos": "relative"},
    {"score_mode": "bilinear", "controller_pos": "relative"},
    {"score_mode": "query", "controller_pos": "absolute", "position_mode": "compact"},
    {"score_mode": "distance", "controller_pos": "learned", "controller_mlp_layers": 3},
    {"score_mode": "static", "rebuild": 0, "controller_mlp_layers": 1},
]


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    """Takes a model's weights away from it, with one of accelerate's ways to bring them back."""

    def put_away(model):
        OFFLOADS[request.param](model, tmp_path)
        assert all(weight.is_meta for weight in model.parameters())

    return put_away


@torch.no_grad()
def found(model):
    """Logits of a padded batch, tokens and scores of generation from it, and what an ADORE cache chose on the way."""
    ids, mask = tokens(2, 26), torch.ones(2, 26, dtype=torch.int64)
    mask[1, :7] = 0
    options = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=mask, output_scores=True, **options)
    cache = getattr(out, CACHE)
    chosen = [cache.slots, cache.last_rebuilt, cache.history.state] if isinstance(cache, AdoreCache) else []
    return [model(ids, attention_mask=mask).logits, out.sequences, *out.scores, *chosen]


def all_equal(got, want):
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_weights_that_are_brought_for_each_module_give_the_same_bits(entry, offload):
    model = entry.build(**CHOOSING.get(entry.name, {}))
    want = found(model)
    offload(model)
    assert all_equal(found(model), want)


@pytest.mark.parametrize("settings", CONTROLLERS, ids=lambda settings: settings["score_mode"] + str(len(settings)))
def test_a_controllers_scores_are_the_same_wherever_its_weights_are_kept(settings, offload):
    (entry,) = (entry for entry in ZOO if entry.model is AdoreForCausalLM)
    model, embeds = entry.build(**CHOOSING["adore"] | settings), torch.randn(2, 30, 48)
    with torch.no_grad():
        want = [model.controller(embeds, torch.tensor([11, 29])), *found(model)]
        offload(model)
        assert all_equal([model.controller(embeds, torch.tensor([11, 29])), *found(model)], want)


def test_a_saved_cache_goes_on_in_a_model_whose_weights_are_kept_elsewhere(entry, offload, tmp_path):
    model, ids = entry.build(**CHOOSING.get(entry.name, {})), tokens(2, 30)
    kind, path = model.cache_class, tmp_path / "cache.safetensors"
    loads = (lambda: kind.load(path)) if entry.recurrent else lambda: kind.load(path, model)
    with torch.no_grad():
        cache = kind(model.config if entry.recurrent else model)
        model(ids[:, :25], **named(cache))
        cache.save(path)
        want = [model(ids[:, i : i + 1], **named(cache)).logits for i in range(25, 30)]
        offload(model)
        loaded = loads()
        assert all_equal([model(ids[:, i : i + 1], **named(loaded)).logits for i in range(25, 30)], want)
