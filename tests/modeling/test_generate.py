"""generate(): every mode gives what the model without a cache would give."""

import pytest
import torch
from transformers import TextStreamer
from zoo import VOCAB, relative, tokens

from scrubjay.modeling.inputs.cache_argument import CACHE, named


@torch.no_grad()
def argmax_loop(model, ids, steps):
    """Greedy decoding without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def greedy(model, ids, **kwargs):
    return model.generate(
        ids, max_new_tokens=kwargs.pop("max_new_tokens", 12), do_sample=False, eos_token_id=None, **kwargs
    )


@pytest.fixture
def model(entry):
    return entry.build(torch.float64)  # float64: a tie within float32's rounding would be a coin toss


def test_greedy_equals_an_argmax_loop(model):
    ids = tokens(2, 20)
    assert torch.equal(greedy(model, ids), argmax_loop(model, ids, 12))
    assert torch.equal(greedy(model, ids, use_cache=False), argmax_loop(model, ids, 12))


def test_a_prompt_of_one_token(model):
    ids = tokens(1, 1)
    assert torch.equal(greedy(model, ids), argmax_loop(model, ids, 12))


def test_left_padded_batch_equals_each_row_alone(model):
    ids, lengths = tokens(3, 20), (20, 11, 2)
    mask = torch.stack([torch.arange(20) >= 20 - n for n in lengths]).long()
    out = greedy(model, ids, attention_mask=mask)
    for row, n in enumerate(lengths):
        assert torch.equal(out[row, 20:], argmax_loop(model, ids[row : row + 1, 20 - n :], 12)[0, n:])


def test_sampling_is_the_same_with_and_without_a_cache(model):
    ids, outs = tokens(2, 20), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outs.append(model.generate(ids, max_new_tokens=12, do_sample=True, eos_token_id=None, use_cache=use_cache))
    assert torch.equal(*outs)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=4, num_return_sequences=2, length_penalty=0.5)])
def test_beams_with_a_cache_equal_beams_without(model, options):
    ids = tokens(3, 20)
    mask = torch.stack([torch.arange(20) >= 20 - n for n in (20, 11, 2)]).long()
    with_cache, without = (greedy(model, ids, attention_mask=mask, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunked_prefill_equals_one_prefill(model, size):
    ids = tokens(2, 20)
    mask = torch.stack([torch.arange(20) >= 20 - n for n in (20, 4)]).long()
    assert torch.equal(
        greedy(model, ids, attention_mask=mask, prefill_chunk_size=size), greedy(model, ids, attention_mask=mask)
    )


def test_offloaded_cache_gives_the_same(recurrent):
    model, ids = recurrent.build(torch.float64), tokens(2, 20)
    assert torch.equal(greedy(model, ids, cache_implementation="offloaded"), greedy(model, ids))


def test_no_other_cache_is_made_in_place_of_the_models_own(entry, model):
    ids = tokens(2, 20)
    assert torch.equal(greedy(model, ids, cache_implementation="dynamic"), greedy(model, ids))
    with pytest.raises(ValueError, match="cache_implementation out"):
        greedy(model, ids, cache_implementation="static")


def test_second_turn_with_full_ids_and_with_suffix_ids(entry, model):
    first, more = tokens(2, 20), tokens(2, 6, seed=5)
    mask = torch.stack([torch.arange(20) >= 20 - n for n in (20, 11)]).long()
    turn = greedy(model, first, attention_mask=mask)
    conversation = torch.cat([turn, more], 1)
    whole_mask = torch.cat([mask, torch.ones(2, 18, dtype=torch.long)], 1)
    want = greedy(model, conversation, attention_mask=whole_mask)
    for ids in (conversation, conversation[:, 31:]):  # 20 + 12 - 1 columns are in the cache: the last token is not
        cache = entry.model.cache_class(model)
        again = greedy(model, first, attention_mask=mask, **named(cache))
        assert torch.equal(again, turn)
        assert cache.get_seq_length() == 31
        got = greedy(model, ids, attention_mask=whole_mask, **named(cache))
        assert torch.equal(got[:, -12:], want[:, -12:])


def test_a_prompt_with_nothing_new_is_refused(entry, model):
    ids, cache = tokens(1, 10), entry.model.cache_class(model)
    with torch.no_grad():
        model(ids, **named(cache))
    with pytest.raises(ValueError, match="nothing is new"):
        greedy(model, ids, **named(cache))


def test_embeddings_as_a_prompt(model):
    ids = tokens(2, 20)
    out = greedy(model, None, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(out, greedy(model, ids)[:, 20:])


def test_the_returned_cache_goes_on(model):
    ids = tokens(2, 20)
    out = greedy(model, ids, return_dict_in_generate=True, output_logits=True)
    cache = out[CACHE]
    with torch.no_grad():
        step = model(out.sequences[:, -1:], **named(cache)).logits[:, 0]
        whole = model(out.sequences).logits
    assert relative(step, whole[:, -1]) < 1e-10
    assert relative(torch.stack(out.logits, 1), whole[:, 19:-1]) < 1e-6  # generate() hands out float32


def test_streaming(model):
    class Collector(TextStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.got.append("end")

    ids, collector = tokens(1, 8), Collector()
    out = greedy(model, ids, streamer=collector)
    assert collector.got == [*out[0].tolist(), "end"]


def test_assisted_decoding_is_refused(recurrent):
    with pytest.raises(ValueError, match=r"(?i)stateful"):
        greedy(recurrent.build(torch.float64), tokens(1, 8), prompt_lookup_num_tokens=2)


def test_tokens_outside_the_prompt_do_not_reach_it(model):
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    other = torch.where(mask.bool(), ids, (ids + 1) % VOCAB)
    a, b = (greedy(model, x, attention_mask=mask)[:, 20:] for x in (ids, other))
    assert torch.equal(a, b)


ONE_TEXT = {
    "cu_seq_lens_q": torch.tensor([0, 9, 18]),
    "cu_seq_lens_k": torch.tensor([0, 9, 18]),
    "seq_idx": torch.tensor([[0] * 9, [1] * 9]),
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mark", ONE_TEXT)
def test_marks_of_one_text_a_row_are_of_the_prompt_alone(entry, mark, use_cache):
    model, ids = entry.build(), tokens(2, 9)
    options = dict(max_new_tokens=4, do_sample=False, use_cache=use_cache)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model.generate(ids, **{mark: ONE_TEXT[mark]}, **options), want)
    assert torch.equal(model.generate(input_ids=ids, **{mark: ONE_TEXT[mark]}, **options), want)


def test_padding_that_is_marked_by_numbers_of_documents_is_padding_in_generation(entry):
    model, ids, mask = entry.build(), tokens(2, 9), torch.ones(2, 9).long()
    mask[0, :4] = 0
    options = dict(max_new_tokens=4, do_sample=False)
    want = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, seq_idx=mask - 1, **options), want)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mark", ONE_TEXT)
def test_generation_refuses_several_documents_in_a_row_before_its_first_step(entry, mark, use_cache):
    model, ids = entry.build(), tokens(1, 18)
    marked = torch.tensor([[0] * 9 + [1] * 9]) if mark == "seq_idx" else ONE_TEXT[mark]
    with pytest.raises(ValueError, match=r"several documents in a row, and generate.. continues one text a row"):
        model.generate(ids, **{mark: marked}, max_new_tokens=1, use_cache=use_cache)
