"""Rodimus and Rodimus+ language models (arXiv:2410.06577; https://github.com/codefuse-ai/rodimus).

    Rodimus    X <- X + Mixer(RMSNorm(X))
    Rodimus+   X <- X + Mixer(RMSNorm(X));  Y = X + Attention(RMSNorm(X));  X <- X + FFN(RMSNorm(Y))

The output of the attention is not kept in the residual stream; it gets there through the feed-forward network alone.
(`two_hop=False`, of the paper's ablations: X <- Y + FFN(RMSNorm(Y)).)

Where this differs from the authors' code, and why: gates, decays and the state are float32 in every mode; the window
has the same keys in whole sequences and in single steps (W // 2 + 1 for their `window_size` W, where their decoding
loses one); a prompt may be longer than the window; any number of tokens continues a cache; packed documents never mix
and padding may stand anywhere.

B batch, T time, D hidden size, M inner width, N state size, R rank of the input gate, H heads, P head_dim.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from scrubjay.configuration.configuration_rodimus import RodimusConfig
from scrubjay.kernels.ddts import ddts, ddts_change
from scrubjay.kernels.one_token import ddts_token, rodimus_gates_token
from scrubjay.kernels.rodimus_gates import rodimus_gates
from scrubjay.kernels.rotary import rotary_table, rotate
from scrubjay.kernels.window import window_attention, window_attention_step
from scrubjay.modeling.base import ZooForCausalLM, ZooModel
from scrubjay.modeling.caches.cache_rodimus import RodimusCache
from scrubjay.modeling.heads import ZooForSequenceClassification, ZooForTokenClassification
from scrubjay.modeling.key_names import Copy, Ignore, Merge, Rename, as_mapping, ignored, same
from scrubjay.modeling.layers import (
    CausalConv,
    GatedMLP,
    GatedRMSNorm,
    RMSNorm,
    ends_branch,
    inverse_softplus,
    log_uniform,
    normed,
    project,
)
from scrubjay.modeling.pretrained import ZooPreTrainedModel
from scrubjay.modeling.training.sharding import spread

BUFFERS = (
    "mixer.inner_mixer.conv_state_*",
    "mixer.inner_mixer.ssm_state_*",
    "attn.key_cache_*",
    "attn.value_cache_*",
)


def _in_layers(rows):
    """Rows of one layer, as rows of any: theirs (one name, or those that are packed into ours, in order) to ours."""
    for theirs, ours in rows.items():
        target = f"model.layers.*.{ours}"
        if isinstance(theirs, str):
            yield Rename(f"model.layers.*.{theirs}", target)
        else:
            yield Merge(tuple(f"model.layers.*.{name}" for name in theirs), target)


def key_names(norm: str, head_written: bool, layers: dict):
    """Rows of a layout whose last norm is called `norm` and whose files may repeat the embedding as the head."""
    return (
        Rename("model.embeddings.weight", "model.embed_tokens.weight"),
        *same("model.embed_norm.weight", "lm_head.weight", "model.layers.*.mixer_norm.weight"),
        Rename(f"model.{norm}.weight", "model.norm.weight"),
        Copy("lm_head.weight", "model.embeddings.weight", written=head_written),
        *_in_layers(layers),
    )


# The authors' files and fla's load as they are.
KEY_NAMES = {
    "codefuse": key_names(
        "norm_f",
        True,
        {
            "mixer.fc.weight": "mixer.fc.weight",
            "mixer.inner_mixer.short_conv.conv1d.weight": "mixer.conv1d.weight",
            "mixer.inner_mixer.short_conv.conv1d.bias": "mixer.conv1d.bias",
            "mixer.inner_mixer.in_proj.weight": "mixer.in_proj.weight",
            "mixer.inner_mixer.mem_gate_proj.weight": "mixer.mem_gate_proj.weight",
            "mixer.inner_mixer.mem_gate_proj.bias": "mixer.mem_gate_bias",
            "mixer.inner_mixer.ch_gate_proj.0.weight": "mixer.ch_gate_down.weight",
            "mixer.inner_mixer.ch_gate_proj.1.weight": "mixer.ch_gate_up.weight",
            "mixer.inner_mixer.ch_gate_proj.1.bias": "mixer.ch_gate_up.bias",
            "mixer.inner_mixer.residual_weight": "mixer.residual_weight",
            "mixer.act_norm.weight": "mixer.act_norm.weight",
            "mixer.out_proj.weight": "mixer.out_proj.weight",
            "attn_norm.weight": "attn_norm.weight",
            "attn.q_proj.weight": "attn.q_proj.weight",
            "attn.k_proj.weight": "attn.k_proj.weight",
            "attn.v_proj.weight": "attn.v_proj.weight",
            "attn.out_proj.weight": "attn.o_proj.weight",
            "ffn_norm.weight": "ffn_norm.weight",
            "ffn.fc.weight": "ffn.fc.weight",
            "ffn.out_proj.weight": "ffn.out_proj.weight",
        },
    )
    + tuple(Ignore(f"model.layers.*.{name}", "a buffer that generation left behind") for name in BUFFERS),
    "fla": key_names(
        "norm",
        False,
        {
            ("mixer.up_proj.weight", "mixer.gate_proj.weight"): "mixer.fc.weight",
            "mixer.short_conv.weight": "mixer.conv1d.weight",
            "mixer.short_conv.bias": "mixer.conv1d.bias",
            ("mixer.q_proj.weight", "mixer.k_proj.weight"): "mixer.in_proj.weight",
            ("mixer.g_gate_proj.weight", "mixer.tau_gate_proj.weight"): "mixer.mem_gate_proj.weight",
            ("mixer.g_gate_proj.bias", "mixer.tau_gate_proj.bias"): "mixer.mem_gate_bias",
            "mixer.i_gate_proj.0.weight": "mixer.ch_gate_down.weight",
            "mixer.i_gate_proj.1.weight": "mixer.ch_gate_up.weight",
            "mixer.i_gate_proj.1.bias": "mixer.ch_gate_up.bias",
            "mixer.residual_weight": "mixer.residual_weight",
            "mixer.activation_norm.weight": "mixer.act_norm.weight",
            "mixer.down_proj.weight": "mixer.out_proj.weight",
            "ska_attn_norm.weight": "attn_norm.weight",
            "ska_attn.q_proj.weight": "attn.q_proj.weight",
            "ska_attn.k_proj.weight": "attn.k_proj.weight",
            "ska_attn.v_proj.weight": "attn.v_proj.weight",
            "ska_attn.o_proj.weight": "attn.o_proj.weight",
            "mlp_norm.weight": "ffn_norm.weight",
            ("mlp.up_proj.weight", "mlp.gate_proj.weight"): "ffn.fc.weight",
            "mlp.down_proj.weight": "ffn.out_proj.weight",
        },
    ),
}
register_checkpoint_conversion_mapping(RodimusConfig.model_type, as_mapping(*KEY_NAMES.values()), overwrite=True)


class RodimusMixer(nn.Module):
    """(B, T, D) -> (B, T, D), section 3. `fc` packs [x, z], `in_proj` [q, k], `mem_gate_proj` [selection,
    temperature]. Ablations have no temperature, no convolution, no input gate or one of a single, full matrix."""

    def __init__(self, config):
        super().__init__()
        m, n = config.inner_size, config.state_size
        self.n, self.chunk = n, config.chunk_size
        self.k_norm_eps = config.k_norm_eps
        self.fc = nn.Linear(config.hidden_size, 2 * m, bias=False)
        gates, rank = (2 * n if config.temperature_gate else n), config.input_gate_rank
        low, gated = config.input_gate == "low_rank", config.input_gate != "none"
        self.conv1d = CausalConv(m, config.conv_kernel) if config.short_conv else None
        self.in_proj = nn.Linear(m, 2 * n, bias=False)
        self.mem_gate_proj = nn.Linear(m, gates, bias=False)
        self.mem_gate_bias = nn.Parameter(torch.empty(gates))  # its own parameter, because it is added in float32
        self.ch_gate_down = nn.Linear(m, rank, bias=False) if low else None
        self.ch_gate_up = nn.Linear(rank if low else m, m) if gated else None
        self.residual_weight = nn.Parameter(torch.empty(m))
        self.act_norm = GatedRMSNorm(m, config.rms_norm_eps)
        self.act_dropout = nn.Dropout(config.activation_dropout)
        self.out_proj = ends_branch(nn.Linear(m, config.hidden_size, bias=False))

    def forward(self, h, layout, state=None):
        """`state`: the block's `StateLayer`, advanced in place, or None."""
        if layout.one_token and state is not None and type(self.act_norm) is GatedRMSNorm:
            return self._one_token(h, layout, state)
        x, z = project(self.fc, h).chunk(2, -1)  # (B, T, M) twice
        conv, s = (None, None) if state is None else state.read(x)
        if layout.shard is not None and self.conv1d is not None:
            conv = layout.shard.halo(x, self.conv1d.taps - 1)
        seen, conv = (x, conv) if self.conv1d is None else self.conv1d(x, conv, layout)
        gates = (project(self.in_proj, seen), project(self.mem_gate_proj, seen), self.mem_gate_bias)
        q, k, a = rodimus_gates(*gates, self.k_norm_eps)  # (B, T, N) each
        v = self._values(x)
        if layout.lengths is not None:
            v, a = v * layout.real, a * layout.real  # such a step adds nothing and forgets nothing
        if layout.shard is not None:
            s = layout.shard.entering(*ddts_change(k, v, a))
        y, s = ddts(q, k, v, a, s, layout.cu_seqlens, chunk=self.chunk, overwrite=True)
        if state is not None:
            state.write(conv, s)
        return project(self.out_proj, self.act_dropout(self.act_norm(y, z, seen, self.residual_weight)))

    def _values(self, x):
        """The stream before the convolution, gated by itself: (B, T, M)."""
        if self.ch_gate_up is None:
            return x
        inner = x if self.ch_gate_down is None else project(self.ch_gate_down, x)
        return torch.sigmoid(project(self.ch_gate_up, inner)) * x

    def _one_token(self, h, layout, state):
        """`forward` of (B, 1, D) in fewer calls."""
        x, z = project(self.fc, h).chunk(2, -1)
        conv, s = state.read(x)
        seen, conv = (x, conv) if self.conv1d is None else self.conv1d(x, conv, layout)
        gates = (project(self.in_proj, seen), project(self.mem_gate_proj, seen), self.mem_gate_bias)
        q, k, keep = rodimus_gates_token(*gates, self.k_norm_eps)
        y, s = ddts_token(q, k, self._values(x).float(), keep, s)
        state.write(conv, s)
        u = self.act_norm(y.addcmul_(seen.float(), self.residual_weight.float()), z)
        return project(self.out_proj, self.act_dropout(u))


