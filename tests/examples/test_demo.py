"""The demo's parts against brute force, and the whole of it in small."""

import json
import lzma
import math
from collections import Counter
from pathlib import Path
from sysconfig import get_paths
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scrubjay.examples.data.corpus import (
    MIN_BYTES,
    cut,
    encode,
    joined,
    load_corpus,
    num_bytes,
    split,
    stdlib_files,
    train_tokenizer,
)
from scrubjay.examples.demo import check, demo
from scrubjay.examples.learning.recipe import MODELS, Recipe
from scrubjay.examples.learning.training import (
    Plan,
    Windows,
    build_model,
    find_pace,
    plan_steps,
    schedule,
    train,
)
from scrubjay.examples.measuring.baselines import EM_STEPS, TUNING_SHARE, NGram, gram_keys, lzma_bits
from scrubjay.examples.measuring.measure import cache_growth, decode_rate, full_cache_nbytes, stream_bits, windows
from scrubjay.modeling.inputs.cache_argument import CACHE

VOCAB = 11


def random_stream(num_tokens: int, seed: int = 0) -> np.ndarray:
    """(num_tokens + 1,) ids below VOCAB that favour the next number, so that contexts matter."""
    rng = np.random.default_rng(seed)
    jumps = rng.choice([1, 1, 1, 2, 5], size=num_tokens)
    return np.concatenate([[0], np.cumsum(jumps) % VOCAB])


def brute_force_probability(ngram: NGram, stream: np.ndarray, context: tuple, token: int) -> float:
    """The definition in baselines.py with dictionaries; the weights are the model's own."""
    padded = [int(stream[0])] * (ngram.order - 1) + [int(x) for x in stream[1:]]
    p = 1 / VOCAB
    for n in range(1, ngram.order + 1):
        counts, follows = Counter(), Counter()
        for i in range(ngram.order - 1, len(padded)):
            counts[tuple(padded[i - n + 1 : i + 1])] += 1
            follows[tuple(padded[i - n + 1 : i])] += 1
        short = tuple(context[len(context) - n + 1 :])
        if follows[short]:
            weight = ngram.weights[n - 1][int(math.log2(follows[short])) + 1]
            p = weight * counts[(*short, token)] / follows[short] + (1 - weight) * p
    return p


def test_ngram_equals_brute_force():
    stream, other = random_stream(600), random_stream(60, seed=1)
    ngram = NGram(stream, VOCAB, order=3)
    padded = [int(other[0])] * 2 + [int(x) for x in other[1:]]
    expected = [brute_force_probability(ngram, stream, tuple(padded[i : i + 2]), padded[i + 2]) for i in range(60)]
    np.testing.assert_allclose(ngram.probabilities(other), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_probabilities_sum_to_one_and_are_positive(order):
    ngram = NGram(random_stream(600), VOCAB, order=3)
    for context in ([0, 1], [3, 4], [9, 9]):  # the last is unseen: jumps of 0 do not occur
        endings = [ngram.probabilities(np.array([5, *context, token]), order)[-1] for token in range(VOCAB)]
        assert min(endings) > 0
        assert sum(endings) == pytest.approx(1, abs=1e-12)


def test_ngram_weights_come_from_text_that_the_counts_have_not_seen():
    """EM on the seen text would trust every trigram fully; here the tail is noise and the weight must fall to 0."""
    rng = np.random.default_rng(0)
    cycle = np.arange(1901) % VOCAB
    noise = rng.integers(0, VOCAB, size=len(cycle) // (TUNING_SHARE - 1))
    honest = NGram(np.concatenate([cycle, noise]), VOCAB)
    trusting = NGram(np.arange(2001) % VOCAB, VOCAB)
    bucket = int(math.log2(1900 / VOCAB)) + 1
    assert honest.weights[1][bucket] < 0.3
    assert trusting.weights[1][bucket] > 0.9
    assert EM_STEPS >= 20


def test_ngram_improves_with_order():
    ngram, other = NGram(random_stream(5000), VOCAB), random_stream(500, seed=1)
    assert ngram.bits(other, 2) < ngram.bits(other, 1) < 500 * math.log2(VOCAB) * 1.01


def test_gram_keys_keep_the_newest_token_lowest():
    assert gram_keys(np.array([7, 1, 2, 3]), 3, 10).tolist() == [771, 712, 123]


def test_ngram_refuses_keys_that_overflow():
    with pytest.raises(ValueError, match="64-bit"):
        NGram(random_stream(10), 1 << 22, order=3)


def test_lzma_after_training_text_is_the_difference_of_two_sizes():
    train, heldout = b"the jay hides an acorn. " * 50, b"the jay finds an acorn. " * 50

    def bits(raw: bytes) -> int:
        return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))

    after = bits(train + heldout) - bits(train)
    assert lzma_bits(train, heldout) == {"lzma": bits(heldout), "lzma after the training text": after}
    assert after < bits(heldout)


