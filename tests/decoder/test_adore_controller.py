"""ADORE's controller: the formula, step by step as in one pass, padding, its file."""

import pytest
import torch
from adore_cases import decoder, mask_of, run, text

from scrubjay import AdoreCache
from scrubjay.modeling.decoder.controller import BUCKETS, Controller, RandomPolicy
from scrubjay.modeling.inputs.cache_argument import named

KINDS = [(mode, pos) for mode in ("query", "distance", "static") for pos in ("relative", "absolute", "learned")]


def made(mode="query", pos="relative", layers=2, width=12, hidden=8):
    torch.manual_seed(1)
    return Controller(width, hidden, mode, pos, layers).double()


def formula(controller, embeds, n, i):
    """The score of token i for token n of one text (T, D), from the formula, with nothing taken ahead."""
    x = embeds / (embeds.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    z = controller.gru(x[None])[0][0]
    static = controller.score_mode == "static"
    number = i if static or controller.pos == "absolute" else n - i
    if controller.pos == "learned":
        bucket = min(int(2 * torch.log2(torch.tensor(number + 1.0, dtype=torch.float64))), BUCKETS - 1)
        p = controller.distance.weight[bucket]
    else:
        rates = 1e4 ** (-torch.arange(controller.hidden // 2, dtype=torch.float64) / (controller.hidden // 2))
        p = torch.cat([(number * rates).sin(), (number * rates).cos()])
    features = p + z[i]
    if controller.score_mode == "query":
        features = features + controller.query.weight @ z[n]
    return controller.rest(controller.first(features))[0]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("mode", "pos"), KINDS)
def test_scores_are_those_of_the_formula(mode, pos, layers):
    controller, embeds = made(mode, pos, layers), torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        scores = controller(embeds, torch.tensor([3, 8]))
        for row, n in ((0, 3), (1, 8)):
            for i in range(n + 1):
                for text_at in range(2):
                    want = formula(controller, embeds[text_at], n, i)
                    assert abs(scores[text_at, row, i] - want) < 1e-12


@pytest.mark.parametrize(("mode", "pos"), KINDS)
def test_a_text_read_in_pieces_and_padded_scores_as_in_one_pass(mode, pos):
    controller, embeds = made(mode, pos), torch.randn(1, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        want = controller(embeds, torch.arange(12))[0]
        padded = torch.cat([torch.randn(1, 3, 12, dtype=torch.float64), embeds], 1)
        padded = torch.cat([padded[:, :8], torch.randn(1, 2, 12, dtype=torch.float64), padded[:, 8:]], 1)
        real = torch.tensor([[0] * 3 + [1] * 5 + [0] * 2 + [1] * 7]).bool()
        state, features, seen = None, [], 0
        for start, stop in ((0, 2), (2, 6), (6, 7), (7, 12), (12, 17)):
            columns = real[:, start:stop]
            positions = (seen + columns.long().cumsum(1) - 1).clamp(min=0)
            part, state = controller.read(padded[:, start:stop], positions, columns, state)
            seen += int(columns.sum())
            features.append(part[columns])
            if not seen:
                continue
            held, at = torch.cat(features)[None], torch.arange(seen)[None]
            table = controller.table(20, padded)
            got = controller.score(held, at, torch.tensor([[seen - 1]]), state, table)
            assert (got[0] - want[seen - 1, :seen]).abs().max() < 1e-12
    assert seen == 12


def test_static_scores_alone_do_not_move():
    assert [made(mode).moving for mode in ("query", "distance", "static")] == [True, True, False]
    at, controller = torch.arange(6), made("distance")
    with torch.no_grad():
        scores = controller(torch.randn(1, 6, 12, dtype=torch.float64), at)[0]
    assert (scores[4, :5] - scores[5, :5]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_generation_with_a_controller_is_the_same_for_padded_and_lone_rows(family):
    model, controller = decoder(family), Controller(48, 16).double()
    ids, mask = text(3, 18), mask_of((18, 11, 2), 18)
    settings, options = dict(cache_size=6, rebuild=3), dict(max_new_tokens=12, do_sample=False)
    cache = AdoreCache(model, controller=controller, **settings)
    out = model.generate(ids, attention_mask=mask, **named(cache), **options)
    for row, n in enumerate((18, 11, 2)):
        alone = AdoreCache(model, controller=controller, **settings)
        want = model.generate(ids[row : row + 1, 18 - n :], **named(alone), **options)
        assert torch.equal(out[row, 18:], want[0, n:])


def test_it_learns_which_tokens_matter():
    """Embeddings of which a tenth carry a mark: the score has to find them, whatever the distance."""
    torch.manual_seed(0)
    controller = Controller(12, 16)
    optimizer, losses = torch.optim.AdamW(controller.parameters(), lr=1e-2), []
    for _ in range(60):
        embeds, marked = torch.randn(4, 30, 12), torch.rand(4, 30) < 0.1
        embeds[..., 0] += 6 * marked
        scores = controller(embeds, torch.tensor([29]))[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, marked.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_saved_and_loaded_scores_the_same(tmp_path):
    controller = Controller(12, 8, "distance", "learned", 3, base_model="tiny", label_k=7)
    controller.save(tmp_path / "c")
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"controller.safetensors", "controller.json"}
    loaded, embeds = Controller.load(tmp_path / "c"), torch.randn(1, 5, 12)
    assert loaded.sizes == controller.sizes
    assert (loaded.sizes["base_model"], loaded.sizes["embedding_size"], loaded.sizes["label_k"]) == ("tiny", 12, 7)
    assert torch.equal(loaded(embeds, torch.tensor([4])), controller(embeds, torch.tensor([4])))
    (tmp_path / "c" / "controller.json").unlink()
    with pytest.raises(ValueError, match=r"holds no controller: controller.json is missing"):
        Controller.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(score_mode="fixed"), "score_mode must be one of .*got 'fixed'"),
        (dict(pos="rotary"), "pos must be one of .*got 'rotary'"),
        (dict(hidden=7), "hidden even and at least 2; got 12, 2 and 7"),
        (dict(mlp_layers=0), "got 12, 0 and 128"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Controller(12, **given)


def test_the_random_policy_is_uniform_and_the_same_wherever_a_token_stands():
    at = torch.arange(2000)
    scores = RandomPolicy(3).score(None, at[None], torch.tensor([[2000]]), None, None)[0]
    assert (scores.sort().values - (at + 0.5) / 2000).abs().max() < 0.05  # Kolmogorov's 1.6 / sqrt(2000) is 0.036
    again = RandomPolicy(3).score(None, at[None].flip(1), torch.tensor([[2000]]), None, None)[0]
    assert torch.equal(again.flip(0), scores)
    for other in (RandomPolicy(3).score(None, at[None], torch.tensor([[2001]]), None, None)[0],
                  RandomPolicy(4).score(None, at[None], torch.tensor([[2000]]), None, None)[0]):  # fmt: skip
        assert abs(torch.corrcoef(torch.stack([scores, other]))[0, 1]) < 0.1


def test_a_text_longer_than_the_table_makes_a_longer_one():
    model = decoder()
    cache = AdoreCache(model, cache_size=5, rebuild=2, controller=Controller(48, 16).double())
    run(model, text(1, 300), [250] + [1] * 50, cache)
    assert cache.history.capacity == len(cache._table) == 512