class SharedKeyWindow(nn.Module):
    """SW-SKA, section 4: sliding-window attention whose query heads share one key head. (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.window, self.interleaved = config.head_dim, config.sliding_window, config.rope_interleaved
        self.dropout = config.attention_dropout
        d = config.hidden_size
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, config.num_value_heads * self.head_dim, bias=False)
        self.o_proj = ends_branch(nn.Linear(d, d, bias=False))

    def forward(self, x, layout, state=None):
        """`state`: the block's `WindowStateLayer`, whose ring is advanced in place, or None."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(proj, x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        if layout.rotary is not None:
            q, k = (rotate(t, layout.rotary, self.interleaved) for t in (q, k))
        if state is not None and x.shape[1] == 1 and layout.lengths is None and layout.shard is None:
            state.append(k, v, None)
            ring = state.written(1) if layout.one_token else (state.keys, state.values, state.held(1))
            o = window_attention_step(q[:, 0], *ring)[:, None]
        else:
            past = self.past(k, v, layout, state)
            dropout = self.dropout if self.training else 0.0
            o = window_attention(q, k, v, self.window, past, layout.cu_seqlens, dropout=dropout)
            if state is not None:
                state.append(k, v, layout.lengths)
        return project(self.o_proj, o.flatten(2))

    def past(self, k, v, layout, state):
        """(k, v, real) of the steps before the call, or None."""
        if layout.shard is None:
            return None if state is None else state.past()
        (k, v), real = layout.shard.past(self.window - 1, [k, v])
        if state is not None:
            state.hold(k, v, real)
        return k, v, real


