"""Documents that cannot be told apart, or that a cache would join, are refused by the name of what marks them."""

import pytest
import torch
from document_cases import AFTER, FULL, LOW, SAME, numbers, offsets, positions, real
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from zoo import VOCAB, relative, tokens

from scrubjay import AdoreCache, RecycledCache
from scrubjay.modeling.inputs.cache_argument import named

ALL = dict(input_ids=tokens(2, 24))
REFUSED = {
    "numbers and offsets that disagree": (
        dict(seq_idx=numbers(FULL), cu_seq_lens_q=offsets(SAME)),
        "cu_seq_lens_q and seq_idx disagree about where documents start",
    ),
    "numbers and a mask that disagree": (
        dict(seq_idx=numbers(FULL), attention_mask=numbers(SAME, 0)),
        "attention_mask and seq_idx disagree",
    ),
    "positions that restart where no document does": (
        dict(position_ids=positions(FULL), seq_idx=torch.zeros(2, 24, dtype=torch.int32)),
        "seq_idx and position_ids disagree",
    ),
    "offsets of keys that disagree": (
        dict(cu_seq_lens_q=offsets(FULL), cu_seq_lens_k=offsets(SAME)),
        "cu_seq_lens_q and cu_seq_lens_k disagree",
    ),
    "offsets over tokens alone": (
        dict(cu_seq_lens_q=torch.tensor([0, 14, 36]), attention_mask=real(AFTER)),
        "rise from 0 to batch . length = 48, padding included; got .0, 14, 36., the last being 36",
    ),
    "no offsets": (dict(cu_seq_lens_q=torch.tensor([], dtype=torch.int32)), r"rise from 0 to .*; got \[\]\."),
    "offsets in a list": (dict(cu_seq_lens_q=[0, 24, 48]), "cu_seq_lens_q must be a tensor of integers; got list"),
    "positions of three axes": (
        dict(position_ids=torch.arange(24).expand(3, 2, -1)),
        r"position_ids must have shape \(2, 24\) or \(1, 24\); got \(3, 2, 24\)",
    ),
    "numbers of other rows": (
        dict(seq_idx=torch.zeros(3, 24).long()),
        r"seq_idx must have shape \(2, 24\) or \(1, 24\)",
    ),
    "a mask of parts": (dict(attention_mask=real(AFTER) * 0.5), r"attention_mask must hold 1 for .*; got \[0.0, 0.5\]"),
    "a mask of small numbers": (dict(attention_mask=real(AFTER) - 1.0), r"attention_mask must hold .*; got \[-1.0"),
    "a mask of integers below 0": (dict(attention_mask=real(AFTER) - 1), r"attention_mask must hold .*; got \[-1, 0\]"),
    "a mask of two notations": (
        dict(attention_mask=torch.where(real(AFTER) > 0, 1.0, -torch.inf)),
        "attention_mask must hold",
    ),
    "a mask that is no number": (dict(attention_mask=torch.full((2, 24), torch.nan)), "attention_mask must hold"),
    "a mask of numbers that no document has": (dict(attention_mask=real(AFTER) * 1e30), "attention_mask must hold"),
    "a mask that torch does not order": (
        dict(attention_mask=torch.ones(2, 24).to(torch.complex64)),
        "attention_mask must hold 1 for .*; got torch.complex64",
    ),
    "positions of parts": (dict(position_ids=positions(FULL) * 0.5), "position_ids must be a tensor of integers"),
    "numbers of parts": (dict(seq_idx=numbers(FULL) / 2), "seq_idx must be a tensor of integers; got torch.float32"),
    "truths in place of numbers": (
        dict(seq_idx=numbers(FULL) > 1),
        "seq_idx must be a tensor of integers; got torch.b",
    ),
    "offsets of parts": (
        dict(cu_seq_lens_q=torch.tensor([0.0, 24.5, 48.0])),
        "cu_seq_lens_q must be a tensor of integers; got torch.float32",
    ),
    "offsets of keys in a list": (
        dict(cu_seq_lens_q=offsets(FULL), cu_seq_lens_k=[0, 24, 48]),
        "cu_seq_lens_k must be a tensor of integers; got list",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_contradict_are_refused_by_name(entry, case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        entry.build()(**ALL, **arguments)


MARKED = {
    "position_ids": lambda p: dict(position_ids=positions(p)),
    "seq_idx": lambda p: dict(seq_idx=numbers(p)),
    "cu_seq_lens_q": lambda p: dict(cu_seq_lens_q=offsets(p)),
    "attention_mask": lambda p: dict(attention_mask=numbers(p, 0)),
}


@pytest.mark.parametrize("mark", MARKED)
def test_documents_beside_a_cache_are_refused_by_name(entry, mark):
    model = entry.build()
    with torch.no_grad():
        cache = model(tokens(2, 5), use_cache=True).cache
    message = rf"Packed documents \({mark}\) cannot be combined with a cache that already holds tokens"
    with pytest.raises(ValueError, match=message):
        model(**ALL, **MARKED[mark](FULL), cache=cache)
    empty = model.cache_class(model.config if entry.recurrent else model)
    with pytest.raises(
        ValueError, match=rf"Packed documents \({mark}\) cannot be combined with a cache: a cache holds"
    ):
        model(**ALL, **MARKED[mark](FULL), cache=empty)
    assert empty.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"cache holds one text a row|continues one text a row"):
        model.generate(**ALL, **MARKED[mark](FULL), max_new_tokens=3)


def test_a_text_that_goes_on_under_another_number_is_refused(entry):
    model, ids = entry.build(), tokens(1, 6)
    mask = torch.tensor([[1, 1, 1, 1, 2, 2]])
    with torch.no_grad():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).cache
    with pytest.raises(ValueError, match=r"Packed documents \(attention_mask\) cannot be combined with a cache"):
        model(ids[:, 4:], attention_mask=mask, cache=cache)


STARTS = {
    "position_ids": torch.arange(6)[None],
    "cu_seq_lens_q": torch.tensor([0, 6, 12]),
    "cu_seq_lens_k": torch.tensor([0, 6, 12]),
    "seq_idx": torch.tensor([[1] * 6]),
}


@pytest.mark.parametrize("mark", STARTS)
@torch.no_grad()
def test_a_document_that_starts_with_a_call_does_not_go_on_with_the_text_of_the_cache(entry, mark):
    model, ids = entry.build(), tokens(2, 12)
    cache = model(ids[:, :6], use_cache=True).cache
    name = "cu_seq_lens_q" if mark == "cu_seq_lens_k" else mark
    with pytest.raises(ValueError, match=rf"starts with this call \({name}\).*a new cache.*count position_ids on"):
        model(ids[:, 6:], cache=cache, **{mark: STARTS[mark]})
    assert cache.get_seq_length() == 6
    want = model(ids, use_cache=False).logits[:, 6:]
    got = model(ids[:, 6:], cache=cache, position_ids=torch.arange(6, 12)[None]).logits
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("mark", STARTS)
@pytest.mark.parametrize("wide", [False, True], ids=["a mask of the call", "a mask of all"])
@torch.no_grad()
def test_a_text_starts_with_a_call_where_the_cache_holds_padding_alone(entry, mark, wide):
    model, ids, mask = entry.build(), tokens(2, 12), torch.ones(2, 12).long()
    mask[:, :6] = 0
    mask[0, 6:8] = 0
    cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).cache
    starts = STARTS[mark]
    if mark == "position_ids":
        starts = (mask.cumsum(1) - 1).clamp(min=0)[:, 6:]
    got = model(ids[:, 6:], attention_mask=mask if wide else mask[:, 6:], cache=cache, **{mark: starts}).logits
    want = model(ids, attention_mask=mask, use_cache=False).logits[:, 6:]
    assert relative(got[mask[:, 6:] > 0], want[mask[:, 6:] > 0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_floats_of_0_alone_are_added_to_scores_and_hide_nothing(entry, dtype):
    """As of a caller whose batch happens to have no padding, or who takes a single step."""
    model, ids = entry.build(), tokens(2, 12)
    want = model(ids, use_cache=False).logits
    assert torch.equal(model(ids, attention_mask=torch.zeros(2, 12, dtype=dtype), use_cache=False).logits, want)
    first = model(ids[:, :11], attention_mask=torch.zeros(2, 11, dtype=dtype), use_cache=True)
    step = model(ids[:, 11:], attention_mask=torch.zeros(2, 12, dtype=dtype), cache=first.cache)
    assert relative(step.logits, want[:, 11:]) < 1e-5
    options = dict(max_new_tokens=4, do_sample=False)
    got = model.generate(ids, attention_mask=torch.zeros(2, 12, dtype=dtype), **options)
    assert torch.equal(got, model.generate(ids, attention_mask=torch.ones_like(ids), **options))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.float8_e4m3fn])
