"""Caches under autocast: keys, values and queries of several dtypes, and texts that are read partly outside of it."""

import contextlib

import pytest
import torch
from recycled_cases import decoder
from recycled_cases import tokens as small
from test_training import Rows
from transformers import DynamicCache, Seq2SeqTrainer, Seq2SeqTrainingArguments
from zoo import ZOO, relative, tokens

from scrubjay import AdoreCache, RecycledCache, RecycledConfig, RecycledForCausalLM
from scrubjay.configuration.configuration_recycled import POLICIES
from scrubjay.kernels import recycle
from scrubjay.kernels.select_attention import select_attention_step
from scrubjay.kernels.window import window_attention, window_attention_step
from scrubjay.modeling.inputs.cache_argument import CACHE, named

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SPANS = [14, 1, 1, 5, *[1] * 9]
# of the largest logit, against float32; measured, worst of 3 seeds: 1.9e-2 and 1.7e-3, and 1.8e-1 for one wrong key
BOUND = {BF16: 4e-2, F16: 4e-3}
# when each piece is read: everything inside, the prompt outside, the prompt inside, in turn
TURNS = {
    "inside": lambda i: True,
    "prompt outside": lambda i: i > 1,
    "prompt inside": lambda i: i < 1,
    "in turn": lambda i: i % 2 == 1,
    "in turn from inside": lambda i: i % 2 == 0,
}
MIXED = [(F32, F32, BF16), (BF16, F32, F16), (F16, BF16, F32), (BF16, BF16, F32), (F32, BF16, BF16)]


def autocast(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@torch.no_grad()
def read(model, ids, dtype=None, inside=lambda i: True, cache=None, spans=SPANS):
    """Logits of pieces, in float32, each read under autocast to `dtype` where `inside` of its number says so."""
    found = []
    for i, piece in enumerate(ids.split(spans, 1)):
        with autocast(dtype if inside(i) else None):
            out = model(piece, use_cache=True, **({} if cache is None else named(cache)))
        cache = out[CACHE]
        found.append(out.logits.float())
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_pieces_under_autocast_and_beside_it_are_the_pass_in_float32(entry, dtype):
    model, ids = entry.build(initializer_range=0.1), tokens(2, 30)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        with autocast(dtype):
            assert relative(model(ids, use_cache=False).logits, want) < BOUND[dtype]
    for name, inside in TURNS.items():
        assert relative(read(model, ids, dtype, inside), want) < BOUND[dtype], name


def test_pieces_in_bfloat16_are_the_pass_in_float32(entry):
    model, ids = entry.build(initializer_range=0.1), tokens(2, 30)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    assert relative(read(model.to(BF16), ids), want) < BOUND[BF16]


def test_a_model_in_bfloat16_leaves_autocast_to_float16_again(entry):
    """Three dtypes in one text: what autocast made, what the model has, and what both are held in."""
    model, ids = entry.build(initializer_range=0.1), tokens(2, 30)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    model.to(BF16)
    for name, inside in TURNS.items():
        assert relative(read(model, ids, F16, inside), want) < BOUND[BF16], name


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_generation_under_autocast_is_the_argmax_of_its_steps(entry, dtype):
    model, ids = entry.build(initializer_range=0.1), tokens(2, 12)
    with autocast(dtype):
        got = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    logits = read(model, got[:, :-1], dtype, spans=[12, *[1] * 7])
    assert torch.equal(got[:, 12:], logits[:, 11:].argmax(-1))


def attached(model):
    """Every cache for an unmodified decoder, with room for the whole text."""
    for policy in POLICIES:
        yield RecycledCache(model, budget=60, policy=policy)
    yield RecycledCache(model, budget=60, schedule="dynamic", qc=2)
    yield RecycledCache(model, budget=60, policy="streaming", rope_mode="cache")
    yield AdoreCache(model, cache_size=60, rebuild=0, controller="recency")
    yield AdoreCache(model, cache_size=60, rebuild=0, controller="recency", position_mode="compact")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("which", range(len(POLICIES) + 4))
def test_a_cache_with_room_for_all_is_transformers_own(which, implementation, kind):
    """Outside of autocast to float32's rounding, whatever was held there: nothing held is rounded."""
    model, ids = decoder(kind, F32, attn_implementation=implementation), small(2, 30)
    for dtype in BOUND:
        for name, inside in TURNS.items():
            got = read(model, ids, dtype, inside, list(attached(model))[which])
            want = read(model, ids, dtype, inside, DynamicCache(config=model.config))
            at = 0
            for i, span in enumerate(SPANS):
                # measured: 1.7e-06; what is read later depends on what was attended in the narrow dtype before
                exact = name == "prompt inside" and i > 0
                bound = 1e-5 if exact else BOUND[dtype] * 2
                error = relative(got[:, at : at + span], want[:, at : at + span])
                assert error < bound, (dtype, name, i)
                at += span


@pytest.mark.parametrize("which", range(12))
def test_a_cache_under_autocast_chooses_and_stays_finite(which):
    """With less room than the text needs, in every order."""
    model, ids = decoder(dtype=F32), small(2, 30)
    makes = [
        *(
            lambda p=p: RecycledCache(model, budget=6, stride=3, page=3, rank=2, policy=p)
            for p in ("recycled", "snapkv", "h2o", "lowrank", "quest", "tova")
        ),
        lambda: RecycledCache(model, budget=6, policy="streaming"),
        lambda: RecycledCache(model, budget=6, policy="streaming", rope_mode="cache"),
        lambda: RecycledCache(model, budget=6, schedule="dynamic", qc=2, full_output=False),
        lambda: RecycledCache(model, budget=6, stride=2, full_layers=(0,)),
        lambda: AdoreCache(model, cache_size=8, rebuild=3, controller="random"),
        lambda: AdoreCache(model, cache_size=8, rebuild=3, controller="random", position_mode="compact"),
    ]
    for dtype in BOUND:
        for inside in TURNS.values():
            assert torch.isfinite(read(model, ids, dtype, inside, makes[which]())).all()


def drawn(dtypes, T=None, seed=0):
    """q (B, H[, T], P), k, v (B, G, n, P) of these dtypes."""
    torch.manual_seed(seed)
    q = torch.randn(2, 8, 8) if T is None else torch.randn(2, 8, T, 8)
    return [x.to(d) for x, d in zip((q, torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)), dtypes, strict=True)]


