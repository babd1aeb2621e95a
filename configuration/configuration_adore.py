"""Settings of ADORE (adaptive token release) beside the sizes of a decoder."""

import dataclasses
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from transformers.utils import logging

from scrubjay.configuration.configuration_wrapped import WrappedConfig

CHOICES = {
    "score_mode": ("query", "bilinear", "distance", "static"),
    "controller_pos": ("relative", "absolute", "learned"),
    "rebuild_from": ("model", "host"),
    "rebuild_commit": ("discard", "swap"),
    "rebuild_mask": ("causal", "full"),
    "position_mode": ("original", "compact"),
    "prefill": ("full", "chunked"),
    "store": ("ids", "embeds"),
    "label_agg": ("mean", "max_head", "vote"),
    "mask_scope": ("uniform", "per_head"),
}
LABELLED = 96  # a worked example's
ROBUST = {"recent": 32, "sinks": 4}

logger = logging.get_logger(__name__)


def check_choices(values: dict) -> None:
    """Refuse a value that its field does not allow, naming both."""
    for name, allowed in CHOICES.items():
        if name in values and values[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}; got {values[name]!r}.")


@dataclass(frozen=True)
class AdoreSettings:
    """What an `AdoreCache` does. Values outside the rules raise ValueError with value and rule.

    Args:
        cache_size: m, tokens whose keys and values are held, in every layer and head the same. 192: a worked example's.
        rebuild: R, released tokens that come back for each step. 8: the same example's.
        rebuild_from: they run through the "model" again with the step, or their keys and values, as they were when the
            token came, are brought from the "host"'s memory, where those of every token are kept: the model then runs
            on the new tokens alone, and what is brought back is exact. Costs one synchronisation with the device a
            step. `rebuild_mask` and `store` speak of "model" alone.
        recent: newest tokens that are never released. The method names the newest one alone.
        sinks: first tokens that are never released. 0 in the method; 4 spares a model whose controller is untrained.
        rebuild_commit: "discard" what came back after the step, or "swap": it competes for the cache with the others.
        rebuild_mask: a rebuilt token sees what came before it ("causal"), or all that is cached ("full", an ablation:
            its keys then depend on later tokens).
        rebuild_every: steps from one rebuilding to the next. 1: every step.
        rebuild_gate: rebuild in a row only if its best released token scores above its worst cached one. Where no row
            does, the step costs nothing more; to know that costs one synchronisation with the device a step.
        release_before: a step does not attend the cached tokens that it releases. False: they are attended once more.
        position_mode: tokens keep their "original" positions, or "compact": those attended are numbered from 0 in each
            step, for texts beyond the length that the model was trained on.
        prefill: a prompt in one "full" causal pass, of which `cache_size` tokens are kept, or "chunked": in pieces of
            `cache_size`, which bounds working memory and releases tokens on the way; rows must not be padded then.
        store: of released tokens keep "ids", 4 bytes each, or "embeds". A prompt of `inputs_embeds` makes it "embeds".
    """

    cache_size: int = 192
    rebuild: int = 8
    rebuild_from: str = "model"
    recent: int = 1
    sinks: int = 0
    rebuild_commit: str = "discard"
    rebuild_mask: str = "causal"
    rebuild_every: int = 1
    rebuild_gate: bool = False
    release_before: bool = False
    position_mode: str = "original"
    prefill: str = "full"
    store: str = "ids"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            if type(value) is not wanted:
                raise ValueError(f"{field.name} must be of type {wanted.__name__}; got {value!r}.")
        check_choices(dataclasses.asdict(self))
        for name, least in (("rebuild", 0), ("recent", 0), ("sinks", 0), ("rebuild_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if not self.cache_size >= self.sinks + self.recent >= 1:
            raise ValueError(
                f"cache_size >= sinks + recent >= 1 is needed; got {self.cache_size}, {self.sinks} and {self.recent}."
            )
        if self.rebuild_from == "host":
            self._check_host()

    def _check_host(self):
        """Refuse what speaks of tokens that run through the model again."""
        for name, why in (
            ("rebuild_mask", "no token runs through the model again, so there is none to see later ones"),
            ("store", "keys and values of released tokens are kept, so nothing is to run again"),
        ):
            value, needed = getattr(self, name), getattr(type(self), name)
            if value != needed:
                raise ValueError(
                    f"{name}={value!r} means nothing with rebuild_from='host': {why}. Leave {name} at "
                    f"{needed!r}, or use rebuild_from='model'."
                )


def warn_of_fixed_order(what: str, settings: AdoreSettings) -> None:
    """Say, once, that rebuilding with scores whose order never changes attends what a larger cache attends."""
    size, count = settings.cache_size, settings.rebuild
    price = f"{count} tokens more in every step"
    if settings.rebuild_from == "host":
        price = f"bringing {count} tokens from the host in every step"
    logger.warning_once(
        f"The scores of {what} never change their order, so {size} cached and {count} rebuilt tokens are the tokens "
        f"that a cache of {size + count} attends without rebuilding, at the price of {price}. Use "
        f"cache_size={size + count}, rebuild=0, or scores that follow the query."
    )


@strict
class AdoreConfig(WrappedConfig):
    r"""A decoder that holds a constant number of tokens and rebuilds released ones that matter again
    (ADORE, adaptive token release, arXiv:2407.02328).

    `cache_size`, `rebuild`, `rebuild_from`, `recent`, `sinks`, `rebuild_commit`, `rebuild_mask`, `rebuild_every`,
    `rebuild_gate`, `release_before`, `position_mode`, `prefill`, `store` are those of `AdoreSettings`. The paper gives
    no sizes of its controller and no code; defaults of the fields below are ours where nothing else is said.

    Args:
        base_config: the decoder, see `WrappedConfig`.
        score_mode: a token's score follows the current token, by a sum of their features ("query") or by their scaled
            dot product ("bilinear"), only its distance ("distance"), or neither ("static": the published formula, under
            which rebuilding gains nothing).
        controller_hidden: width of the GRU.
        controller_pos: the position that the score sees: "relative" to the current token, "absolute", or an embedding
            of the distance in logarithmic buckets, "learned". With score_mode "static": absolute whenever "relative".
        controller_mlp_layers: linear layers from features to score; of a dot product, from distance to score.
        label_k: K, tokens of full attention that are labelled important; also of the mask under which the decoder is
            tuned. None: 96, a worked example's, or `cache_size` where that is less.
        label_agg: how heads and layers agree on one ranking: "mean" of probabilities, "max_head", or "vote" (number of
            heads whose own top K holds the token).
        label_layers: indices of the layers that are asked; (): all.
        label_horizon: a token is important if any of so many next queries, the current one included, has it in its top
            K. Static scores are trained on the share of all later queries instead, and it must be 1.
        mask_scope: the tuning mask is the same for all heads and layers ("uniform", as the cache will be) or each
            head's own top K ("per_head").
    """

    model_type = "scrubjay_adore"
    paper = {
        "name": "ADORE (adaptive token release)",
        "title": "Efficient Sparse Attention needs Adaptive Token Release",
        "arxiv": "2407.02328",
        "open": {
            "cache_size": "tokens held; 192 is a worked example's",
            "rebuild": "tokens rebuilt a step; 8 is the same example's",
            "rebuild_from": "whether rebuilt tokens run through the model again or come from host memory",
            "score_mode": "what a score follows; with the published formula its order is fixed and rebuilding gains "
            "nothing",
            "controller_hidden": "width of the controller",
            "controller_pos": "the position that a score sees",
            "controller_mlp_layers": "layers from features to a score",
            "recent": "newest tokens that are never released",
            "sinks": "first tokens that are never released",
            "rebuild_commit": "what becomes of rebuilt tokens after the step",
            "rebuild_mask": "what a rebuilt token sees",
            "rebuild_every": "how often tokens are rebuilt",
            "release_before": "whether a step attends the tokens that it releases",
            "position_mode": "positions of tokens held",
            "prefill": "how a prompt beyond the cache is read",
            "label_k": "tokens labelled important",
            "label_agg": "how heads and layers agree on one ranking",
            "label_horizon": "queries for which a token is important",
            "mask_scope": "whether the tuning mask is that of each head",
        },
    }

    cache_size: int = AdoreSettings.cache_size
    rebuild: int = AdoreSettings.rebuild
    rebuild_from: str = AdoreSettings.rebuild_from
    recent: int = AdoreSettings.recent
    sinks: int = AdoreSettings.sinks
    score_mode: str = "query"
    controller_hidden: int = 128
    controller_pos: str = "relative"
    controller_mlp_layers: int = 2
    rebuild_commit: str = AdoreSettings.rebuild_commit
    rebuild_mask: str = AdoreSettings.rebuild_mask
    rebuild_every: int = AdoreSettings.rebuild_every
    rebuild_gate: bool = AdoreSettings.rebuild_gate
    release_before: bool = AdoreSettings.release_before
    position_mode: str = AdoreSettings.position_mode
    prefill: str = AdoreSettings.prefill
    store: str = AdoreSettings.store
    label_k: int | None = None
    label_agg: str = "mean"
    label_layers: list | tuple = ()
    label_horizon: int = 1
    mask_scope: str = "uniform"

    @classmethod
    def preset(cls, name: str, **changes) -> "AdoreConfig":
        """The settings called "paper" (the defaults) or "robust" (32 recent tokens, 4 sinks), some of them changed.

        Raises:
            ValueError: another name.
        """
        presets: dict[str, dict] = {"paper": {}, "robust": ROBUST}
        if name not in presets:
            raise ValueError(f"preset must be one of {tuple(presets)}; got {name!r}.")
        return cls(**presets[name] | changes)

    @property
    def settings(self) -> AdoreSettings:
        """Those of the cache."""
        return AdoreSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(AdoreSettings)})

    @property
    def num_labelled(self) -> int:
        """K, `label_k` or what stands for it."""
        return min(LABELLED, self.cache_size) if self.label_k is None else self.label_k

    def validate_architecture(self):
        """Refuse settings that mean nothing, naming the value and the rule."""
        self.settings  # noqa: B018 (checks its own values)
        check_choices({name: getattr(self, name) for name in CHOICES})
        for name in ("controller_hidden", "controller_mlp_layers", "label_k", "label_horizon"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if self.controller_hidden % 2:
            raise ValueError(f"controller_hidden must be even, for sines and cosines; got {self.controller_hidden}.")
        if self.num_labelled > self.cache_size:
            raise ValueError(
                f"label_k must be at most cache_size = {self.cache_size}, or the cache cannot hold what it is taught "
                f"to keep; got {self.label_k}."
            )
        if self.score_mode == "static" and self.label_horizon != 1:
            raise ValueError(
                "Static scores are trained on the share of all later queries: label_horizon must be 1 with "
                f"score_mode 'static'; got {self.label_horizon}."
            )
        layers = self.base_config.num_hidden_layers
        if any(type(i) is not int or not 0 <= i < layers for i in self.label_layers):
            raise ValueError(
                f"label_layers must be layer indices from 0 to {layers - 1}; got {list(self.label_layers)}."
            )
        if self.score_mode == "static" and self.rebuild > 0:
            warn_of_fixed_order("score_mode 'static'", self.settings)


__all__ = ["AdoreConfig"]
