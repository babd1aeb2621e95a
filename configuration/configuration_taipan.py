"""Sizes of a Taipan language model."""

import math

from huggingface_hub.dataclasses import strict

from scrubjay.configuration.cache_names import CACHE_NAMES
from scrubjay.configuration.configuration_ssd import SSDSizes
from scrubjay.configuration.named_sizes import TAIPAN, named
from scrubjay.configuration.starts import initial_std

CHOICES = {
    "kv_scope": ("all", "selected"),
    "window_axis": ("position", "rank"),
    "st_surrogate": ("p1", "chosen"),
    "train_attention": ("dense", "compact"),
    "train_gate": ("sample", "argmax"),
    "eval_gate": ("argmax", "sample"),
    "gate_bias_init": ("zero", "capacity"),
    "budget_reduction": ("sequence", "batch"),
    "refine": ("convex", "residual"),
    "sal_pos": ("none", "rope"),
}


@strict
class TaipanConfig(SSDSizes):
    r"""Sizes of a Taipan language model (arXiv:2410.18572): Mamba-2 blocks, and between them selective attention.

    A layer is a Mamba-2 (SSD) block or a selective attention layer; `num_hidden_layers` counts both. Layer i is
    selective where i + 1 is a multiple of `attention_every` + 1; a model too shallow for that has one, its last layer.

    What the paper leaves open has a field here with its alternatives, the default first.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: Mamba-2 blocks and selective layers together.
        attention_every: K, Mamba-2 blocks before each selective layer. 6 in the paper.
        num_attention_heads: query heads. None: as many as `attention_head_dim` fits into `hidden_size`.
        num_key_value_heads: heads of keys and values; None is one per query head. Query head h reads head
            h * num_key_value_heads // num_attention_heads, the grouped order of transformers.
        attention_head_dim: channels of an attention head. None is the largest of 64, 32, ... that divides
            `hidden_size` (or hidden_size // num_attention_heads where heads are given).
        sliding_window: w, keys that a query sees, its own included. 2048 in the paper.
        intermediate_size: width of the feed-forward network of a selective layer. None is 8/3 hidden_size, rounded up
            to a multiple of 64.
        capacity: C, share of tokens that the gate is trained to select. 0.15 in the paper.
        kv_scope: "all": every token writes keys and values. "selected": only selected ones do.
        window_axis: the window counts "position"s, or the "rank" of a token among those that wrote keys, which is the
            same where every token writes.
        kv_cap: n > 0 shows a query only the n newest keys; 0 is off.
        gate_hidden: inner width of the gate's SiLU network; 0 is a linear gate.
        gate_norm: whether the gate reads RMSNorm(h) or the residual stream as it is.
        gate_bias_init: initial bias of the gate: "zero" starts at a rate of 1/2, "capacity" at C.
        st_surrogate: what stands for the hard choice in the backward pass: "p1", the soft probability of being
            selected, or "chosen", that of what was drawn (equation 3 as printed), as a factor of the chosen branch's
            output; no branch but the chosen one is then computed in training, and the budget takes p1 all the same.
        train_attention: "dense" attends for every token in training, so that the gate of an unselected token learns
            what attention would have done; "compact" attends for selected ones alone.
        train_gate: "sample" draws in training: a token is selected with probability a, and two passes over the same
            text differ. So does a policy in training from a reference with the same weights in evaluation: DPO of the
            two does not start at ln 2. "argmax" draws nothing and selects as evaluation by "argmax" does,
            `eval_threshold` included; the forward values are those of evaluation, bit for bit where `train_attention`
            is "compact", and as far as sums in another order round where it is "dense". The surrogate's gradient
            remains.
        gumbel_tau: temperature of the surrogate; read at each step, so that it can be annealed. The choice itself does
            not depend on it.
        budget_lambda: weight of the budget loss.
        budget_reduction: the budget is squared per "sequence", then averaged, or taken of the whole "batch" at once.
        refine: "convex": (1 - a) h + a o; "residual": h + a o.
        refine_first: whether queries read (1 - a) RMSNorm(h) instead of RMSNorm(h).
        sal_post_norm: whether an RMSNorm follows the output projection of the attention.
        sal_pos: positions in selective attention: "none" (the paper's) or "rope".
        rope_theta: base of the rotary encoding.
        mamba_mlp: whether each Mamba-2 block is followed by a feed-forward network.
        eval_gate: at inference select by "argmax" or "sample": with the noise of training, a token is selected with
            probability sigmoid(delta - logit(eval_threshold)), a where the threshold is 0.5.
        eval_threshold: a token is selected at inference where a is greater; 0.5 is the argmax. One number for all
            selective layers, or a list of one for each, in order. The rate at inference is not the capacity;
            `TaipanForCausalLM.calibrate` sets these so that it is, in every layer.
        state_size: N, key and query width of the recurrent state, per head.
        expand: inner width of a Mamba-2 block over `hidden_size`.
        num_heads: H, heads of a Mamba-2 block. None derives it from `head_dim`.
        head_dim: P, value width per head of a Mamba-2 block. None is the largest of 64, 32, ... that divides the
            inner width.
        n_groups: G, groups of Mamba-2 heads that share keys and queries; divides `num_heads`.
        conv_kernel: taps of the causal convolution.
        use_conv_bias, use_bias: bias of the convolution; of the Mamba-2 blocks' projections.
        chunk_size: steps solved as one product. Changes speed, never the result beyond rounding.
        hidden_act: activation after the convolution and of the gate behind it; "silu" is the one that Mamba-2 defines.
        layer_norm_epsilon: added to the mean square in every norm.
        residual_in_fp32: keep the residual stream in float32 whatever the dtype of the weights is.
        time_step_limit: (low, high), clamp of the step size after softplus, in whole sequences and in single steps.
        time_step_min, time_step_max, time_step_floor: range from which the initial step sizes are drawn (log-uniform),
            and their floor.
        A_initializer_range: (low, high), range from which the initial decay rates are drawn (uniform).
        initializer_range: standard deviation of the initial embedding, gate, attention and feed-forward networks.
            None is 0.02 * max(1, 2048 / hidden_size) ** 0.5: 0.02 at the width of the largest reconstructed model, and
            below it what gives scores of attention the same variance. From 0.02 at width 64 a query sees all keys
            alike and the feed-forward network gives next to nothing (tests/modeling/test_starts_by_width.py).
        rescale_prenorm_residual: divide the initial output projections of Mamba-2 blocks by sqrt(num_hidden_layers), as
            its authors do, those of attention and feed-forward networks by sqrt(number of residual branches).
        use_cache: whether forward returns a cache by default.
    """

    model_type = "scrubjay_taipan"
    paper = {
        "name": "Taipan",
        "title": "Taipan: Efficient and Expressive State Space Language Models with Selective Attention",
        "arxiv": "2410.18572",
        "open": {
            "kv_scope": "which tokens of the window give keys and values",
            "window_axis": "whether the window counts positions or tokens that wrote keys",
            "gate_hidden": "shape of the gate; 0 is linear",
            "gate_norm": "whether the gate reads normalised hidden states",
            "gate_bias_init": "initial bias of the gate",
            "st_surrogate": "what the backward pass sees of a hard choice; equation 3 as printed pushes tokens that "
            "were not selected the wrong way",
            "train_attention": "whether attention is computed for unselected tokens in training",
            "gumbel_tau": "temperature",
            "budget_lambda": "weight of the budget loss",
            "budget_reduction": "over what the share of selected tokens is taken",
            "refine_first": "whether queries read the hidden state before or after its refinement",
            "sal_post_norm": "norms of a selective layer",
            "attention_head_dim": "size of an attention head",
            "num_key_value_heads": "heads of keys and values",
            "intermediate_size": "width of the feed-forward network",
            "mamba_mlp": "whether a Mamba-2 block has a feed-forward network",
            "eval_gate": "the choice at inference",
            "eval_threshold": "its threshold, of all selective layers or of each",
        },
    }
    keys_to_ignore_at_inference = [*CACHE_NAMES, "budget_loss", "selection", "sequence_selection"]

    base_model_tp_plan = {
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.out_proj": "rowwise_split_input",
        "layers.*.attn.q_proj": "colwise_gather_output",
        "layers.*.attn.k_proj": "colwise_gather_output",
        "layers.*.attn.v_proj": "colwise_gather_output",
        "layers.*.attn.o_proj": "rowwise_split_input",
        "layers.*.ffn.fc": "packed_colwise",
        "layers.*.ffn.out_proj": "rowwise",
    }

    num_hidden_layers: int = 21
    attention_every: int = 6
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    attention_head_dim: int | None = None
    sliding_window: int = 2048
    intermediate_size: int | None = None
    initializer_range: float | None = None  # type: ignore[assignment]  # a number once there is a configuration
    capacity: float = 0.15
    kv_scope: str = "all"
    window_axis: str = "position"
    kv_cap: int = 0
    gate_hidden: int = 0
    gate_norm: bool = True
    gate_bias_init: str = "zero"
    st_surrogate: str = "p1"
    train_attention: str = "dense"
    train_gate: str = "sample"
    gumbel_tau: float = 1.0
    budget_lambda: float = 1.0
    budget_reduction: str = "sequence"
    refine: str = "convex"
    refine_first: bool = False
    sal_post_norm: bool = False
    sal_pos: str = "none"
    rope_theta: float = 10000.0
    mamba_mlp: bool = False
    eval_gate: str = "argmax"
    eval_threshold: float | list[float] = 0.5
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.attention_head_dim is None:
            heads = self.num_attention_heads
            sizes = (64, 32, 16, 8, 4, 2, 1) if heads is None else (self.hidden_size // max(heads, 1),)
            self.attention_head_dim = next(size for size in sizes if heads is not None or self.hidden_size % size == 0)
        if self.num_attention_heads is None:
            self.num_attention_heads = max(self.hidden_size // max(self.attention_head_dim, 1), 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.initializer_range is None:
            self.initializer_range = initial_std(self.hidden_size)
        super().__post_init__(**kwargs)

    @classmethod
    def reconstructed(cls, name: str, **changes) -> "TaipanConfig":
        """Sizes of "190M", "450M" or "1.3B" with the numbers of parameters in those names.

        A reconstruction: the paper gives no sizes. These are round ones, with tied embeddings of Llama 3's vocabulary,
        that give 187.5, 444.9 and 1291.2 million parameters.

        Raises:
            ValueError: another name.
        """
        return cls(**named(TAIPAN, name, changes))

    @property
    def selective_layers(self) -> tuple[int, ...]:
        """Indices of the selective attention layers."""
        unit = self.attention_every + 1
        return tuple(range(unit - 1, self.num_hidden_layers, unit)) or (self.num_hidden_layers - 1,)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """`eval_threshold` of each selective layer.

        Raises:
            ValueError: a list of another length, or a threshold that is not between 0 and 1: it may have been set since
                the configuration was made.
        """
        layers = len(self.selective_layers)
        given = [self.eval_threshold] * layers if isinstance(self.eval_threshold, float) else self.eval_threshold
        if wrong := [value for value in given if not 0 < value < 1]:
            raise ValueError(f"eval_threshold must lie between 0 and 1; got {wrong[0]}.")
        if len(given) != layers:
            raise ValueError(
                f"eval_threshold must be one number, or a list of {layers}, one for each selective layer "
                f"{self.selective_layers}; got {len(given)}: {given}."
            )
        return tuple(given)

    @property
    def rotary_dim(self) -> int:
        """Channels of an attention head that are turned: all, or all but one of an odd number; 0 without positions."""
        return (self.attention_head_dim or 0) // 2 * 2 if self.sal_pos == "rope" else 0

    @property
    def ring_size(self) -> int:
        """Keys that a selective layer has to hold: any older one is out of every later query's sight."""
        return min(self.sliding_window, self.kv_cap) if self.kv_cap else self.sliding_window

    @property
    def num_branches(self) -> int:
        """Residual branches of the whole model."""
        selective = len(self.selective_layers)
        return 2 * selective + (1 + self.mamba_mlp) * (self.num_hidden_layers - selective)

    def validate_architecture(self):
        """Refuse sizes that do not fit each other, naming the value and the rule."""
        super().validate_architecture()
        self._at_least_1("attention_every", "num_attention_heads", "num_key_value_heads", "attention_head_dim")
        self._at_least_1("sliding_window", "intermediate_size")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = {self.num_attention_heads}; "
                f"got {self.num_key_value_heads}."
            )
        for name in ("kv_cap", "gate_hidden"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}.")
        if not 0 < self.capacity < 1:
            raise ValueError(f"capacity must lie between 0 and 1; got {self.capacity}.")
        _ = self.thresholds  # which refuses those that there cannot be
        for name in ("gumbel_tau", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}.")
        if not 0 <= self.budget_lambda < math.inf:
            raise ValueError(f"budget_lambda must be finite and at least 0; got {self.budget_lambda}.")
        if self.sal_pos == "rope" and self.attention_head_dim < 2:
            raise ValueError(f'sal_pos="rope" needs attention_head_dim of at least 2; got {self.attention_head_dim}.')


__all__ = ["TaipanConfig"]
