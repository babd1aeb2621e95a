"""What says how important a token is: ADORE's controller (arXiv:2407.02328), and policies that need no training.

    z_i = GRU(rms_norm(x_i), z_{i-1})                                      x_i: embedding of token i
    score_{n,i} = MLP(p_{n-i} + z_i + U z_n)     sigma = sigmoid(score)    for the current token n ("query")
    score_{n,i} = (Q z_n + b) . (W z_i + c) / sqrt(h) + MLP(p_{n-i})          what the query asks for ("bilinear")
    score_{n,i} = MLP(p_{n-i} + z_i)                                       U = 0 ("distance")
    score_i     = MLP(p_i + z_i)                                           the published formula ("static")

B batch, T time, q new tokens, C candidates, D width of embeddings, h width of the GRU, F width of features.
Scores are logits: a sigmoid changes no ranking, but rounds many large ones to the same 1.
The MLP starts with a linear layer W, so W z_i is taken once a token, W p once a distance, and W U z_n once a step.
A product ranks as attention itself does, where a sum has to learn that by its MLP; it costs a step C h operations.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

logger = logging.get_logger(__name__)
WEIGHTS, SIZES = "controller.safetensors", "controller.json"
BLOCK = 2**18  # numbers that a step scores at a time on a CPU, whose cache holds them between the operations
BUCKETS = 32  # of the learned embedding of distances: the last one starts at about 2^15
SCORE_MODES = ("query", "bilinear", "distance", "static")
POSITIONS = ("relative", "absolute", "learned")


class Scorer(nn.Module):
    """What an `AdoreCache` asks. Subclasses give `score`, and `read` where tokens have features of their own.

    Attributes:
        moving: whether the order of two tokens can change from step to step. If not, rebuilding gains nothing.
    """

    moving = True

    def read(self, embeds, positions, real, state):
        """Features (B, q, F) of new tokens and the state (B, S) after them, from theirs before (None at the start).

        embeds: (B, q, D). positions: (B, q) int64. real: (B, q) bool; what is not leaves no trace in the state.
        """
        return embeds.new_zeros(*real.shape, 0), embeds.new_zeros(len(real), 0)

    def table(self, length: int, like: torch.Tensor) -> torch.Tensor | None:
        """Whatever `score` needs of the distances 0 .. length - 1."""
        return None

    def score(self, features, positions, now, state, table):
        """(B, C) scores of tokens for the current token, whose position is `now` (B, 1) and whose state is (B, S).

        features: (B, C, F). positions: (B, C) int. table: of at least as many distances as there are tokens.
        """
        raise ValueError(f"{type(self).__name__} gives no scores: subclasses of Scorer define score().")


class RecencyPolicy(Scorer):
    """The newer the better: a sliding window of the last tokens; with `sinks`, the set of StreamingLLM."""

    moving = False

    def score(self, features, positions, now, state, table):
        """The position."""
        return positions.float()


class RandomPolicy(Scorer):
    """Drawn anew at every step, by a hash of both positions: the same in every row, batch and run."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    def score(self, features, positions, now, state, table):
        """Uniform in [0, 1)."""
        mixed = positions.long() * 0x9E3779B1 + now * 0x85EBCA77 + self.seed * 0xC2B2AE3D
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0x7FFFFFFF
        return ((mixed ^ (mixed >> 15)) & 0xFFFFFF).float() / (1 << 24)


# H2O is not among them: it ranks by attention received, which a cache that decides before layer 0 does not see.
# `RecycledCache(policy="h2o")` is that rule as a cache of its own.
POLICIES = {"recency": RecencyPolicy, "streaming": RecencyPolicy, "random": RandomPolicy}


class ControllerLinear(nn.Module):
    """A linear layer of a controller, which starts as torch starts it whatever the decoder's own rule is.

    Named and shaped as `nn.Linear`, but none: adapters and quantizers, which take all linear layers, leave it alone.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """Uniform up to in_features ** -0.5."""
        start(self)

    def forward(self, x, biased: bool = True):
        """(..., in_features) of any dtype to (..., out_features) in the weight's; `biased`: with the bias."""
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias if biased else None)


class ControllerGRU(nn.GRU):
    """A GRU of a controller, likewise."""

    def reset_parameters(self):
        """Uniform up to hidden_size ** -0.5."""
        start(self)

    def forward(self, x, state=None):
        """As in torch, (B, q, D) and (1, B, h), of any dtype, to (B, q, h) and (1, B, h), in the weights'."""
        # as they are now: torch's own class keeps a list of those that it was made with, and accelerate brings others
        weights = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
        if x.is_cuda and all(held is weight for held, weight in zip(self._flat_weights, weights, strict=True)):
            self.flatten_parameters()  # loading and moving scatter them; a check only where they are in one piece
        x = x.to(weights[0].dtype)
        state = x.new_zeros(1, len(x), self.hidden_size) if state is None else state.to(x.dtype).contiguous()
        return torch.gru(x, state, weights, True, 1, 0.0, self.training, False, True)