@torch.no_grad()
def test_a_mask_of_a_dtype_that_torch_hardly_computes_with_is_read(entry, dtype):
    model, ids, mask = entry.build(), tokens(2, 24), real(AFTER)
    want = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, want)


@pytest.mark.parametrize("kind", [AdoreCache, RecycledCache])
@pytest.mark.parametrize("mark", STARTS)
def test_a_document_that_starts_with_a_call_is_refused_by_a_cache_of_an_unmodified_decoder(kind, mark):
    model, cache = _llama(kind)
    ids = tokens(2, 12)
    model(ids[:, :6], **named(cache))
    with pytest.raises(ValueError, match=r"starts with this call"):
        model(ids[:, 6:], **named(cache), **{mark: STARTS[mark]})
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("kind", [AdoreCache, RecycledCache])
@pytest.mark.parametrize("mark", MARKED)
def test_documents_beside_a_cache_of_an_unmodified_decoder_are_refused_by_name(kind, mark):
    model, cache = _llama(kind)
    message, arguments = rf"Packed documents \({mark}\) cannot be combined with a cache", MARKED[mark](FULL)
    with pytest.raises(ValueError, match=message):
        model(**ALL, **arguments, **named(cache))
    assert cache.get_seq_length() == 0
    model(tokens(2, 5), **named(cache))
    if mark == "attention_mask":
        arguments = {mark: torch.nn.functional.pad(arguments[mark], (5, 0), value=1)}
    with pytest.raises(ValueError, match=message):
        model(**ALL, **arguments, **named(cache))
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("kind", [AdoreCache, RecycledCache])
def test_a_cache_of_an_unmodified_decoder_reads_a_mask_in_any_notation(kind):
    rows = ("aaaaaaaaaaaaaaaaaaaaaaaa", "..........aaaaaaaaaaaaaa")
    ids, mask, found = tokens(2, 24), real(rows), []
    for other in (mask, mask.bool(), mask.float(), torch.where(mask > 0, 0.0, LOW)):
        model, cache = _llama(kind)
        at = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        found.append(model(ids, attention_mask=other, position_ids=at, **named(cache)).logits[mask.bool()])
        assert cache.real().tolist() == mask.bool().tolist()
    assert all(torch.equal(logits, found[0]) for logits in found)
    alone = model(ids[1:, 10:], **named(DynamicCache())).logits[0]
    assert relative(found[0][24:], alone) < 1e-10


def _llama(kind):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.float64).eval().requires_grad_(False)
    return model, kind(model, **{"cache_size" if kind is AdoreCache else "budget": 200})
