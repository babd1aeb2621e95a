"""Sizes of the attention layers of a hybrid SSD model, by the names of the authors' `attn_cfg`.

num_heads, num_heads_kv, head_dim   query heads, heads of keys and values (a divisor), channels of each
d_conv                              taps of the causal convolution over queries, keys and values; 0: none
rotary_emb_dim, rotary_emb_base     first channels of a head that are turned, even, and the base of their angles
rotary_emb_interleaved              whether channel 2 i is paired with 2 i + 1, or i with i + rotary_emb_dim / 2
qkv_proj_bias, out_proj_bias        whether the projections have a bias
softmax_scale                       of the scores; None is head_dim ** -0.5
causal                              True: a language model does not see what follows
mlp_dim                             width of a gated network beside the attention, in the same projections; 0: none
"""

from typing import Any

FIXED: dict[str, Any] = {
    "d_conv": 4,
    "rotary_emb_base": 10000.0,
    "rotary_emb_interleaved": False,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "softmax_scale": None,
    "causal": True,
    "mlp_dim": 0,
}
KNOWN = ("num_heads", "num_heads_kv", "head_dim", "rotary_emb_dim", *FIXED)
COUNTS = ("num_heads", "num_heads_kv", "head_dim")
NOT_NEGATIVE = ("d_conv", "rotary_emb_dim", "mlp_dim")
BESIDE = 256  # the authors round `mlp_dim` up to a multiple of this


def attention_sizes(given: dict, hidden_size: int) -> dict[str, Any]:
    """`given` with every size: what is left out fits the width, in the proportions of the published hybrid.

    That one, mamba2attn-2.7b, has width 2560, 30 heads of 128, 64 channels turned, a convolution of 4 and no biases:
    heads as wide as 1.5 times the model, so that a layer has the parameters of an SSD block. The authors' own defaults,
    of whoever writes a configuration for their code, are others: no convolution, nothing turned, biases.

    Raises:
        ValueError: a name that is not known.
    """
    if unknown := sorted(set(given) - set(KNOWN)):
        raise ValueError(f"attn_cfg has fields of unknown meaning: {', '.join(unknown)}. Known are {sorted(KNOWN)}.")
    sizes = FIXED | {name: value for name, value in given.items() if value is not None}
    if "head_dim" not in sizes and "num_heads" in sizes:
        sizes["head_dim"] = _divided(hidden_size, sizes["num_heads"])
    if "head_dim" not in sizes:
        sizes["head_dim"] = next((size for size in (128, 64, 32, 16, 8, 4) if 4 * size <= hidden_size), 2)
    if "num_heads" not in sizes:
        sizes["num_heads"] = max(1, round(1.5 * hidden_size / max(sizes["head_dim"], 1)))
    sizes.setdefault("num_heads_kv", sizes["num_heads"])
    sizes.setdefault("rotary_emb_dim", sizes["head_dim"] // 4 * 2)
    return sizes


def check_attention(sizes: dict[str, Any]) -> None:
    """Refuse sizes that do not fit each other.

    Raises:
        ValueError: the value and the rule.
    """
    for names, least in ((COUNTS, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            if type(sizes[name]) is not int or sizes[name] < least:
                raise ValueError(f"attn_cfg.{name} must be a whole number of at least {least}; got {sizes[name]!r}.")
    heads, shared, size, turned = (sizes[name] for name in (*COUNTS, "rotary_emb_dim"))
    if heads % shared:
        raise ValueError(f"attn_cfg.num_heads_kv must divide attn_cfg.num_heads = {heads}; got {shared}.")
    if turned % 2 or turned > size:
        raise ValueError(f"attn_cfg.rotary_emb_dim must be even and at most head_dim = {size}; got {turned}.")
    if sizes["causal"] is not True:
        raise ValueError(
            f"attn_cfg.causal is {sizes['causal']!r}; this model reads from left to right and computes True alone. "
            "(The authors' default is false: their configurations of language models say true.)"
        )
    for name in ("rotary_emb_interleaved", "qkv_proj_bias", "out_proj_bias"):
        if type(sizes[name]) is not bool:
            raise ValueError(f"attn_cfg.{name} must be true or false; got {sizes[name]!r}.")
    for name in ("rotary_emb_base", "softmax_scale"):
        value = sizes[name]
        if not (isinstance(value, int | float) and 0 < value < float("inf")) and (name, value) != (
            "softmax_scale",
            None,
        ):
            raise ValueError(f"attn_cfg.{name} must be positive and finite; got {value!r}.")


def beside(sizes: dict[str, Any]) -> int:
    """Rows of the input projection that the network beside the attention takes."""
    return -(-sizes["mlp_dim"] // BESIDE) * BESIDE


def _divided(hidden_size: int, heads: Any) -> int:
    if type(heads) is not int or heads < 1:
        return 1  # which `check_attention` refuses, by its name
    if hidden_size % heads:
        raise ValueError(
            f"attn_cfg.num_heads must divide hidden_size = {hidden_size} where attn_cfg.head_dim is not given; got "
            f"{heads}."
        )
    return hidden_size // heads
