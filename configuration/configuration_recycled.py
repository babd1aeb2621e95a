"""Settings of Recycled Attention beside the sizes of a decoder."""

from huggingface_hub.dataclasses import strict

from scrubjay.configuration.configuration_wrapped import WrappedConfig

POLICIES = ("recycled", "lowrank", "quest", "snapkv", "h2o", "tova", "streaming", "full")
HOLDING = ("recycled", "lowrank", "quest", "full")  # which forget no key
HELD = ("recycled", "lowrank", "full")  # of them, those that can hold their keys elsewhere or in few bits
CHOICES = {
    "policy": POLICIES,
    "schedule": ("fixed", "dynamic"),
    "group_reduce": ("max", "mean", "first"),
    "qsim_space": ("pre", "post"),
    "qsim_batch": ("any", "all"),
    "rope_mode": ("absolute", "cache"),
    "hold": ("device", "host"),
    "hold_bits": (None, 8, 4),
}


@strict
class RecycledConfig(WrappedConfig):
    r"""A decoder whose decode steps attend a few recycled keys (RefreshKV / Recycled Attention, arXiv:2411.05787).

    The method leaves some choices open; where the paper says nothing, the default is marked (ours).

    Args:
        base_config: the decoder, see `WrappedConfig`.
        budget: K, keys that a partial step attends in each layer and key head.
        stride: S, under the fixed schedule every S-th decode step attends all keys and chooses anew. 1: every step.
        schedule: "fixed", or "dynamic": every `qc`-th step each layer compares its query with that of its last full
            step, and attends all keys if their cosine is `threshold` or less.
        qc, threshold: steps between checks; cosine above which a layer stays partial. The paper's 5 or 10; 0.85 for
            Llama-3.1-8B, 0.95 for Qwen2-7B.
        policy: "recycled". Others with the same budget, which also hold all keys: "lowrank" (ours: every step attends
            the keys of the highest scores in `rank` directions), "quest" (every step attends the pages of `page` keys
            with the highest bounds, arXiv:2406.10774), "full" (all keys). And those that forget keys: "snapkv" (of the
            prompt what its last `window` queries attend, once; all tokens after it, arXiv:2404.14469), "h2o" (half the
            most attended so far, half the newest, arXiv:2306.14048), "tova" (what the last query attended least goes,
            arXiv:2401.06104), "streaming" (`n_sink` first tokens and the newest; 4 where `n_sink` is 0,
            arXiv:2309.17453).
        rank: of "lowrank": directions; of a head with fewer dimensions all.
        choosing_layers: of "lowrank": indices of the layers that choose at every step, the others being those of
            "recycled"; None: all choose.
        page: of "quest": keys of a page; the budget has room for two at least.
        window: of "snapkv": queries at the prompt's end that choose, and tokens there that are kept whatever they
            score; half the budget where that is less.
        pool_kernel: of "recycled" and "snapkv": odd number of neighbours over which a score is the largest. 7 in the
            paper; 1: none.
        group_reduce: over the query heads that share a key head: "max" (the paper's), "mean", "first".
        keep_recent: newest tokens that are kept whatever they score (ours: 1, as SnapKV with a window of one).
        n_sink: first tokens that are kept and never evicted (0 in the paper).
        evict_first: the new token takes the place of the lowest, so that exactly K keys are attended (ours); False
            attends K + 1, as the paper's pseudo-code does.
        full_output: a full step's output attends all keys; False: the keys just chosen (the paper's ablation).
        qsim_space: compare queries before ("pre", ours) or after ("post") the rotary encoding, which alone turns the
            same query by more than most thresholds within a few steps.
        qsim_batch: a layer takes a full step if "any" (ours) or "all" rows of the batch ask for it.
        rope_mode: of "streaming": tokens keep their "absolute" positions (ours: alike for all policies), or are counted
            within the "cache", as in StreamingLLM: then a text may grow beyond the length that the model knows.
        train_tail: S of the paper's continued pre-training (50 there): in train mode the last S tokens of each row see
            themselves and the `budget` keys that the token before them chooses. 0: ordinary attention.
        full_layers: indices of layers that attend all keys at every step (none in the paper).
        hold: where "recycled", "lowrank" and "full" hold all keys and values (ours): on the "device", or in the memory
            of the "host", from where a full step reads them in pages, and those chosen are fetched.
        hold_bits: in which those three hold them (ours): 8 or 4, as KIVI rounds them (arXiv:2402.02750), by half a step
            of a group at most (`kernels/pages.py`), but for the newest 64 to 95; None: the model's dtype. With
            hold="host" the few bits lie on the device, full steps and choices read them, and keys that were chosen are
            exact.
    """

    model_type = "scrubjay_recycled"
    paper = {
        "name": "Recycled Attention (RefreshKV)",
        "title": "RefreshKV: Updating Small KV Cache During Long-form Generation",
        "arxiv": "2411.05787",
        "open": {
            "evict_first": "whether the new token takes a place in the budget before or after the step",
            "keep_recent": "newest tokens that are kept whatever they score",
            "qsim_space": "whether queries are compared before or after the rotary encoding",
            "qsim_batch": "what a batch does when its rows disagree",
        },
    }

    budget: int = 2048
    stride: int = 10
    schedule: str = "fixed"
    qc: int = 5
    threshold: float = 0.85
    policy: str = "recycled"
    rank: int = 16
    page: int = 16
    window: int = 32
    pool_kernel: int = 7
    group_reduce: str = "max"
    keep_recent: int = 1
    n_sink: int = 0
    evict_first: bool = True
    full_output: bool = True
    qsim_space: str = "pre"
    qsim_batch: str = "any"
    rope_mode: str = "absolute"
    train_tail: int = 0
    full_layers: list | tuple = ()
    choosing_layers: list | tuple | None = None
    hold: str = "device"
    hold_bits: int | None = None

    def validate_architecture(self):
        """Refuse settings that mean nothing, naming the value and the rule."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}.")
        for name in ("budget", "stride", "qc", "rank", "page", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.pool_kernel < 1 or self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel must be odd and at least 1; got {self.pool_kernel}.")
        if self.keep_recent < 0 or self.n_sink < 0 or max(self.recent, 1) + self.sinks > self.budget:
            raise ValueError(
                "keep_recent (for h2o half the budget; at least the new token) and n_sink must be 0 or more and fit "
                f"the budget together; got {self.recent} + {self.sinks} and a budget of {self.budget}."
            )
        if self.policy == "quest" and self.budget < 2 * self.page:
            raise ValueError(
                f"policy='quest' reads whole pages, and the budget must hold two of them; got budget={self.budget} and "
                f"page={self.page}."
            )
        if (self.hold == "host" or self.hold_bits) and self.policy not in HELD:
            raise ValueError(
                f"hold='host' and hold_bits are for the policies {HELD}; with policy={self.policy!r} use hold='device' "
                f"and hold_bits=None; got hold={self.hold!r} and hold_bits={self.hold_bits}."
            )
        if self.train_tail < 0 or (self.train_tail and self.policy != "recycled"):
            raise ValueError(
                "train_tail must be 0 or more, and other policies than 'recycled' have no such training; got "
                f"{self.train_tail} and {self.policy!r}."
            )
        if self.rope_mode == "cache" and self.policy != "streaming":
            raise ValueError(
                "rope_mode='cache' numbers sinks and a window anew, which policy='streaming' alone keeps; got "
                f"{self.policy!r}."
            )
        kind = (getattr(self.base_config, "rope_parameters", None) or {}).get("rope_type", "default")
        if self.rope_mode == "cache" and kind in ("dynamic", "longrope"):
            raise ValueError(f"rope_mode='cache' turns keys by fixed frequencies; those of rope_type {kind!r} change.")
        layers = self.base_config.num_hidden_layers
        for name in ("full_layers", "choosing_layers"):
            listed = getattr(self, name) or ()
            if any(not isinstance(i, int) or not 0 <= i < layers for i in listed):
                raise ValueError(f"{name} must be layer indices from 0 to {layers - 1}; got {list(listed)}.")

    @property
    def recent(self) -> int:
        """Newest tokens that are kept whatever they score."""
        if self.policy == "snapkv":
            return max(self.keep_recent, min(self.window, self.budget // 2))
        return self.budget // 2 if self.policy == "h2o" else self.keep_recent

    @property
    def sinks(self) -> int:
        """First tokens that are never evicted."""
        return 4 if self.policy == "streaming" and self.n_sink == 0 else self.n_sink


__all__ = ["RecycledConfig"]