def is_rounded(got, want, dtype):
    """`got` is `want`, of the float64 mathematics on the same numbers, in float32's rounding and then dtype's."""
    assert got.dtype == dtype
    assert (
        relative(got, want) < {F32: 2e-6, F16: 1e-3, BF16: 8e-3}[dtype]
    )  # half a unit in the last place, and float32's


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_recycled_kernels_take_three_dtypes(dtypes):
    q, k, v = drawn(dtypes)
    want, logs = recycle.decode_reference(q.double(), k.double(), v.double(), 0.3)
    is_rounded(recycle.decode(q, k, v, 0.3), want, q.dtype)
    is_rounded(recycle.decode_reference(q, k, v, 0.3)[0], want, q.dtype)
    out, logp = recycle.decode_with_scores(q, k, v, 0.3)
    is_rounded(out, want, q.dtype)
    narrow = q.dtype == k.dtype != F32  # scores of two 16-bit operands are rounded as such
    assert relative(logp, logs) < (2e-2 if narrow else 2e-6)
    assert relative(recycle.scores_of(q, k, 0.3), logs) < (2e-2 if narrow else 2e-6)
    many, *_ = drawn(dtypes, T=5)
    seen = torch.rand(2, 2, 5, 20) < 0.7
    seen[..., 0] = True
    exact = recycle.attend_seen(many.double(), k.double(), v.double(), seen, 0.3)
    is_rounded(recycle.attend_seen(many, k, v, seen, 0.3), exact, q.dtype)
    mass = recycle.received(many, k, 0.3, seen)
    assert relative(mass, recycle.received(many.double(), k.double(), 0.3, seen)) < (2e-2 if narrow else 2e-6)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_rows_of_keys_and_values_keep_their_dtypes(dtypes):
    _, k, v = drawn(dtypes)
    index = torch.stack([torch.randperm(20)[:7] for _ in range(4)]).view(2, 2, 7)
    out = [x.new_zeros(2, 2, 9, 8) for x in (k, v)]
    for got in (recycle.gather_pair(k, v, index), recycle.gather_pair(k, v, index, out=out)):
        for rows, x in zip(got, (k, v), strict=True):
            assert torch.equal(rows, x.gather(2, index[..., None].expand(-1, -1, -1, 8)))
            assert rows.dtype == x.dtype


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_window_kernels_take_three_dtypes(dtypes):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 4, 8).to(dtype) for dtype in dtypes)
    past = (torch.randn(2, 3, 4, 8).to(dtypes[2]), torch.randn(2, 3, 4, 8).to(dtypes[0]))
    past = (*past, torch.ones(2, 3, dtype=torch.bool))
    exact = [x.double() for x in (q, k, v)]
    want = window_attention(*exact, 5, (past[0].double(), past[1].double(), past[2]))
    is_rounded(window_attention(q, k, v, 5, past), want, q.dtype)
    held = torch.rand(2, 7) < 0.7
    held[:, 0] = True
    for step in (window_attention_step, select_attention_step):
        got, want = (step(x[:, 0], y.transpose(1, 2), z.transpose(1, 2), held) for x, y, z in ((q, k, v), exact))
        is_rounded(got, want, q.dtype)


def test_train_tail_under_autocast_trains_as_without():
    """bfloat16 as attention has it, forward and backward."""
    sizes = dict(hidden_size=48, num_hidden_layers=2, vocab_size=97, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model = RecycledForCausalLM(RecycledConfig(**sizes, budget=30, train_tail=5, initializer_range=0.1)).train()
    ids, found = tokens(2, 30), {}
    for dtype in (None, BF16, F16):
        model.zero_grad()
        with autocast(dtype):
            loss = model(ids, labels=ids).loss
        loss.backward()
        found[dtype] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for dtype in BOUND:
        for got, want in zip(found[dtype], found[None], strict=True):
            assert got.dtype == F32
            assert relative(got, want) < BOUND[dtype]


@pytest.mark.parametrize("form", ["ssd", "recycled", "adore", "llama with a cache"])
def test_trainer_predicts_with_generate_in_bfloat16(form, tmp_path):
    """Evaluation runs under autocast; what it gives is what generate() gives there."""
    entry = next((entry for entry in ZOO if entry.name == form), None)
    model = decoder(dtype=F32) if entry is None else entry.build(initializer_range=0.1)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, bf16=True, predict_with_generate=True, per_device_eval_batch_size=4, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    def cache():
        return {} if entry is not None else named(RecycledCache(model, budget=6, stride=2))

    if entry is None:
        plain = model.generate
        model.generate = lambda *args, **kwargs: plain(*args, **kwargs | cache())
    trainer = Seq2SeqTrainer(model, arguments)
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in (Rows(4, 12)[i] for i in range(4))]
    got = trainer.predict(rows, **options).predictions
    with autocast(BF16), torch.no_grad():
        want = model.generate(torch.stack([row["input_ids"] for row in rows]), **options)
    assert want.shape == (4, 18)
    assert torch.equal(torch.as_tensor(got)[:, :18], want)  # padded to the usual length of 20
