"""Sizes of a Rodimus or Rodimus+ language model."""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from scrubjay.configuration.cache_names import CACHE_NAMES
from scrubjay.configuration.named_sizes import RODIMUS, named
from scrubjay.configuration.rodimus_configs import eights, fields_from, layout_of
from scrubjay.configuration.starts import initial_std
from scrubjay.configuration.tested_versions import tell_of_untested

tell_of_untested()

BLOCK_TYPES = ("rodimus", "rodimus_plus")
INPUT_GATES = ("low_rank", "full", "none")


@strict
class RodimusConfig(PreTrainedConfig):
    r"""Sizes of a Rodimus or Rodimus+ language model (arXiv:2410.06577).

    `temperature_gate`, `input_gate`, `short_conv` and `two_hop` switch parts off, as the paper's ablations do; the
    attention is ablated by its numbers of heads. modeling/README.md has a table of them.

    Args:
        block_type: "rodimus": the recurrent mixer alone. "rodimus_plus": the mixer, then sliding-window attention with
            one shared key head and a feed-forward network.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        expand: width of the mixer's values over `hidden_size`, rounded up to a multiple of 8.
        state_size: n, key width of the recurrent state ("mem_size"). 64 in the published models.
        conv_kernel: taps of the causal convolution.
        temperature_gate: whether the selection gate g has a temperature t: decays exp(-g t), keys times g^t. False:
            t = 1. Not called `temperature`, which `generate()` would take for its own.
        input_gate: the gate of the values: "low_rank", a "full" matrix, or "none", which leaves them as they are.
        input_gate_rank: inner width of the low-rank input gate. None is max(hidden_size // 64, 16).
        short_conv: whether queries, keys and their gates are made of the convolved stream and SiLU, or of the stream
            as it is: the convolution and its activation are one module in the authors' code, which fla leaves out.
        k_norm_eps: smallest norm by which a key is divided. 1e-12 in the first checkpoints, 1e-5 in the Coder ones.
        num_attention_heads: query heads of the window attention (rodimus_plus). None: heads of about 128 channels.
        num_key_heads: key heads; 1, shared by all query heads, is the paper's.
        num_value_heads: value heads; None is one per query head, as in the paper. Query head h reads key head
            h mod num_key_heads and value head h mod num_value_heads. 1 and 1: multi-query attention. As many of both
            as query heads: multi-head. In between: grouped, in the authors' order of heads, which is not that of
            transformers (h // heads a group).
        sliding_window: keys that a query sees, its own included. The official code's `window_size` W sees W // 2 + 1.
        rope_theta, rotary_dim, rope_interleaved: base of the rotary encoding; channels of a head that it turns (None:
            all, or all but one of an odd number; 0: none); whether it pairs neighbours instead of halves.
        intermediate_size: width of the feed-forward network. None is 4/3 hidden_size, rounded up to a multiple of 8.
        two_hop: whether the attention's output reaches the residual stream through the feed-forward network alone
            (rodimus_plus). False: both are added to it, as in a Transformer.
        scale_embedding: multiply embeddings by sqrt(state_size).
        norm_embedding: normalise embeddings before the first block.
        hidden_dropout, activation_dropout, attention_dropout: after each mixer, attention and feed-forward network;
            inside the mixer behind its norm; on attention weights.
        rms_norm_eps: added to the mean square in every norm.
        residual_in_fp32: keep the residual stream in float32 whatever the dtype of the weights is.
        chunk_size: steps solved as one product. Changes speed, never the result beyond rounding.
        initializer_range: standard deviation of the initial embeddings and of projections without a rule of their own.
            None is 0.02 * max(1, 2048 / hidden_size) ** 0.5: the authors' 0.02 from their width of 2048 on, and below
            it what gives projections outputs of the same size. From 0.02 at width 64 the bias of the convolution,
            which starts at up to 1/2 whatever the width is, swamps the tokens: keys of different tokens start with a
            mean cosine of 0.91, where they have 0.25 at 2048 (tests/modeling/test_starts_by_width.py).
        rescale_prenorm_residual: divide the initial output projections by sqrt(num_hidden_layers), rodimus_plus by
            sqrt(3 * num_hidden_layers).
        use_cache: whether forward returns a cache by default.
    """

    model_type = "scrubjay_rodimus"
    keys_to_ignore_at_inference = list(CACHE_NAMES)

    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    block_type: str = "rodimus_plus"
    vocab_size: int = 126464
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    expand: int | float = 2
    state_size: int = 64
    conv_kernel: int = 4
    temperature_gate: bool = True
    input_gate: str = "low_rank"
    input_gate_rank: int | None = None
    short_conv: bool = True
    k_norm_eps: float = 1e-12
    num_attention_heads: int | None = None
    num_key_heads: int = 1
    num_value_heads: int | None = None
    sliding_window: int = 2049
    rope_theta: float = 10000.0
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    intermediate_size: int | None = None
    two_hop: bool = True
    scale_embedding: bool = False
    norm_embedding: bool = False
    hidden_dropout: float = 0.0
    activation_dropout: float = 0.0
    attention_dropout: float = 0.0
    rms_norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    chunk_size: int = 16
    initializer_range: float | None = None
    rescale_prenorm_residual: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    @classmethod
    def published(cls, name: str, **changes) -> "RodimusConfig":
        """Sizes of a published model, some of them changed: "1.4b" (Rodimus), "plus-coder-1.6b", "plus-coder-4b"
        (Rodimus+).

        Raises:
            ValueError: another name.
        """
        return cls(**named(RODIMUS, name, changes))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; the file may be the authors' or fla's."""
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _translated(found, kwargs), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; the dictionary may be the authors' or fla's."""
        return super().from_dict(_translated(config_dict, kwargs), **kwargs)

    def __post_init__(self, **kwargs):
        if self.input_gate_rank is None:
            self.input_gate_rank = max(self.hidden_size // 64, 16)
        if self.intermediate_size is None:
            self.intermediate_size = eights(int(self.hidden_size * 4 / 3))
        if self.num_attention_heads is None:
            wanted = max(self.hidden_size // 128, 1)
            fits = [h for h in range(wanted, 0, -1) if self.hidden_size % (2 * h) == 0]
            self.num_attention_heads = fits[0] if fits else 1
        if self.num_value_heads is None:
            self.num_value_heads = self.num_attention_heads
        if self.rotary_dim is None:
            self.rotary_dim = self.hidden_size // max(self.num_attention_heads, 1) // 2 * 2
        if self.initializer_range is None:
            self.initializer_range = initial_std(self.hidden_size)
        if isinstance(kwargs.get("temperature"), bool):
            raise ValueError(
                f"temperature is a number that generate() samples with; got {kwargs['temperature']}. The switch of the "
                "gate is temperature_gate."
            )
        self.base_model_tp_plan = self._tp_plan()
        super().__post_init__(**kwargs)

    @property
    def paper(self) -> dict:
        """Name, title, arXiv number, and what the sources leave open, by field."""
        window = "keys that a query sees; the published code sees W // 2 + 1 for its `window_size` W"
        name = "Rodimus+" if self.has_attention else "Rodimus"
        return {
            "name": ", ".join([name, *self.ablations.values()]),
            "title": "Rodimus*: Breaking the Accuracy-Efficiency Trade-Off with Efficient Attentions",
            "arxiv": "2410.06577",
            "open": {"k_norm_eps": "smallest norm by which a key is divided; the published models differ"}
            | ({"sliding_window": window} if self.has_attention else {}),
        }

    @property
    def ablations(self) -> dict[str, str]:
        """What this model has otherwise than the paper's own, in words, by the field that says so."""
        gate = {"full": "full input gate", "none": "no input gate"}
        said = {
            "temperature_gate": "" if self.temperature_gate else "no temperature",
            "input_gate": gate.get(self.input_gate, ""),
            "short_conv": "" if self.short_conv else "no short convolution",
            "two_hop": "" if self.two_hop or not self.has_attention else "attention kept in the residual stream",
        }
        return {name: words for name, words in said.items() if words}

    @property
    def conv_window(self) -> int:
        """Steps before a token that its convolution reads, which a cache holds."""
        return self.conv_kernel - 1 if self.short_conv else 0

    @property
    def inner_size(self) -> int:
        """m, width of the mixer's values."""
        return eights(int(self.expand * self.hidden_size)) if 0 < self.expand < math.inf else 0

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // (self.num_attention_heads or 1)

    @property
    def has_attention(self) -> bool:
        """Whether blocks hold window attention and a feed-forward network."""
        return self.block_type == "rodimus_plus"

    def _tp_plan(self) -> dict[str, str]:
        """How transformers splits those parts of a block that this `block_type` has over several devices."""
        plan = {"layers.*.mixer.fc": "colwise_gather_output", "layers.*.mixer.out_proj": "rowwise_split_input"}
        if self.input_gate == "full":
            plan |= {"layers.*.mixer.ch_gate_up": "colwise_gather_output"}
        if self.has_attention:
            plan |= {f"layers.*.attn.{name}_proj": "colwise_gather_output" for name in "qv"}
            plan |= {"layers.*.attn.o_proj": "rowwise_split_input"}
            plan |= {"layers.*.ffn.fc": "packed_colwise", "layers.*.ffn.out_proj": "rowwise"}
        return plan

    def _at_least_1(self, *names):
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def validate_architecture(self):
        """Refuse sizes that do not fit each other, naming the value and the rule."""
        for name, allowed in (("block_type", BLOCK_TYPES), ("input_gate", INPUT_GATES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}.")
        self._at_least_1("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "chunk_size")
        if self.inner_size < 1:
            raise ValueError(f"expand must be finite and expand * hidden_size at least 1; got {self.expand}.")
        self._at_least_1("input_gate_rank", "num_attention_heads", "num_key_heads", "num_value_heads")
        self._at_least_1("sliding_window", "intermediate_size")
        for name in ("rms_norm_eps", "k_norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("hidden_dropout", "activation_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        if self.has_attention:
            self._validate_attention()

    def _validate_attention(self):
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ValueError(f"num_attention_heads must divide hidden_size = {self.hidden_size}; got {heads}.")
        for name in ("num_key_heads", "num_value_heads"):
            if heads % getattr(self, name):
                raise ValueError(f"{name} must divide num_attention_heads = {heads}; got {getattr(self, name)}.")
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and at most head_dim = {self.head_dim}; got {self.rotary_dim}.")


def _translated(config, given):
    """A configuration in our fields, some of which are given beside it."""
    return config if layout_of(config) is None else fields_from(config, given)


__all__ = ["RodimusConfig"]