class ControllerEmbedding(nn.Embedding):
    """An embedding of a controller, likewise."""

    def reset_parameters(self):
        """Normal of a tenth."""
        start(self)


def start(module: nn.GRU | ControllerLinear | nn.Embedding) -> None:
    """Fill a controller's part; what came from a checkpoint stays."""
    if isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=0.1)
        return
    width = module.hidden_size if isinstance(module, nn.GRU) else module.in_features
    for parameter in module.parameters(recurse=False):
        init.uniform_(parameter, -(width**-0.5), width**-0.5)


class Controller(Scorer):
    """ADORE's GRU and MLP over the decoder's frozen embeddings, one for all layers and heads.

    Computes in its parameters' dtype, float32 unless it was moved. 3 h (D + h + 2) + ... parameters: 1.6M for D = 4096.

    Args:
        embedding_size: D.
        hidden: h, even.
        score_mode, pos, mlp_layers: see `AdoreConfig`.
        base_model: name of the decoder that it is for; "" says nothing.
        label_k: K of the labels that it was trained on.
    """

    def __init__(
        self,
        embedding_size: int,
        hidden: int = 128,
        score_mode: str = "query",
        pos: str = "relative",
        mlp_layers: int = 2,
        base_model: str = "",
        label_k: int = 96,
    ):
        super().__init__()
        for name, value, allowed in (("score_mode", score_mode, SCORE_MODES), ("pos", pos, POSITIONS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}.")
        if min(embedding_size, hidden, mlp_layers) < 1 or hidden % 2:
            raise ValueError(
                "embedding_size and mlp_layers must be at least 1 and hidden even and at least 2; got "
                f"{embedding_size}, {mlp_layers} and {hidden}."
            )
        self.sizes = dict(embedding_size=embedding_size, hidden=hidden, score_mode=score_mode, pos=pos)
        self.sizes |= dict(mlp_layers=mlp_layers, base_model=base_model, label_k=label_k)
        self.hidden, self.score_mode = hidden, score_mode
        self.pos = "absolute" if score_mode == "static" and pos == "relative" else pos
        self.gru = ControllerGRU(embedding_size, hidden, batch_first=True)
        mlp = [ControllerLinear(hidden, hidden if i < mlp_layers else 1) for i in range(1, mlp_layers + 1)]
        later = [part for layer in mlp[1:] for part in (nn.ReLU(), layer)]
        self.first, self.rest = mlp[0], nn.Sequential(*later)
        if product := score_mode == "bilinear":  # the MLP is that of distances
            self.rest = nn.Sequential(mlp[0], *later) if self.is_relative else nn.Sequential()
            self.first = ControllerLinear(hidden, hidden)
        self.query = ControllerLinear(hidden, hidden, product) if score_mode in ("query", "bilinear") else None
        self.distance = ControllerEmbedding(BUCKETS, hidden) if self.pos == "learned" else None

    @property
    def moving(self) -> bool:  # type: ignore[override]
        """Static scores keep their order."""
        return self.score_mode != "static"

    @property
    def is_relative(self) -> bool:
        """Whether positions enter as distances to the current token."""
        return self.score_mode != "static" and self.pos != "absolute"

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """(..., h) for positions or distances (...): sines and cosines, or the embedding of a logarithmic bucket."""
        if self.distance is not None:
            octaves = torch.log2(numbers.double() + 1)  # two buckets an octave
            return self.distance((2 * octaves).long().clamp(max=BUCKETS - 1))
        half = self.hidden // 2
        rates = torch.exp(torch.arange(half, device=numbers.device, dtype=torch.float64) * (-math.log(1e4) / half))
        angles = numbers[..., None].double() * rates
        return torch.cat([angles.sin(), angles.cos()], -1)

    def contexts(self, embeds, real=None, state=None):
        """z (B, q, h) of tokens and z (B, h) after the last real one, from the state before them (None: none)."""
        x = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        start = None if state is None else state[None]
        if real is None:
            z, last = self.gru(x, start)
            return z, last[0]
        order = real.int().argsort(dim=1, descending=True, stable=True)  # tokens first: the GRU never looks right
        z, _ = self.gru(x.gather(1, order[..., None].expand_as(x)), start)
        state = z.new_zeros(len(z), self.hidden) if state is None else state.to(z.dtype)
        count = real.sum(1)
        at_end = (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, self.hidden)
        last = torch.where(count[:, None] > 0, z.gather(1, at_end)[:, 0], state)
        return z.gather(1, order.argsort(dim=1)[..., None].expand_as(z)), last

    def read(self, embeds, positions, real, state):
        """W z_i (+ W p_i of absolute positions) in the embeddings' dtype; of static scores, the score in full."""
        z, state = self.contexts(embeds, real, state)
        features = self.first(z)
        if not self.is_relative:
            features = features + self._turned(self.encode(positions))
        if self.score_mode == "static":
            return self.rest(features), state
        return features.to(embeds.dtype), state

    def table(self, length, like):
        """(length, h): W p of the distances; (length, 1) of a product, the MLP of p."""
        if not self.is_relative:
            return None
        p = self.encode(torch.arange(length, device=like.device))
        return self.rest(p) if self.score_mode == "bilinear" else self._turned(p)

    def score(self, features, positions, now, state, table):
        """See `Scorer`."""
        if self.score_mode == "static":
            return features[..., 0]
        asked = self._asked(state[:, None])
        distances = (now - positions).clamp(min=0)
        columns = features.shape[1] if features.is_cuda else max(1, BLOCK // (len(features) * self.hidden))
        scores = []
        for part, apart in zip(features.split(columns, 1), distances.split(columns, 1), strict=True):
            place = None if table is None else torch.nn.functional.embedding(apart, table)
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            scores.append(self._scored(wide[:, None], asked, place if place is None else place[:, None])[:, 0])
        return torch.cat(scores, 1)

    def forward(self, embeds: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Scores (B, Q, T) of a text's tokens for the current tokens at `queries` (Q,), with their gradient.

        embeds: (B, T, D). Those of tokens after their query mean nothing. Static scores are the same for each query.
        """
        z, _ = self.contexts(embeds)
        at, place = torch.arange(embeds.shape[1], device=embeds.device), None
        features = self.first(z)
        if self.is_relative:
            place = torch.nn.functional.embedding((queries[:, None] - at).clamp(min=0), self.table(len(at), embeds))
        else:
            features = features + self._turned(self.encode(at))
        scores = self._scored(features[:, None], self._asked(z[:, queries]), place)
        return scores.expand(-1, len(queries), -1)

    def _turned(self, x):
        """W x, without the bias that the features already have."""
        return self.first(x, biased=False)

    def _asked(self, z):
        """What a query (B, Q, h) adds to features or multiplies them with, (B, Q, h); None: nothing."""
        if self.query is None:
            return None
        return self.query(z) * self.hidden**-0.5 if self.score_mode == "bilinear" else self._turned(self.query(z))

    def _scored(self, features, asked, place):
        """(B, Q, C) scores of features (B, 1, C, h). asked: (B, Q, h). place: ([B,] Q, C, h), of a product 1 for h."""
        if self.score_mode == "bilinear":
            wide = torch.promote_types(features.dtype, asked.dtype)
            scores = asked.to(wide) @ features[:, 0].to(wide).mT
            return scores if place is None else scores + place[..., 0]
        hidden = features if place is None else features + place
        return self.rest(hidden if asked is None else hidden + asked[:, :, None])[..., 0]

    def save(self, folder: str | os.PathLike) -> None:
        """Write `controller.safetensors` and `controller.json` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / WEIGHTS)
        (folder / SIZES).write_text(json.dumps(self.sizes, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Controller":
        """Read what `save` wrote.

        Raises:
            ValueError: a folder without a controller.
        """
        folder = Path(folder)
        for name in (WEIGHTS, SIZES):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no controller: {name} is missing. Train one, or pass its folder.")
        controller = cls(**json.loads((folder / SIZES).read_text(encoding="utf-8")))
        controller.load_state_dict(load_file(folder / WEIGHTS))
        return controller.eval()


def scorer_for(controller: Scorer | str, decoder: Any) -> Scorer:
    """The scorer that is meant, by itself or by the name of a policy.

    Raises:
        ValueError: neither, or a controller that reads embeddings of another width than the decoder's.
    """
    if isinstance(controller, str):
        if controller not in POLICIES:
            raise ValueError(f"controller must be a Scorer or one of {tuple(POLICIES)}; got {controller!r}.")
        return POLICIES[controller]()
    if not isinstance(controller, Scorer):
        raise ValueError(f"controller must be a Scorer or one of {tuple(POLICIES)}; got {type(controller).__name__}.")
    width = decoder.config.hidden_size
    if isinstance(controller, Controller) and controller.sizes["embedding_size"] != width:
        raise ValueError(
            f"This controller reads embeddings of width {controller.sizes['embedding_size']} (it was made for "
            f"{controller.sizes['base_model'] or 'a model without a name'}); the model's have {width}."
        )
    if isinstance(controller, Controller):
        meant, name = controller.sizes["base_model"], decoder.config.name_or_path
        if meant and name and meant != name:
            logger.warning_once(f"This controller was trained for {meant}; the model is {name}.")
    return controller


def check_scorer(what: Any, needed: str, scorer: Scorer | None) -> Scorer:
    """The scorer, refused if it is of another kind than `what` was made with."""
    if scorer is None or type(scorer).__name__ != needed:
        got = "none" if scorer is None else f"a {type(scorer).__name__}"
        raise ValueError(f"{what} was made with a {needed}, here is {got}. Pass the same as controller=.")
    return scorer
