"""Sizes of an SSD language model."""

import contextlib
import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from scrubjay.configuration.cache_names import CACHE_NAMES
from scrubjay.configuration.mamba2_configs import fields_from, layout_of, refuse_variants
from scrubjay.configuration.named_sizes import MAMBA2, named
from scrubjay.configuration.ssd_attention import attention_sizes, check_attention
from scrubjay.configuration.tested_versions import tell_of_untested

tell_of_untested()
MULTIPLE = 128  # the authors round the width of an MLP up to a multiple of this


@strict
class SSDSizes(PreTrainedConfig):
    """Sizes of SSD (Mamba-2) blocks, of whichever model they are part; each model's class says what they mean."""

    keys_to_ignore_at_inference = list(CACHE_NAMES)

    base_model_tp_plan = {
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.out_proj": "rowwise_split_input",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50288
    hidden_size: int = 768
    num_hidden_layers: int = 24
    state_size: int = 128
    expand: int | float = 2
    num_heads: int | None = None
    head_dim: int | None = None
    n_groups: int = 1
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    chunk_size: int = 64
    hidden_act: str = "silu"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    time_step_limit: list | tuple | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    A_initializer_range: list | tuple = (1.0, 16.0)
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers.

        Raises:
            ValueError: Mistral's own layout, which transformers cannot load.
        """
        found, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not found and "_configuration_file" not in kwargs:
            kwargs |= {"_configuration_file": "params.json"}
            other = {}
            with contextlib.suppress(OSError):  # there is none: an empty config.json means the defaults
                other, _ = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            if layout_of(other) == "codestral":
                raise ValueError(
                    f"{pretrained_model_name_or_path} has Mistral's params.json and no config.json, which transformers "
                    f"needs to load it. Make a folder that loads: scrubjay convert {pretrained_model_name_or_path} NEW"
                )
        return found, rest

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; the dictionary may be another library's configuration of a Mamba-2 model."""
        if layout_of(config_dict) is not None:
            config_dict = fields_from(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)
        refuse_variants(kwargs)
        inner = self.inner_size
        if self.head_dim is None and self.num_heads is not None and self.num_heads > 0:
            self.head_dim = inner // self.num_heads
        if self.head_dim is None:
            self.head_dim = next(size for size in (64, 32, 16, 8, 4, 2, 1) if inner % size == 0)
        if self.num_heads is None:
            self.num_heads = inner // max(self.head_dim, 1)
        # Published files write infinity as a bare JSON word, as {"__float__": "Infinity"}, or leave the field out.
        self.time_step_limit = numbers("time_step_limit", self.time_step_limit or (0.0, math.inf))
        self.A_initializer_range = numbers("A_initializer_range", self.A_initializer_range)
        super().__post_init__(**kwargs)

    @property
    def inner_size(self) -> int:
        """Width of the values, num_heads * head_dim."""
        return int(self.expand * self.hidden_size) if 0 < self.expand < math.inf else 0

    @property
    def conv_size(self) -> int:
        """Channels that are convolved: values, keys and queries."""
        return self.inner_size + 2 * self.n_groups * self.state_size

    def _at_least_1(self, *names):
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def validate_architecture(self):
        """Refuse sizes that do not fit each other, naming the value and the rule."""
        self._at_least_1("vocab_size", "hidden_size", "num_hidden_layers", "state_size")
        if self.inner_size < 1:
            raise ValueError(f"expand must be finite and expand * hidden_size at least 1; got {self.expand}.")
        self._at_least_1("num_heads", "head_dim", "n_groups", "conv_kernel", "chunk_size")
        if self.num_heads * self.head_dim != self.inner_size:
            raise ValueError(
                f"num_heads * head_dim must equal expand * hidden_size; got {self.num_heads} * {self.head_dim} = "
                f"{self.num_heads * self.head_dim} and {self.expand} * {self.hidden_size} = {self.inner_size}."
            )
        if self.num_heads % self.n_groups:
            raise ValueError(f"n_groups must divide num_heads = {self.num_heads}; got {self.n_groups}.")
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(f'hidden_act must be "silu", the activation of the paper; got {self.hidden_act!r}.')
        if not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon must be positive; got {self.layer_norm_epsilon}.")
        for name in ("time_step_limit", "A_initializer_range"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
                raise ValueError(f"{name} must be a pair (low, high) with 0 <= low <= high; got {pair}.")
        if not 0 < self.time_step_min <= self.time_step_max or not self.time_step_floor > 0:
            raise ValueError(
                "The initial step sizes need 0 < time_step_min <= time_step_max and 0 < time_step_floor; got "
                f"{self.time_step_min}, {self.time_step_max} and {self.time_step_floor}."
            )


def numbers(name: str, value) -> list[float]:
    """As floats; {"__float__": "Infinity"} is how transformers writes what JSON cannot."""
    try:
        return [float(x["__float__"] if isinstance(x, dict) else x) for x in value]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"{name} must be a pair of numbers (low, high); got {value!r}.") from None


@strict
class SSDConfig(SSDSizes):
    r"""Sizes of an SSD language model (Mamba-2, arXiv:2405.21060), plain or hybrid.

    Names are those of transformers' `Mamba2Config`, and of the authors' configuration where that has none. A hybrid has
    attention in the place of some mixers (`attn_layer_idx`), an MLP after every mixer and attention layer
    (`intermediate_size`), or both.

    Args:
        vocab_size: rows of the embedding. 50277 rounded up to a multiple of 16 in the published models.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks, those of attention among them.
        attn_layer_idx: places of the attention layers, rising, from 0. Empty: none. The paper's hybrids have about one
            in ten blocks, evenly spread: 9, 18, 27, 36, 45 and 56 of 64 in mamba2attn-2.7b.
        attn_cfg: sizes of the attention layers by the authors' names: num_heads, num_heads_kv, head_dim, d_conv,
            rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, qkv_proj_bias, out_proj_bias, softmax_scale,
            causal, mlp_dim; what each means stands in `ssd_attention.py`. What is left out is derived from the width
            in the proportions of mamba2attn-2.7b, and is in the field afterwards.
        intermediate_size: width of a gated MLP after every block, rounded up to a multiple of 128 (`mlp_size`), as the
            authors' code does. 0: none. Their name for it, d_intermediate, is taken too.
        state_size: N, key and query width of the recurrent state, per head. 128 in the paper.
        expand: inner width over `hidden_size`; the inner width is num_heads * head_dim.
        num_heads: H. None derives it from `head_dim`.
        head_dim: P, value width per head. None is the largest of 64, 32, ... that divides the inner width.
        n_groups: G, groups of heads that share keys and queries; divides `num_heads`. 1 in most published models, 8 in
            Codestral.
        conv_kernel: taps of the causal convolution.
        use_conv_bias, use_bias: bias of the convolution; of the input and output projections.
        chunk_size: steps solved as one product. Changes speed, never the result beyond rounding.
        hidden_act: activation after the convolution and of the gate; "silu" is the one that the paper defines.
        layer_norm_epsilon: added to the mean square in every norm.
        residual_in_fp32: keep the residual stream in float32 whatever the dtype of the weights is.
        time_step_limit: (low, high), clamp of the step size after softplus, in whole sequences and in single steps.
        time_step_min, time_step_max, time_step_floor: range from which the initial step sizes are drawn (log-uniform),
            and their floor.
        A_initializer_range: (low, high), range from which the initial decay rates are drawn (uniform).
        initializer_range: standard deviation of the initial embedding.
        rescale_prenorm_residual: divide the initial last projections of mixers, attention layers and MLPs by
            sqrt(num_hidden_layers).
        use_cache: whether forward returns a cache by default.
    """

    model_type = "scrubjay_ssd"
    attribute_map = {"d_intermediate": "intermediate_size"}

    attn_layer_idx: list | tuple | None = None
    attn_cfg: dict | None = None
    intermediate_size: int = 0

    @classmethod
    def published(cls, name: str, **changes) -> "SSDConfig":
        """Sizes of a published model, some of them changed: "130m", "370m", "780m", "1.3b", "2.7b", "2.7b-hybrid" (of
        the authors), "codestral-7b" (of Mistral).

        Raises:
            ValueError: another name.
        """
        return cls(**named(MAMBA2, name, changes))

    def __post_init__(self, **kwargs):
        if (theirs := kwargs.pop("d_intermediate", None)) is not None:
            self.intermediate_size = theirs
        self.attn_layer_idx = list(self.attn_layer_idx or ())
        self.attn_cfg = dict(self.attn_cfg or {})
        if self.attn_layer_idx and self.hidden_size > 0:
            self.attn_cfg = attention_sizes(self.attn_cfg, self.hidden_size)
        if self.intermediate_size:  # transformers warns of a plan for what is not there
            mlp = {"layers.*.mlp.fc1": "packed_colwise", "layers.*.mlp.fc2": "rowwise"}
            self.base_model_tp_plan = type(self).base_model_tp_plan | mlp
        super().__post_init__(**kwargs)

    @property
    def paper(self) -> dict:
        """Name, title, arXiv number, and what the sources leave open, by field: nothing."""
        parts = ["attention"] * bool(self.attn_layer_idx) + ["MLPs"] * bool(self.intermediate_size)
        return {
            "name": "SSD (Mamba-2)" + (f" with {' and '.join(parts)}" if parts else ""),
            "title": "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State "
            "Space Duality",
            "arxiv": "2405.21060",
            "open": {},
        }

    @property
    def mlp_size(self) -> int:
        """Width of the MLPs; 0 without."""
        return -(-self.intermediate_size // MULTIPLE) * MULTIPLE

    def validate_architecture(self):
        """Refuse sizes that do not fit each other, naming the value and the rule."""
        super().validate_architecture()
        if self.intermediate_size < 0:
            raise ValueError(f"intermediate_size must be at least 0; got {self.intermediate_size}.")
        places, last = list(self.attn_layer_idx), self.num_hidden_layers - 1
        if wrong := [place for place in places if type(place) is not int or not 0 <= place <= last]:
            raise ValueError(
                f"attn_layer_idx must name blocks, 0 to {last} of num_hidden_layers = {last + 1}; got {wrong[0]!r} "
                f"among {places}."
            )
        if sorted(set(places)) != places:
            raise ValueError(f"attn_layer_idx must rise, each place once; got {places}.")
        if places:
            check_attention(attention_sizes(self.attn_cfg, self.hidden_size))
        elif self.attn_cfg:
            attention_sizes(self.attn_cfg, self.hidden_size)


__all__ = ["SSDConfig", "SSDSizes"]
