"""All keys on the host, or in few bits: where they lie, what they say, and that those chosen are exact."""

import copy

import pytest
import torch
from recycled_cases import Oracle, OutOfBoundError, assert_close, compare, decoder, drive, gap, padded, tokens

from scrubjay import RecycledCache, RecycledConfig
from scrubjay.kernels.recycle import decode_reference
from scrubjay.modeling.caches import few_bits_keys
from scrubjay.modeling.caches.few_bits_keys import FewBits, packed, quantized, unpacked
from scrubjay.modeling.caches.holding_layer import HoldingLayer
from scrubjay.modeling.caches.kept_keys import TAIL, Call
from scrubjay.modeling.inputs.cache_argument import named

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

POLICIES = {
    "recycled": {"policy": "recycled", "stride": 4},
    "dynamic": {"policy": "recycled", "schedule": "dynamic", "qc": 2, "threshold": 0.8},
    "chosen only": {"policy": "recycled", "stride": 3, "full_output": False},
    "one layer in full": {"policy": "recycled", "stride": 4, "full_layers": [0]},
    "full": {"policy": "full"},
    "lowrank": {"policy": "lowrank", "rank": 3},
    "some layers": {"policy": "lowrank", "rank": 3, "choosing_layers": [1], "stride": 4},
    "quest": {"policy": "quest", "page": 3},
}
PIECES = {"one turn": [30] + [1] * 9, "turns": [12, 1, 1, 7, 1, 1, 1] + [1] * 9, "one token first": [1] * 14}
LONG = 150


@pytest.fixture(scope="module")
def model():
    return decoder()


