"""Classifiers of texts and of tokens: which token is scored, what the loss is, and that they are models like others."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from heads_cases import KINDS, each_token, same_weights, texts, with_head
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from zoo import ZOO, relative, tokens, trainable

from scrubjay.modeling.heads import ONE_LABEL, SEVERAL_LABELS, sequence_loss

BOUND = 1e-13  # float64; 4e-15 was the worst of ten seeds over the zoo
TAIPAN = next(entry for entry in ZOO if entry.name == "taipan")
LENGTHS = (12, 7, 1)
COLUMNS = torch.arange(12)
PADDING = {
    "left": torch.stack([12 - n <= COLUMNS for n in LENGTHS]),
    "right": torch.stack([n > COLUMNS for n in LENGTHS]),
    "both": torch.stack([(COLUMNS >= 2) & (2 + n > COLUMNS) for n in (10, 7, 1)]),
    "between": torch.stack([(COLUMNS < 3) | (COLUMNS > 6), COLUMNS % 3 == 1, COLUMNS == 5]),
    "nowhere": torch.ones(3, 12, dtype=torch.bool),
}


def by_hand(model, ids):
    """(N,) scores of one text: `score` of the model without head at the last token."""
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0, -1]
    return F.linear(hidden, model.score.weight)


@pytest.mark.parametrize("pad", [None, 5], ids=["no pad token", "the last token is the pad token"])
@pytest.mark.parametrize("where", PADDING)
@torch.no_grad()
def test_the_last_token_of_a_row_is_scored_wherever_padding_stands(entry, where, pad):
    """Texts that end in the token that pads, as where it is the end of text, too: the mask says what a token is."""
    model, ids, mask = texts(entry, pad_token_id=pad), tokens(3, 12), PADDING[where]
    for row in range(3):
        ids[row, mask[row].nonzero()[-1]] = 5
    got = model(ids, attention_mask=mask.long()).logits
    want = torch.stack([by_hand(model, row[real]) for row, real in zip(ids, mask, strict=True)])
    assert got.shape == (3, 3)
    assert relative(got, want) < BOUND
    embeds = model.get_input_embeddings()(ids)
    assert relative(model(inputs_embeds=embeds, attention_mask=mask).logits, want) < BOUND


@torch.no_grad()
def test_without_a_mask_pad_tokens_at_the_end_are_padding(entry):
    model, ids = texts(entry, pad_token_id=5), tokens(3, 12)
    ids[0, 11], ids[1, 7:], ids[2] = 6, 5, 5
    ids[1, 6], ids[1, 2] = 6, 5
    want = [by_hand(model, ids[0]), by_hand(model, ids[1, :7]), by_hand(model, ids[2])]
    assert relative(model(ids).logits, torch.stack(want)) < BOUND
    whole = torch.stack([by_hand(model, row) for row in ids])
    assert relative(model(ids, attention_mask=torch.ones_like(ids)).logits, whole) < BOUND
    assert relative(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, whole) < BOUND
    model.config.get_text_config().pad_token_id = None
    assert relative(model(ids).logits, whole) < BOUND


def test_a_row_without_a_token_has_no_score(entry):
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1] = 0
    with pytest.raises(ValueError, match="Row 1 of 3 has no token in this call"):
        texts(entry)(tokens(3, 12), attention_mask=mask)


@torch.no_grad()
def test_a_text_in_pieces_is_scored_at_the_end_of_the_last_one(entry):
    model, ids = texts(entry), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = mask[1, 9] = mask[0, 11] = 0
    want = torch.stack([by_hand(model, row[real]) for row, real in zip(ids, mask.bool(), strict=True)])
    for name in ("cache", "past_key_values"):
        first = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        assert first.cache is first.past_key_values
        for new in (mask, mask[:, 8:]):
            cache = first.cache if new is mask else model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).cache
            out = model(ids[:, 8:], attention_mask=new, **{name: cache})
            assert out.cache is cache
            assert relative(out.logits, want) < BOUND
    assert model(ids).cache is None  # nobody would read it


PACKING = {
    "cu_seq_lens_q": torch.tensor([0, 5, 6, 12]),
    "cu_seq_lens_k": torch.tensor([0, 5, 6, 12]),
    "seq_idx": torch.tensor([[0] * 5 + [1] + [2] * 6]),
    "position_ids": torch.cat([torch.arange(n) for n in (5, 1, 6)])[None],
}


@pytest.mark.parametrize("by", PACKING)
@torch.no_grad()
def test_packed_documents_have_a_row_of_scores_each(entry, by):
    model, ids = texts(entry), tokens(1, 12)
    out = model(ids, labels=torch.tensor([2, -100, 0]), **{by: PACKING[by]})
    want = torch.stack([by_hand(model, ids[0, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))])
    assert relative(out.logits, want) < BOUND
    assert relative(out.loss, F.cross_entropy(want[[0, 2]], torch.tensor([2, 0]))) < BOUND
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\) or \(3, 1\) .*packed document.*got \(1,\)"):
        model(ids, labels=torch.tensor([2]), **{by: PACKING[by]})


@pytest.mark.parametrize("by", PACKING)
@torch.no_grad()
def test_without_a_mask_pad_tokens_at_the_end_of_a_document_are_padding(entry, by):
    model, ids = texts(entry, pad_token_id=5), tokens(1, 12)
    ids[0, [2, 4, 5, 10, 11]], ids[0, [3, 9]] = 5, 6  # the document in the middle is of pad tokens alone
    want = [by_hand(model, ids[0, a:b]) for a, b in ((0, 4), (5, 6), (6, 10))]
    assert relative(model(ids, **{by: PACKING[by]}).logits, torch.stack(want)) < BOUND
    whole = [by_hand(model, ids[0, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    got = model(ids, **{by: PACKING[by]}, attention_mask=torch.ones_like(ids)).logits
    assert relative(got, torch.stack(whole)) < BOUND
    split = ids.repeat(2, 1)
    marked = {"position_ids": PACKING["position_ids"]}
    assert relative(model(split, **marked).logits, torch.stack(want * 2)) < BOUND


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [(), [1], object()], ids=["empty", "list", "object"])
def test_what_is_no_cache_is_refused_by_name(entry, kind, cache):
    for model in (with_head(entry, kind).build(), entry.build(), entry.build().model):
        with pytest.raises(
            ValueError, match=rf"needs a {entry.model.cache_class.__name__}.*; got {type(cache).__name__}"
        ):
            model(tokens(2, 5), past_key_values=cache)


def test_documents_without_a_token_are_refused(entry):
    with pytest.raises(ValueError, match="A document without tokens has no score"):
        texts(entry)(tokens(1, 12), cu_seq_lens_q=torch.tensor([0, 5, 5, 12]))


@torch.no_grad()
def test_every_token_has_its_scores_whatever_stands_around_its_text(entry):
    model, ids, mask = each_token(entry), tokens(3, 12), PADDING["between"]
    head = lambda row: model.score(model.model(row[None], use_cache=False).last_hidden_state)[0]  # noqa: E731
    got = model(ids, attention_mask=mask.long()).logits
    assert got.shape == (3, 12, 3)
    for row in range(3):
        assert relative(got[row, mask[row]], head(ids[row, mask[row]])) < BOUND
    assert model.score.bias.abs().max() > 0
    for name, value in PACKING.items():
        packed = model(ids[:1], **{name: value}).logits[0]
        assert relative(packed, torch.cat([head(ids[0, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))])) < BOUND
    labels = torch.randint(0, 3, (3, 12)).masked_fill(~mask, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    assert relative(loss, F.cross_entropy(got[mask], labels[mask])) < BOUND  # not shifted
    summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    assert relative(summed, loss * mask.sum() / 50) < BOUND
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 12\) .*got \(3,\)"):
        model(ids, labels=labels[:, 0])


CASES = {
    "regression": (1, lambda: torch.randn(4)),
    "regression, a column": (1, lambda: torch.randn(4, 1)),
    "regression of several": (3, lambda: torch.randn(4, 3)),
    "one of several": (3, lambda: torch.tensor([2, 0, 1, 1])),
    "some of several": (3, lambda: torch.randint(0, 2, (4, 3)).double()),
}
GIVEN = {"regression of several": "regression"}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_transformers_own_and_adds_up_over_calls(entry, case):
    count, draw = CASES[case]
    labels = draw()
    model, ids = texts(entry, num_labels=count, problem_type=GIVEN.get(case)), tokens(4, 12)
    theirs = with_head(entry, KINDS[0]).config(num_labels=count, problem_type=GIVEN.get(case))
    out = model(ids, labels=labels)
    logits = out.logits.detach().requires_grad_()
    numbers = labels.to(logits) if labels.is_floating_point() else labels
    want = ForSequenceClassificationLoss(numbers, logits, theirs)
    assert relative(out.loss, want) < BOUND
    assert model.config.problem_type == theirs.problem_type
    (by_hand,) = torch.autograd.grad(want, logits)
    out.loss.backward()
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, -1].detach()
    assert relative(model.score.weight.grad, by_hand.T @ hidden) < BOUND
    with torch.no_grad():
        rows = zip(ids.split(1), labels.split(1), strict=True)
        parts = [model(row, labels=label, num_items_in_batch=labels.numel()) for row, label in rows]
    assert relative(sum(part.loss for part in parts), want) < BOUND


def test_labels_that_do_not_fit_are_refused():
    config = SimpleNamespace(num_labels=3)  # newer configurations refuse a kind that there is not themselves
    logits = torch.randn(4, 3)
    for labels, kind, message in (
        (torch.zeros(3, dtype=torch.int64), "single_label_classification", r"shape \(4,\) or \(4, 1\) .*got \(3,\)"),
        (torch.zeros(4), "multi_label_classification", r"shape \(4, 3\) \(numbers, 3 for each row.*got \(4,\)"),
        (torch.zeros(4), "regression", r"shape \(4, 3\) .*got \(4,\)"),
        (torch.zeros(4), "ranking", "config.problem_type must be one of .*got 'ranking'"),
    ):
        config.problem_type = kind
        with pytest.raises(ValueError, match=message):
            sequence_loss(logits, labels, config)


def test_a_call_that_is_refused_does_not_say_what_later_labels_are(entry):
    model, ids = texts(entry), tokens(4, 12)
    for wrong in (torch.zeros(4), torch.zeros(4, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"labels must have shape .* named by config.problem_type"):
            model(ids, labels=wrong)
        assert model.config.problem_type is None
    model(ids, labels=torch.tensor([0, 1, 2, 0]))
    assert model.config.problem_type == ONE_LABEL


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.float32, torch.int32, torch.int64])
def test_labels_of_any_dtype_are_what_transformers_takes_them_for(dtype):
    own, logits, labels = with_head(TAIPAN, KINDS[0]).config(num_labels=3), torch.randn(4, 3), torch.ones(4, 3)
    if dtype in (torch.int32, torch.int64):
        labels, theirs = torch.tensor([2, 0, 1, 1]), with_head(TAIPAN, KINDS[0]).config(num_labels=3)
        ForSequenceClassificationLoss(labels.to(dtype).long(), logits, theirs)
    else:
        theirs = with_head(TAIPAN, KINDS[0]).config(num_labels=3)
        ForSequenceClassificationLoss(labels, logits, theirs)
    sequence_loss(logits, labels.to(dtype), own)
    assert own.problem_type == theirs.problem_type == (ONE_LABEL if labels.ndim == 1 else SEVERAL_LABELS)


@pytest.mark.parametrize("make", [texts, each_token])
def test_numbers_of_labels_are_integers_of_any_size(entry, make):
    model, ids = make(entry, problem_type=ONE_LABEL), tokens(2, 12)
    labels = torch.tensor([2, 0]) if make is texts else torch.randint(0, 3, (2, 12))
    want = model(ids, labels=labels).loss
    for dtype in (torch.int8, torch.uint8, torch.int32):
        assert torch.equal(model(ids, labels=labels.to(dtype)).loss, want)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=r"labels must have shape .*\(integers, one for each"):
            model(ids, labels=labels.to(dtype))


@pytest.mark.parametrize("labels", [torch.tensor([1.0, 2.0, -100.0]), torch.tensor([[1.0], [-100.0], [-100.0]])])
def test_taipans_budget_counts_the_numbers_that_its_regression_counts(labels):
    model, ids = texts(TAIPAN, num_labels=1, train_gate="argmax", budget_lambda=50.0).train(), tokens(3, 12)
    out = model(ids, labels=labels, num_items_in_batch=6)
    want = F.mse_loss(out.logits, labels.reshape(3, 1).to(out.logits)) / 2 + 50 * out.budget_loss / 2
    assert relative(out.loss, want) < BOUND


@pytest.mark.parametrize("make", [texts, each_token])
def test_taipans_budget_is_in_the_loss_of_training(make):
    model, ids = make(TAIPAN, budget_lambda=50.0, classifier_dropout=0.0), tokens(4, 12)
    labels = torch.randint(0, 3, (4,) if make is texts else (4, 12))
    plain = model(ids, labels=labels)
    assert plain.budget_loss > 0
    assert plain.selection.shape == (1, 3)
    logits = plain.logits.flatten(0, -2)
    assert relative(plain.loss, F.cross_entropy(logits, labels.flatten())) < BOUND
    for items in (None, 5 * labels.numel()):
        torch.manual_seed(0)
        out = model.train()(ids, labels=labels, num_items_in_batch=items)
        mean = F.cross_entropy(out.logits.flatten(0, -2), labels.flatten()) + 50 * out.budget_loss
        assert relative(out.loss, mean if items is None else mean / 5) < BOUND
    out.loss.backward()
    gates = [p.grad for name, p in model.named_parameters() if ".gate." in name]
    assert gates
    assert all(g.abs().max() > 0 for g in gates)


def test_dropout_stands_before_the_scores_of_tokens_as_in_transformers(entry):
    assert each_token(entry, classifier_dropout=0.4, hidden_dropout=0.0).dropout.p == 0.4
    named = each_token(entry, hidden_dropout=0.3) if "rodimus" in entry.name else each_token(entry)
    assert named.dropout.p == (0.3 if "rodimus" in entry.name else entry.config().to_dict().get("hidden_dropout", 0.1))
    assert each_token(entry, token_classification_bias=False).score.bias is None
    model, ids = each_token(entry, classifier_dropout=0.5), tokens(2, 12)
    seen = []
    model.score.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.train()(ids)
    share = float((seen[0] == 0).double().mean())
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_scores_start_small_and_biases_at_zero(entry, kind):
    torch.manual_seed(0)
    model = with_head(entry, kind).model(entry.config(hidden_size=192, num_labels=40))
    std = model.config.get_text_config().initializer_range
    assert abs(float(model.score.weight.detach().std()) / std - 1) < 0.05  # of 7680 draws: 0.8 % is one sigma
    assert model.score.bias is None or not model.score.bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_is_called_as_every_model_is(entry, kind):
    model, ids = with_head(entry, kind).build(num_labels=3), tokens(2, 12)
    want = model(ids).logits
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], want)
    model.config.return_dict = True
    with pytest.raises(ValueError, match="has no argument 'output_router'"):
        model(ids, output_router=True)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    half = with_head(entry, kind).build(torch.bfloat16, num_labels=3)
    assert half(ids).logits.dtype == torch.float32


def test_a_slice_of_a_sequence_has_no_score_of_the_text(recurrent):
    model = texts(recurrent)
    with pytest.raises(ValueError, match="lies in one rank's slice alone"):
        model.scored(torch.zeros(1, 4, 48), None, None, shard=object())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(entry, kind):
    model, ids = with_head(entry, kind).build(torch.float64, num_labels=3), tokens(2, 12)
    labels = torch.tensor([1, 2]) if kind == KINDS[0] else torch.randint(0, 3, (2, 12))
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == on
        torch.manual_seed(0)
        model.zero_grad()
        model.train()(ids, labels=labels).loss.backward()
        grads.append([p.grad for p in trainable(model)])
    assert all(relative(a, b) < BOUND for a, b in zip(*grads, strict=True) if b.any())


@pytest.mark.parametrize("tied", [True, False])
def test_the_score_decays_and_its_bias_does_not(entry, tied):
    model = each_token(entry, tie_word_embeddings=tied)
    decayed, kept = (group["params"] for group in model.weight_decay_groups(0.1))
    assert any(p is model.score.weight for p in decayed)
    assert any(p is model.score.bias for p in kept)
    assert len(decayed) + len(kept) == len(trainable(model))
    # where no head of a language model shares it, the embedding is what it is in an untied model
    embedding = any(p is model.get_input_embeddings().weight for p in kept)
    assert embedding == ("rodimus" in entry.name)


def test_weights_are_copied_alone():
    one = texts(TAIPAN)
    assert same_weights(one, texts(TAIPAN))
    assert not same_weights(one, texts(TAIPAN, seed=1))
