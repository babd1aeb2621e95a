"""The attention layer of a hybrid SSD model (arXiv:2405.21060, section 9.2.3; mamba_ssm/modules/mha.py of the authors).

    q, k, v = conv(W_in x)        causal, depthwise, over all channels of the three, with a bias and no activation
    o       = W_out Attention(turned q, turned k, v)

B batch, T time, D hidden size, H query heads, K key heads, P head size, C = (H + 2 K) P channels that are convolved.
"""

import torch
from torch import nn

from scrubjay.configuration.ssd_attention import beside
from scrubjay.kernels.causal_attention import cached_attention, causal_attention
from scrubjay.kernels.rotary import rotate
from scrubjay.modeling.layers import CausalConv, ends_branch, project, swiglu


class AttentionMixer(nn.Module):
    """(B, T, D) -> (B, T, D). `in_proj` packs q (H P), k (K P), v (K P) and, with `mlp_dim`, a network's [up, gate]."""

    def __init__(self, config):
        super().__init__()
        sizes = config.attn_cfg
        self.head_dim, self.heads, self.shared = sizes["head_dim"], sizes["num_heads"], sizes["num_heads_kv"]
        self.scale, self.interleaved = sizes["softmax_scale"], sizes["rotary_emb_interleaved"]
        self.convolved, self.beside = (self.heads + 2 * self.shared) * self.head_dim, beside(sizes)
        out = self.heads * self.head_dim + self.beside // 2
        self.in_proj = nn.Linear(config.hidden_size, self.convolved + self.beside, bias=sizes["qkv_proj_bias"])
        self.conv1d = CausalConv(self.convolved, sizes["d_conv"], activate=False) if sizes["d_conv"] else None
        self.out_proj = ends_branch(nn.Linear(out, config.hidden_size, bias=sizes["out_proj_bias"]))

    def forward(self, x, layout, state=None):
        """`state`: the block's `AttentionLayer`, advanced in place, or None."""
        packed = project(self.in_proj, x)
        qkv, network = packed.split([self.convolved, self.beside], -1) if self.beside else (packed, None)
        if state is not None:
            state.prepare(qkv)
        if self.conv1d is not None:
            qkv = self._convolve(qkv, layout, state)
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.shared, self.shared], 2)
        if layout.rotary is not None:
            q, k = (rotate(t, layout.rotary, self.interleaved) for t in (q, k))
        o = self.attend(q, k, v, layout, state).flatten(2)
        return project(self.out_proj, o if network is None else torch.cat([o, swiglu(network)], -1))

    def _convolve(self, qkv, layout, state):
        kept = state if self.conv1d.taps > 1 else None
        before = None if kept is None else kept.conv
        if layout.shard is not None:
            before = layout.shard.halo(qkv, self.conv1d.taps - 1)
        out, after = self.conv1d(qkv, before, layout)
        if kept is not None:
            kept.conv = after  # inputs of the convolution: the authors' prefill keeps its outputs, and decodes wrong
        return out

    def attend(self, q, k, v, layout, state):
        """(B, T, H, P). Keys and values of the call go into `state`."""
        if layout.shard is not None:
            return self._attend_slice(q, k, v, layout, state)
        if state is None or not state.seen:
            if state is not None:
                state.append(k, v, layout.real)
            return causal_attention(q, k, v, layout.cu_seqlens, scale=self.scale)
        before = state.counts
        keys, values = state.append(k, v, layout.real)
        return cached_attention(q, keys, values, before, scale=self.scale)

    def _attend_slice(self, q, k, v, layout, state):
        """One rank's slice of a sequence: every earlier rank sends it all of its keys and values."""
        (past_k, past_v), _ = layout.shard.past(sum(layout.shard.lengths), [k, v])
        keys, values = (torch.cat(pair, 1) for pair in ((past_k, k), (past_v, v)))
        if state is not None:
            state.hold(keys, values)
        before = torch.full((len(q),), past_k.shape[1], dtype=torch.int64, device=q.device)
        return cached_attention(q, keys.transpose(1, 2), values.transpose(1, 2), before, scale=self.scale)