@pytest.mark.parametrize("side", [None, "left", "inner"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("policy", POLICIES)
def test_keys_on_the_host_are_those_of_the_law(model, policy, pieces, side):
    settings, ids, real = {"budget": 8} | POLICIES[policy], tokens(3, sum(pieces)), None
    settings |= {"rank": 8} if "rank" in settings else {}  # of 8 dimensions: the law knows exact scores
    if side is not None and pieces[0] > 1:
        rest = torch.ones(3, sum(pieces) - pieces[0], dtype=torch.bool)
        real = torch.cat([padded((pieces[0], 5, 3), pieces[0], side), rest], 1)
    with RecycledCache(model, hold="host", **settings) as cache:
        compare(model, ids, pieces, cache, Oracle(model, **settings), real)


def held(x, bits):
    """A group of numbers as few bits have it, one by one: the law."""
    low, high = min(x), max(x)
    step = (high - low) / (2**bits - 1)
    return [low + step * round((value - low) / step) if step else low for value in x]


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_are_those_of_each_group(bits):
    """Groups of 32 columns of a key's channel, of 32 channels of a value; the newest are exact."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 3, 140, 64, dtype=torch.float64)
    few, seen = FewBits(bits, TAIL), 0
    for piece in (100, 1, 1, 30, 1, 7):
        few.append(keys[:, :, seen : seen + piece], values[:, :, seen : seen + piece], seen := seen + piece)
        coded = max(0, (seen - TAIL) // 32 * 32)
        assert few.coded(seen) == coded
        k, v = few.whole(seen)
        assert torch.equal(k[:, :, coded:], keys[:, :, coded:seen])
        assert torch.equal(v[:, :, coded:], values[:, :, coded:seen])
        for first in range(0, coded, 32):
            wanted = [held(keys[1, 2, first : first + 32, c].tolist(), bits) for c in (0, 5, 63)]
            assert_close(k[1, 2, first : first + 32, [0, 5, 63]].T, torch.tensor(wanted, dtype=torch.float64))
            wanted = [held(values[0, 1, first + 3, c : c + 32].tolist(), bits) for c in (0, 32)]
            assert_close(v[0, 1, first + 3].view(2, 32), torch.tensor(wanted, dtype=torch.float64))
    steps = (keys.amax() - keys.amin()) / (2**bits - 1)
    assert 0 < (k[:, :, :coded] - keys[:, :, :coded]).abs().max() <= steps / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_and_ends_of_few_bits_are_parts_of_the_whole(bits):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 3, LONG, 16, dtype=torch.float64)
    few = FewBits(bits, TAIL)
    few.append(keys, values, LONG)
    index = torch.randint(0, LONG, (2, 3, 40))
    for whole, rows in zip(few.whole(LONG), few.rows(index, LONG), strict=True):
        assert torch.equal(rows, whole.gather(2, index[..., None].expand(-1, -1, -1, 16)))
    for start in (0, 31, 32, 50, few.coded(LONG), LONG - 3):
        for whole, end in zip(few.whole(LONG), few.whole(LONG, start), strict=True):
            assert torch.equal(end, whole[:, :, start:])


def test_codes_are_packed_two_in_a_byte():
    codes = torch.randint(0, 16, (3, 5, 8), dtype=torch.uint8)
    assert packed(codes, 4).shape == (3, 5, 4)
    assert torch.equal(unpacked(packed(codes, 4), 4), codes)
    same = torch.full((2, 32), 3.0)
    codes, low, step = quantized(same, 1, 4)
    assert not codes.any()
    assert torch.equal(low, same[:, :1])
    assert not step.any()


def test_a_number_of_bfloat16_is_off_by_half_a_step_and_a_rounding():
    torch.manual_seed(0)
    keys = (torch.randn(1, 1, LONG, 32) * 3 + 5).bfloat16()
    few = FewBits(4, TAIL)
    few.append(keys, keys, LONG)
    coded = few.coded(LONG)
    for got in few.whole(LONG):
        wrong = (got - keys)[:, :, :coded].float().abs().max()
        spread = (keys.float().amax() - keys.float().amin()) / 15
        assert wrong <= spread / 2 + 3 * 2.0**-8 * keys.float().abs().max()


@pytest.mark.parametrize("hold", ["device", "host"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_attends_what_the_few_bits_say(bits, hold):
    """Of a layer by itself, whose queries are known."""
    config = RecycledConfig(base_config=decoder().config, policy="full", budget=8, hold=hold, hold_bits=bits)
    layer = HoldingLayer(config, 0, Call())
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, LONG, 8, dtype=torch.float64)
    q = torch.randn(1, 4, LONG, 8, dtype=torch.float64)
    for start, stop in ((0, LONG - 2), (LONG - 2, LONG - 1), (LONG - 1, LONG)):
        keys, values = layer.update(k[:, :, start:stop], v[:, :, start:stop])
        out = layer.attend(q[:, :, start:stop], keys, values, 0.3)
    few = FewBits(bits, TAIL)
    few.append(k, v, LONG)
    wanted, _ = decode_reference(q[:, :, -1], *few.whole(LONG), 0.3)
    assert_close(out[:, 0], wanted)
    exact, _ = decode_reference(q[:, :, -1], k, v, 0.3)
    assert gap(wanted, exact) > 1e-5


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_change_steps_and_no_prompt(model, policy, bits):
    """A random model's attention is sharp: a code that is off by half a step may choose other keys."""
    settings, ids = {"budget": 24} | POLICIES[policy], tokens(2, LONG + 6)
    with RecycledCache(model, **settings) as exact, RecycledCache(model, hold_bits=bits, **settings) as few:
        wanted, got = (drive(model, ids, [LONG] + [1] * 6, cache) for cache in (exact, few))
    assert torch.equal(got[:, :LONG], wanted[:, :LONG])  # a prompt attends itself exactly
    assert 0 < gap(got, wanted) < 3
    if policy == "full" and bits == 8:
        assert gap(got, wanted) < 0.1  # measured: 0.022


@pytest.mark.parametrize("policy", ["recycled", "some layers"])
def test_those_chosen_are_exact_where_exact_ones_lie_on_the_host(model, policy):
    settings, ids = {"budget": 24, "stride": 3} | POLICIES[policy], tokens(2, LONG + 6)
    kept = {}
    for hold in ("device", "host"):
        with RecycledCache(model, hold=hold, hold_bits=4, **settings) as cache:
            drive(model, ids, [LONG] + [1] * 6, cache)
            layer = cache.layers[0]
            assert layer.kept is not None
            m, index = layer.kept.filled, layer.kept.index
            kept[hold] = layer, index[:, :, :m], layer.kept.keys[:, :, :m], layer.kept.values[:, :, :m]
    layer, index, *pair = kept["host"]
    coded = layer.few.coded(layer.seen)
    assert (index < coded).any()
    rows = index[..., None].expand(-1, -1, -1, 8)
    for held_rows, full in zip(pair, (layer.full_keys, layer.full_values), strict=True):
        assert torch.equal(held_rows, full.gather(2, rows))
    layer, index, *pair = kept["device"]
    assert layer.full_keys is None
    for held_rows, said in zip(pair, layer.few.whole(layer.seen), strict=True):
        assert torch.equal(held_rows, said.gather(2, index[..., None].expand(-1, -1, -1, 8)))


HELD = {"host": {"hold": "host"}, "4 bits": {"hold_bits": 4}, "both": {"hold": "host", "hold_bits": 8}}


@pytest.mark.parametrize("policy", ["recycled", "dynamic", "lowrank", "quest", "full"])
@pytest.mark.parametrize("where", HELD)
def test_tokens_are_taken_back_over_the_border_of_a_group(model, policy, where):
    settings, ids = {"budget": 24} | POLICIES[policy] | HELD[where], tokens(2, LONG)
    settings |= {"rank": 8} if policy == "lowrank" else {}  # all: after a crop fewer queries find the directions
    other = torch.cat([ids[:, : LONG - 40], tokens(2, 40, seed=9)], 1)
    with RecycledCache(model, **settings) as back, RecycledCache(model, **settings) as plain:
        drive(model, ids, [LONG], back)
        back.crop(-40)
        drive(model, ids, [LONG - 40], plain)
        assert_same_text(model, other[:, LONG - 40 :], back, plain)
        with pytest.raises(ValueError, match="are remembered, and a crop needs one"):
            back.crop(-70)


def assert_same_text(model, rest, back, plain):
    """That two caches attend the same to what follows, in one piece and token by token."""
    for cache in (back, plain):
        cache.found = drive(model, rest, [20] + [1] * 20, cache)
    layers = zip(back.layers, plain.layers, strict=True)
    if back.settings.hold_bits is None:
        assert_close(back.found, plain.found)
    else:  # what the piece attended was coded in one cache, and not yet in the other: later layers' keys differ
        layers = [next(layers)]
    for layer, other in layers:
        for x, y in zip(layer.whole(), other.whole(), strict=True):
            assert_close(x, y)


@pytest.mark.parametrize("policy", ["recycled", "dynamic", "lowrank", "quest", "full"])
@pytest.mark.parametrize("where", HELD)
def test_saved_copied_and_reordered(model, policy, where, tmp_path):
    settings, ids = {"budget": 24} | POLICIES[policy] | HELD[where], tokens(2, LONG + 8)
    rows = torch.tensor([1, 0, 1])
    with RecycledCache(model, **settings) as cache:
        drive(model, ids[:, : LONG + 2], [LONG, 1, 1], cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = RecycledCache.load(tmp_path / "cache.safetensors", model)
        copied = copy.deepcopy(cache)
        assert copied.call.layers is copied.layers
        copied.reorder_cache(rows)
        rest = ids[:, LONG + 2 :]
        wanted = drive(model, rest, [1] * 6, cache)
        assert_close(drive(model, rest, [1] * 6, loaded), wanted)
        assert_close(drive(model, rest[rows], [1] * 6, copied), wanted[rows])
        loaded.close(), copied.close()


@pytest.mark.parametrize("where", HELD)
def test_forks_hold_as_they_are_told(model, where):
    ids = tokens(2, LONG + 4)
    with RecycledCache(model, policy="full", budget=24, **HELD[where]) as read:
        drive(model, ids[:, :LONG], [LONG], read)
        told = [x for layer in read.layers for x in layer.exact()]
        for other in ({"hold": "device", "hold_bits": None}, {}, {"hold": "host", "hold_bits": None}):
            with read.fork(policy="recycled", stride=3, **other) as cache:
                mine = [x for layer in cache.layers for x in layer.exact()]
                assert all(torch.equal(a, b) for a, b in zip(told, mine, strict=True))
                drive(model, ids[:, LONG:], [1] * 4, cache)
        with read.fork(policy="snapkv", hold="device", hold_bits=None) as cache:
            drive(model, ids[:, LONG:], [1] * 4, cache)


def test_bytes_say_where_they_lie(model):
    ids = tokens(2, LONG)
    found = {}
    for where, settings in (HELD | {"device": {}}).items():
        with RecycledCache(model, policy="full", budget=24, **settings) as cache:
            drive(model, ids, [LONG], cache)
            found[where] = cache.nbytes_by_place
            assert sum(found[where].values()) == cache.nbytes
            exact = [x.nbytes for y in cache.layers for x in (y.full_keys, y.full_values) if x is not None]
            assert found[where]["host"] == (sum(exact) if settings.get("hold") == "host" else 0)
    assert found["host"]["device"] < found["4 bits"]["device"] < found["device"]["device"]


def test_generate_and_assisted_decoding(model):
    ids = tokens(1, 120)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with RecycledCache(model, policy="full", budget=24) as cache:
        wanted = model.generate(ids, **named(cache), **options)
    for more in ({}, {"prompt_lookup_num_tokens": 3}):
        with RecycledCache(model, policy="full", budget=24, hold="host") as cache:
            assert torch.equal(model.generate(ids, **named(cache), **options, **more), wanted)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "tova", "streaming"])
@pytest.mark.parametrize("where", HELD)
def test_refused_for_policies_that_forget(model, policy, where):
    with pytest.raises(ValueError, match=f"policy='{policy}' forgets keys; got hold="):
        RecycledCache(model, policy=policy, **HELD[where])


def test_other_places_and_widths_are_refused(model):
    with pytest.raises(ValueError, match="hold must be one of"):
        RecycledCache(model, hold="disk")
    with pytest.raises(ValueError, match="hold_bits must be one of"):
        RecycledCache(model, hold_bits=3)


def check_codes():
    test_few_bits_are_those_of_each_group(4)


def check_host(model):
    test_keys_on_the_host_are_those_of_the_law(model, "recycled", PIECES["turns"], None)


def check_exact(model):
    test_those_chosen_are_exact_where_exact_ones_lie_on_the_host(model, "recycled")


MUTATIONS = {
    "odd channels lost": ([(few_bits_keys, "unpacked", lambda f: lambda held, bits: f(held & 15, bits))], "codes"),
    "a step of one code more": (
        [(few_bits_keys, "quantized", lambda f: lambda x, dim, bits: (f(x, dim, bits)[0], *f(x, dim, bits - 1)[1:]))],
        "codes",
    ),
    "a group's neighbour's scale": (
        [(few_bits_keys, "gather", lambda f: lambda x, index: f(x, (index + 1).clamp(max=x.shape[2] - 1)))],
        "rows",
    ),
    "the newest column not fetched": (
        [(HoldingLayer, "whole", lambda f: lambda self, start=0: tuple(x.roll(1, 2) for x in f(self, start)))],
        "host",
    ),
    "a piece does not see what was before": (
        [(HoldingLayer, "_before", lambda f: lambda self, used: tuple(x * 0 for x in f(self, used)))],
        "host",
    ),
    "chosen rows from the few bits": (
        [(HoldingLayer, "rows", lambda f: lambda self, index: self.few.rows(index, self.seen))],
        "exact",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_error_is_found(model, name, monkeypatch):
    """That the comparisons can fail."""
    changes, comparison = MUTATIONS[name]
    checks = {
        "codes": check_codes,
        "rows": lambda: test_rows_and_ends_of_few_bits_are_parts_of_the_whole(4),
        "host": lambda: check_host(model),
        "exact": lambda: check_exact(model),
    }
    checks[comparison]()
    for owner, attribute, change in changes:
        monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises((OutOfBoundError, AssertionError)):
        checks[comparison]()