class RodimusBlock(GradientCheckpointingLayer):
    """The mixer; in Rodimus+ then attention and feed-forward network as one second hop."""

    def __init__(self, config):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = RodimusMixer(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.has_attention, self.two_hop = config.has_attention, config.two_hop
        if self.has_attention:
            self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.attn = SharedKeyWindow(config)
            self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.ffn = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x, layout, state=None):
        x = x + self.dropout(self.mixer(normed(self.mixer_norm, x, layout), layout, state))
        if self.has_attention:
            y = x + self.dropout(self.attn(normed(self.attn_norm, x, layout), layout, state))
            x = (x if self.two_hop else y) + self.dropout(self.ffn(normed(self.ffn_norm, y, layout)))
        return x


class RodimusPreTrainedModel(ZooPreTrainedModel):
    """Initialisation as in the authors' code."""

    config_class = RodimusConfig
    cache_class = RodimusCache
    _no_split_modules = ["RodimusBlock"]
    _keep_in_fp32_modules_strict = ["mem_gate_bias"]
    _keys_to_ignore_on_load_unexpected = ignored(*KEY_NAMES.values())
    no_weight_decay = ("mem_gate_bias", "residual_weight")
    no_weight_decay_on_embedding = True

    @torch.no_grad()
    def _init_weights(self, module):
        config = self.config
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                row = torch.arange(len(module.weight), device=module.weight.device).eq(module.padding_idx)
                module.weight.masked_fill_(spread(row[:, None].expand(module.weight.shape), module.weight), 0)
        elif isinstance(module, nn.Linear):
            if module is getattr(self, "lm_head", None) and module.weight is self.model.embed_tokens.weight:
                return  # tied already: it is filled, and has its row of zeros
            rescaled = config.rescale_prenorm_residual and hasattr(module, "ends_branch")
            branches = (3 if config.has_attention else 1) * config.num_hidden_layers
            init.normal_(module.weight, std=config.initializer_range * (branches**-0.5 if rescaled else 1))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, CausalConv):
            module.reset_parameters()
        elif isinstance(module, (RMSNorm, GatedRMSNorm)):
            init.ones_(module.weight)
        elif isinstance(module, RodimusMixer):
            self._init_mixer(module)

    def _init_mixer(self, mixer):
        for proj in (mixer.in_proj, mixer.mem_gate_proj, mixer.ch_gate_down, mixer.ch_gate_up):
            if proj is not None:
                init.xavier_uniform_(proj.weight, gain=2**-2.5)
        selection = inverse_softplus(log_uniform(mixer.n, 0.001, 0.1, 1e-4))
        temperature = torch.empty(mixer.n).uniform_(1 / 16, 0.9).logit()
        gates = torch.cat([selection, temperature])[: len(mixer.mem_gate_bias)]  # a temperature, or none
        init.copy_(mixer.mem_gate_bias, spread(gates, mixer.mem_gate_bias))
        init.ones_(mixer.residual_weight)