def test_split_is_by_file_deterministic_and_disjoint():
    documents = {f"file{i}.py": f"text of file {i}\n" * 20 for i in range(400)}
    train, heldout = split(documents)
    assert (train, heldout) == split(dict(reversed(documents.items())))
    assert sorted(train + heldout) == sorted(documents.values())
    assert not set(train) & set(heldout)
    assert 0.05 < len(heldout) / 400 < 0.2
    fewer = dict(list(documents.items())[:-1])
    assert set(split(fewer)[1]) <= set(heldout)  # a file's part does not depend on the other files


def test_split_of_one_file_takes_its_last_tenth():
    text = "".join(f"line {i}\n" for i in range(1000))
    (train,), (heldout,) = split({"notes.txt": text})
    assert train + heldout == text
    assert train.endswith("\n")
    assert len(heldout) / len(text) == pytest.approx(0.1, abs=0.01)


def test_cut_keeps_bytes_and_line_ends():
    documents = ["one\n", "zwölf\ndreizehn\n", "never\n"]
    assert cut(documents, 1000) == documents
    assert cut(documents, 12) == ["one\n", "zwölf\n"]
    assert cut(documents, 0) == []
    assert cut(["äää"], 3) == ["ä"]  # no line end, and no half of a character


def test_stdlib_corpus_has_no_tests_and_no_installed_packages(tmp_path):
    kept = ("os.py", "json/decoder.py", "testing.py")
    for name in (*kept, "test/test_os.py", "idlelib/idle_test/a.py", "site-packages/torch.py", "a/tests/b.py", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert [path.relative_to(tmp_path).as_posix() for path in stdlib_files(tmp_path)] == sorted(kept)


def test_user_text_leaves_out_what_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("words and words\n" * MIN_BYTES)
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00\x01" * 100)
    (tmp_path / ".hidden").write_text("secret\n" * 100)
    corpus = load_corpus(tmp_path)
    assert "secret" not in "".join(corpus.train + corpus.heldout)
    assert num_bytes(corpus.train + corpus.heldout) == 16 * MIN_BYTES


@pytest.mark.parametrize("content", ["", "too little\n"])
def test_too_little_text_is_refused_with_what_came_and_what_is_needed(tmp_path, content):
    file = tmp_path / "small.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"holds {len(content)} bytes .* at least 65,536 .* Pass a larger"):
        load_corpus(file)


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist\. Pass"):
        load_corpus(tmp_path / "nowhere")


def test_tokens_give_the_text_back():
    documents = ["def f(x):\n    return x  # ünïcödé ☕\n", "\tb\r\n\n"]
    tokenizer = train_tokenizer(documents * 10, 300)
    stream = encode(tokenizer, documents)
    eos = tokenizer.eos_token_id
    assert stream[0] == stream[-1] == eos
    assert tokenizer.decode(stream) == tokenizer.eos_token.join(["", *documents, ""])
    assert joined(["a", "é"]) == b"a\0\xc3\xa9\0"


def test_windows_score_every_token_once_with_the_right_label():
    for num_tokens in (1, 5, 16, 17, 60, 64, 100):
        stream = np.arange(100, 101 + num_tokens)
        inputs, labels = windows(stream, 16, 4)
        scored = labels != -100
        assert sorted(labels[scored]) == list(range(101, 101 + num_tokens))
        assert (inputs[scored] + 1 == labels[scored]).all()
        assert not scored[1:, :4].any()  # each later window starts with context


class KnownModel(torch.nn.Module):
    """Says token 0 with 1/2, and each of the other VOCAB - 1 tokens with an equal share of the rest."""

    device = torch.device("cpu")

    def forward(self, input_ids, use_cache=False):
        p = torch.full((VOCAB,), 0.5 / (VOCAB - 1))
        p[0] = 0.5
        return SimpleNamespace(logits=p.log().expand(*input_ids.shape, VOCAB))


@pytest.mark.parametrize("length", [16, 64, 1024])
def test_stream_bits_are_exact_on_a_known_distribution(length):
    stream = random_stream(500)
    zeros = int((stream[1:] == 0).sum())
    expected = zeros + (500 - zeros) * math.log2(2 * (VOCAB - 1))
    assert stream_bits(KnownModel(), stream, length, batch_size=3) == pytest.approx(expected, rel=1e-6)


def test_stream_bits_of_a_sample_of_windows_estimate_the_whole():
    stream = random_stream(5000)
    whole, sample = (stream_bits(KnownModel(), stream, 16, every=every) for every in (1, 5))
    assert sample == pytest.approx(whole, rel=0.02)
    assert sample != whole


def test_stream_bits_equal_one_pass_where_the_window_holds_everything():
    model = small_llama()
    stream = random_stream(60) % 50
    ids = torch.from_numpy(stream)[None]
    nats = model(input_ids=ids, labels=ids).loss.item() * 60
    assert stream_bits(model, stream, 60) == pytest.approx(nats / math.log(2), rel=1e-6)


def small_llama():
    torch.manual_seed(0)
    return build_model("llama", Recipe.of("llama", hidden_size=64, num_hidden_layers=1), vocab_size=50, eos_token_id=0)


def test_cache_of_attention_grows_as_computed():
    model = small_llama()
    grown = cache_growth(model, random_stream(200) % 50, [100, 300])
    assert grown["nbytes"] == {100: full_cache_nbytes(model, 100)}
    assert full_cache_nbytes(model, 100) == 2 * 1 * 64 * 100 * 4


def test_schedule_rises_and_ends_at_zero():
    rate = schedule(Recipe.of("llama", warmup=0.1, decay=0.5), 100)
    assert rate(0) == pytest.approx(0.1)
    assert [rate(step) for step in (9, 30, 50)] == [1, 1, 1]
    assert rate(99) == pytest.approx(0.02)
    assert rate(100) == 0


def test_finding_the_pace_leaves_the_model_as_it_was(tmp_path):
    model, data = small_llama(), Windows(random_stream(64 * 40) % 50, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    pace = find_pace(model, data, Recipe.of("llama", batch_size=4, length=64, precision="float32"), tmp_path)
    assert torch.get_num_threads() == pace.threads <= threads
    torch.set_num_threads(threads)
    assert 0 < pace.seconds < math.inf
    assert not pace.bfloat16
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_run_over_its_limit_stops(tmp_path):
    data = Windows(random_stream(64 * 40) % 50, 64)
    recipe = Recipe.of("llama", batch_size=4, length=64)
    log = train(small_llama(), data, recipe, 20, bfloat16=False, output=tmp_path, show=False, limit=0.0)
    assert len(log.seconds) == len(log.losses) == 1


def test_after_training_in_bfloat16_a_model_computes_in_its_own_dtype(tmp_path):
    """accelerate leaves autocast in the forward: caches would be weighed in two bytes a number, full ones in four."""
    model, data = small_llama(), Windows(random_stream(64 * 40) % 50, 64)
    train(model, data, Recipe.of("llama", batch_size=4), 2, bfloat16=True, output=tmp_path, show=False)
    cache = model.eval()(torch.arange(9)[None], use_cache=True)[CACHE]
    assert cache.layers[0].keys.dtype == model.dtype == torch.float32


def test_plan_obeys_the_tightest_limit():
    recipe = Recipe.of("llama", batch_size=4, max_epochs=2.0, num_evals=5)
    assert plan_steps(recipe, 40, minutes=1.0, step_seconds=0.1, eval_seconds=0.0) == Plan(20, "2 epochs")
    assert plan_steps(recipe, 40_000, minutes=1.0, step_seconds=0.1, eval_seconds=2.0) == Plan(500, "1 minutes")
    assert plan_steps(recipe, 40, minutes=0.01, step_seconds=9.0, eval_seconds=0.0) == Plan(1, "0.01 minutes")
    assert plan_steps(recipe.smoke(), 40_000, minutes=1.0, step_seconds=0.1, eval_seconds=0.0) == Plan(8, "max_steps")


def test_training_learns_and_records_every_step(tmp_path):
    model, data = small_llama(), Windows(random_stream(64 * 100) % 50, 64)
    log = train(
        model,
        data,
        Recipe.of("llama", batch_size=4, num_evals=2),
        20,
        bfloat16=False,
        output=tmp_path,
        show=False,
        evaluate=lambda model: 1.5,
    )
    assert len(log.losses) == len(log.seconds) == 20
    assert [value for _, value in log.evals] == [1.5, 1.5]
    assert log.seconds == sorted(log.seconds)
    assert np.mean(log.losses[-3:]) < log.losses[0] - 0.5  # measured: 3.9 falls to 2.1


@pytest.mark.parametrize(
    ("recipe", "minutes", "name"),
    [
        (Recipe.of("llama"), 0.0, "--minutes"),
        (Recipe.of("llama", batch_size=0), 1.0, "--batch-size"),
        (Recipe.of("llama", length=3), 1.0, "--length"),
    ],
)
def test_check_names_the_argument(recipe, minutes, name):
    with pytest.raises(ValueError, match=f"{name} is .* at least"):
        check(recipe, minutes)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_learns_and_is_weighed(name, tmp_path):
    """Each has about as many parameters as the others in the demo, and a tiny one learns a cycle of 50 tokens."""
    with torch.device("meta"):
        assert 4.5e6 < build_model(name, Recipe.of(name), 4096, 0).num_parameters() < 5.5e6
        assert 0.48e6 < build_model(name, Recipe.quick(name), 2048, 0).num_parameters() < 0.68e6
    recipe = Recipe.of(name, hidden_size=32, num_hidden_layers=1, batch_size=4, length=32, num_evals=1)
    torch.manual_seed(0)
    model = build_model(name, recipe, 50, 0)
    log = train(model, Windows(np.arange(4000) % 50, 32), recipe, 30, bfloat16=False, output=tmp_path, show=False)
    assert log.losses[-1] < log.losses[0] - 0.3
    model.eval()
    grown = cache_growth(model, np.arange(50), [100, 200], chunk=64)["nbytes"]
    # constant where it was fed on; attention is fed the first only, and a hybrid's grows
    assert len(set(grown.values())) == (2 if name == "ssd-hybrid" else 1)
    assert decode_rate(model, np.arange(50), 10, 3) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "rodimus_plus"])
