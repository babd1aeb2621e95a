"""The examples of Recycled Attention: the retrieval task, the comparison, continued pre-training."""

import json
from dataclasses import replace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scrubjay.examples import recycled_pretraining
from scrubjay.examples.benchmarks import benchmark_held, benchmark_recycled
from scrubjay.examples.studies import retrieval
from scrubjay.examples.studies.retrieval import IGNORED, SMOKE, answer, build, caches, draw


def test_recycled_retrieval_rows_ask_for_records_that_they_list():
    rows, labels = draw(SMOKE, 50, np.random.default_rng(0))
    width = 1 + SMOKE.values
    for row, wanted in zip(rows, labels, strict=True):
        listed = {r[0]: tuple(r[1:]) for r in row[: SMOKE.listed].reshape(-1, width).tolist()}
        asked = row[SMOKE.listed :].reshape(-1, width).tolist()
        assert len(listed) == SMOKE.records
        assert len(asked) == len({r[0] for r in asked}) == SMOKE.questions
        assert all(listed[r[0]] == tuple(r[1:]) for r in asked)
        assert (wanted[: SMOKE.listed] == IGNORED).all()
        assert (wanted[SMOKE.listed :].reshape(-1, width)[:, 1:] == row[SMOKE.listed :].reshape(-1, width)[:, 1:]).all()
    assert rows.min() >= 1
    assert rows.max() <= SMOKE.keys + SMOKE.alphabet


def test_recycled_retrieval_scores_what_full_attention_predicts():
    """Token by token with a cache that drops nothing is the full pass; the score of each question is its own."""
    model, (rows, labels) = build(SMOKE).eval(), draw(SMOKE, 6, np.random.default_rng(1))
    with torch.no_grad():
        predicted = model(torch.from_numpy(rows)).logits[:, :-1].argmax(-1).numpy()
    hits = (predicted == labels[:, 1:])[:, SMOKE.listed :].reshape(6, -1)
    hits = np.pad(hits, ((0, 0), (1, 0))).reshape(6, SMOKE.questions, 1 + SMOKE.values)[:, :, 1:]
    found = answer(model, caches(SMOKE)["full"], rows, labels, SMOKE)
    assert np.allclose(found["by_question"], hits.mean((0, 2)), atol=1e-4)
    assert found["accuracy"] == round(float(hits[:, 1:].mean()), 4)


def test_recycled_retrieval_runs_and_keeps_its_record(tmp_path):
    record = retrieval.main(["--smoke", "--out", str(tmp_path / "r.json"), "--model", str(tmp_path / "model")])
    assert (tmp_path / "r.png").stat().st_size > 1000
    again = retrieval.main(["--smoke", "--out", str(tmp_path / "s.json"), "--model", str(tmp_path / "model")])
    assert again["results"] == record["results"] == json.loads((tmp_path / "r.json").read_text())["results"]
    assert set(record["results"]) >= {"full", "StreamingLLM", "H2O", "one choice", "Recycled, S = 5"}


def test_recycled_keys_held_in_every_way_are_measured(tmp_path):
    sizes = "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --length 700 --tokens 12 --budget 32 --stride 5 --turns 1"
    benchmark_held.main([*sizes.split(), "--out", str(tmp_path / "held.json")])
    record = json.loads((tmp_path / "held.json").read_text())
    ways = record["ways"]
    assert list(ways) == ["device", "host", "8 bits", "4 bits", "host + 4 bits"]
    assert ways["host"]["agreement"] == ways["device"]["agreement"] == 1
    assert abs(ways["host"]["loss"] - ways["device"]["loss"]) < 1e-4
    assert ways["4 bits"]["bytes"]["device"] < ways["8 bits"]["bytes"]["device"] < ways["device"]["bytes"]["device"]
    assert ways["device"]["bytes"]["host"] == 0 < ways["host"]["bytes"]["host"]
    assert record["processor"]["cpu_count"]
    assert record["versions"]["torch"] == torch.__version__


def test_recycled_pretraining_runs(tmp_path):
    record = recycled_pretraining.main(["--smoke", "--out", str(tmp_path / "p.json")])
    found = json.loads((tmp_path / "p.json").read_text())["perplexity"]
    assert found == record["perplexity"]
    assert set(found) == {"before", "continued as before", "continued with a recycled tail"}
    # the two continuations differ, and a fixed budget is not full attention
    assert found["continued as before"] != found["continued with a recycled tail"]
    assert found["before"]["full"] != found["before"]["SnapKV"]


def test_recycled_benchmark_takes_one_full_step_in_a_pass():
    sizes = benchmark_recycled.SMALL
    for dtype in (torch.float32, torch.bfloat16):
        decoding = benchmark_recycled.Decoding(sizes, dtype, "recycled")
        for _ in range(2 * sizes.stride):
            decoding.step()
        assert [(layer.full_steps, layer.partial_steps) for layer in decoding.layers] == [(2, 8)] * sizes.layers
        assert all(layer.seen == sizes.length + 10 for layer in decoding.layers)
        assert [work() for work in benchmark_recycled.decode(sizes, dtype).values()] == [sizes.stride] * 2
    for work in benchmark_recycled.partial_steps(sizes).values():
        assert work() == sizes.stride


class Touched(TorchDispatchMode):
    """Counts the numbers that operations read and write; views read none."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.count += sum(x.numel() for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor))
        return out


def test_a_recycled_partial_step_touches_as_much_of_a_long_text_as_of_a_short_one():
    """And a full step touches all keys and values, at least once each."""
    sizes, found = benchmark_recycled.SMALL, {}
    for length in (2000, 4000):
        decoding = benchmark_recycled.Decoding(replace(sizes, length=length), torch.float32, "recycled")
        steps = []
        for _ in range(2 * sizes.stride):
            with Touched() as touched:
                decoding.step()
            steps.append(touched.count)
        found[length] = steps
        kept, held = (2 * n * sizes.kv_heads * sizes.head_dim * sizes.layers for n in (sizes.budget, length))
        partial = steps[sizes.stride : 2 * sizes.stride - 1]  # after a full step; the first one gathers, too
        assert kept <= min(partial)
        assert max(partial[1:]) < held
        assert steps[sizes.stride - 1] > held
    assert found[2000][sizes.stride + 1 : -1] == found[4000][sizes.stride + 1 : -1]