class RodimusModel(RodimusPreTrainedModel, ZooModel):
    """Embedding, Rodimus or Rodimus+ blocks, final norm."""

    block_class = RodimusBlock
    has_padding_row = True

    def __init__(self, config):
        super().__init__(config)
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.norm_embedding else None
        self.post_init()

    def embed(self, inputs_embeds):
        if self.config.scale_embedding:
            inputs_embeds = inputs_embeds * self.config.state_size**0.5
        return inputs_embeds if self.embed_norm is None else self.embed_norm(inputs_embeds)

    def locate(self, layout, dtype):
        if not self.config.has_attention or self.config.rotary_dim == 0:
            return layout
        table = rotary_table(layout.positions, self.config.rotary_dim, self.config.rope_theta, dtype)
        return layout.with_rotary(table)


class RodimusForCausalLM(RodimusPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """Rodimus or Rodimus+ language model."""

    model_class = RodimusModel


class RodimusForSequenceClassification(RodimusPreTrainedModel, ZooForSequenceClassification):
    """Rodimus or Rodimus+ with scores of a text."""

    model_class = RodimusModel


class RodimusForTokenClassification(RodimusPreTrainedModel, ZooForTokenClassification):
    """Rodimus or Rodimus+ with scores of each token."""

    model_class = RodimusModel


__all__ = [
    "RodimusForCausalLM",
    "RodimusForSequenceClassification",
    "RodimusForTokenClassification",
    "RodimusModel",
    "RodimusPreTrainedModel",
]