def test_demo_smoke_end_to_end(name, tmp_path, capfd):
    text = tmp_path / "text"
    text.mkdir()
    for path in stdlib_sample():
        (text / path.name).write_text(path.read_text())
    result = demo(
        name, recipe=Recipe.of(name).smoke(), text=text, output=tmp_path / "out", command="scrubjay demo --smoke"
    )
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["command"] == "scrubjay demo --smoke"
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert set(result["bits_per_byte"]) == {
        name, "unigram", "bigram", "trigram", "lzma", "lzma after the training text",
    }  # fmt: skip
    assert (
        len(result["training"]["bits_per_byte"])
        == result["training"]["plan"]["steps"]
        == Recipe.of(name).smoke().max_steps
    )
    assert [c["prompt"] for c in result["completions"]["completions"]] == ["def ", "import ", "class "]
    if name != "llama":
        assert result["completions"]["module"].startswith("transformers_modules.")  # the saved code, not scrubjay's
        assert len(set(result["cache"]["ours"].values())) == 1
        card = (tmp_path / "out" / "README.md").read_text()
        measured = f"| bits per byte, held-out text | {round(result['bits_per_byte'][name], 3)} |"
        for line in ("Data: text", "scrubjay demo --smoke", measured, "tokenizer = AutoTokenizer.from_pretrained"):
            assert line in card
    first, *_, last = [value for _, value in result["training"]["heldout"]]
    assert last < first
    printed = capfd.readouterr().out
    assert "bits per byte" in printed
    assert all(c["text"].strip() in printed for c in result["completions"]["completions"])


def stdlib_sample():
    """About 400 kB of real code, enough for the smallest run."""
    root = Path(get_paths()["stdlib"])
    return [path for path in sorted(root.glob("*.py")) if path.stat().st_size > 20_000 and path.stem.isalpha()][:12]
