"""Taipan's selective attention layer (arXiv:2410.18572, section 3): a gate, and attention for what it selects.

B batch, T time, D hidden size, H heads, K key heads, P head size, n selected tokens of the whole batch, N the most of a
row.
"""

import torch
from torch import nn

from scrubjay.kernels.dispatch import exported, traced
from scrubjay.kernels.gate import (
    gate_logit,
    gumbel_difference,
    in_one_pass,
    logit,
    mix,
    norm_gate,
    row_norm,
    select,
    straight_through,
)
from scrubjay.kernels.rotary import rotate
from scrubjay.kernels.select_attention import pack, select_attention, select_attention_step, steps_by_mask
from scrubjay.modeling.layers import RMSNorm, ends_branch, project
from scrubjay.modeling.training.adapters import adapts, hooked, in_use


class RowNorm(RMSNorm):
    """RMSNorm whose bits are the same in every batch, (..., D) -> (..., D) in float32: the gate reads it.

    `rounded`: a pair, of which the second is in weight's dtype: attention reads that.
    """

    def forward(self, x, rounded: bool = False):
        wide = row_norm(x, self.weight, self.eps)
        return (wide, wide.to(self.weight.dtype)) if rounded else wide


class Gate(nn.Module):
    """delta, how much more a token is worth attending for than not: (B, T, D) -> (B, T) in float32."""

    def __init__(self, config):
        super().__init__()
        d, n = config.hidden_size, config.gate_hidden
        self.weight = nn.Parameter(torch.empty(2, n or d))
        self.bias = nn.Parameter(torch.empty(2))
        self.hidden_weight = nn.Parameter(torch.empty(n, d)) if n else None
        self.hidden_bias = nn.Parameter(torch.empty(n)) if n else None

    def forward(self, x):
        hidden = None if self.hidden_weight is None else (self.hidden_weight, self.hidden_bias)
        return gate_logit(x, self.weight, self.bias, hidden)


class SelectiveAttention(nn.Module):
    """The gate and the attention of selected tokens: (B, T, D) -> (B, T, D), section 3."""

    def __init__(self, config):
        super().__init__()
        self.config = config  # read at each step: a schedule may anneal gumbel_tau and budget_lambda
        d, self.head_dim = config.hidden_size, config.attention_head_dim
        self.norm = RowNorm(d, config.layer_norm_epsilon)
        self.gate = Gate(config)
        self.q_proj = nn.Linear(d, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = ends_branch(nn.Linear(config.num_attention_heads * self.head_dim, d, bias=False))
        self.post_norm = RMSNorm(d, config.layer_norm_epsilon) if config.sal_post_norm else None

    def forward(self, h, layout, ring=None, threshold=0.5):
        """`ring`: the layer's `RingLayer`, advanced in place, or None. `threshold`: above which a selects at inference.

        Returns the new h, and sums for each sequence, (rows or documents, 4): selected, with its surrogate's gradient;
        a; selected by argmax; tokens.
        """
        config, real = self.config, None if layout.real is None else layout.real[..., 0]
        x, delta = self._norm_and_gate(h)
        a, (m, p1) = torch.sigmoid(delta), self._choose(delta, real, threshold)
        soft = m.to(a.dtype) if p1 is None else straight_through(m, p1)
        dense = self.training and config.train_attention == "dense" and config.st_surrogate == "p1"
        if ring is not None:
            ring.prepare(x[:, :0])
        index, o = self.attend(x, a, m, layout, ring, dense)
        strength = a * soft if self.training and config.st_surrogate == "p1" else a
        if index is None:
            h = torch.where(m[..., None], mix(h, o.view_as(h), strength, config.refine), h)
        else:
            flat = h.flatten(0, 1)
            mixed = mix(flat[index], o, strength.flatten()[index], config.refine)
            if len(index) or torch.is_grad_enabled():
                h = flat.index_copy(0, index, mixed).view_as(h)
        if self.training and config.st_surrogate == "chosen":
            drawn = torch.where(m, p1, 1 - p1)  # equation 3: the probability of the branch that was drawn
            h = (h * straight_through(torch.ones_like(m), drawn)[..., None]).to(h.dtype)
        return h, _sums(torch.stack([soft, a.detach(), select(delta.detach()).to(a.dtype)], -1), layout)

    def _choose(self, delta, real, threshold):
        """m, (B, T) bool, and p1, (B, T), the soft choice whose gradient it is given; None where it is given none."""
        config = self.config
        sampled = (config.train_gate if self.training else config.eval_gate) == "sample"
        if self.training and sampled:
            threshold = 0.5
        noise = gumbel_difference(delta) if sampled else None
        m = select(delta, threshold, noise, real)
        if not (sampled or self.training):
            return m, None
        score = (delta if noise is None else delta + noise) - logit(threshold)
        return m, torch.sigmoid(score / config.gumbel_tau)

    def _norm_and_gate(self, h):
        """x (B, T, D), in the layer's dtype, and delta (B, T)."""
        norm, gate = in_use(self.norm), in_use(self.gate)
        plain = type(norm) is RowNorm and type(gate) is Gate and not (hooked(self.norm) or hooked(self.gate))
        if plain and in_one_pass(h, norm.weight, gate.weight, gate.bias, gate.hidden_weight):
            return norm_gate(h, norm.weight, norm.eps, gate.weight, gate.bias, normed=self.config.gate_norm)
        wide, x = self.norm(h, rounded=True)
        return x, self.gate(wide if self.config.gate_norm else h)

    def attend(self, x, a, m, layout, ring, dense):
        """(index, o): which of the B * T columns attended, and what they found, (n, D).

        Index None: all of them, some of which may not have been selected.
        """
        if ring is not None and x.shape[1] == 1 and layout.lengths is None and layout.shard is None and not dense:
            index, o = self._step(x, a, m, layout, ring)
        elif self.config.kv_scope == "all":
            index, o = self._among_all(x, a, m, layout, ring, dense)
        elif dense or traced():
            index, o = self._dense_among_selected(x, a, m, layout, ring, dense)
        else:
            index, o = self._among_selected(x, a, m, layout, ring)
        o = _of_rows(self.o_proj, o.flatten(1), layout, index, x.shape[-1])
        # every column was a query: only where a gradient is wanted of all need they be told apart
        index = None if exported() or (traced() and not dense) else index
        return index, o if self.post_norm is None else self.post_norm(o)

    def _queries(self, x, a, layout, index):
        """(B, T, D) or, with as many rows as `index`, (n, D), and a (B, T) -> q (n, H, P)."""
        x = x.flatten(0, 1)[index] if x.ndim == 3 else x
        if self.config.refine_first:  # on the norm's output: a norm would undo what scales its input
            x = x * (1 - a.flatten()[index])[:, None].to(x.dtype)
        width = self.config.num_attention_heads * self.head_dim
        return self._turn(_of_rows(self.q_proj, x, layout, index, width), layout, index)

    def _keys(self, x, layout, index=None):
        """k, v: (B, T, K, P) of x (B, T, D), or (n, K, P) of x (n, D): rows `index` of the B * T."""
        width = self.config.num_key_value_heads * self.head_dim
        k, v = (_of_rows(proj, x, layout, index, width) for proj in (self.k_proj, self.v_proj))
        return self._turn(k, layout, index), v.unflatten(-1, (-1, self.head_dim))

    def _turn(self, x, layout, index):
        x = x.unflatten(-1, (-1, self.head_dim))
        if layout.rotary is None:
            return x
        if index is None:
            return rotate(x, layout.rotary)
        return rotate(x[None], tuple(t.flatten(0, 1)[index][None] for t in layout.rotary))[0]

    def _among_all(self, x, a, m, layout, ring, dense):
        """Every token writes a key: columns are positions."""
        k, v = self._keys(x, layout)
        past = self._past(k, v, layout, ring)
        packed = pack(m, self.config.ring_size, every=dense)
        q = self._queries(x, a, layout, packed.index)
        keys, values = _after(past, k, v)
        o = select_attention(q, keys, values, packed, layout.positions, self.config.ring_size)
        if ring is not None:
            ring.append(k, v, layout.positions, layout.lengths)
        return packed.index, o

    def _among_selected(self, x, a, m, layout, ring):
        """Only selected tokens write a key: columns are those, first ones first."""
        lengths = m.sum(1)
        columns = max(int(lengths.max()), int(layout.shard is not None))  # other ranks wait for this one's keys
        live = torch.arange(columns, device=m.device) < lengths[:, None]  # (B, N)
        packed = pack(live, self.config.ring_size) if live.shape[1] else None
        if packed is None:
            return self._nothing(x, a, layout)
        tokens = m.flatten().nonzero()[:, 0]  # row after row
        index = tokens[(lengths.cumsum(0) - lengths)[packed.rows] + packed.columns]
        x = x.flatten(0, 1)[index]
        k, v = (_spread(t, packed) for t in self._keys(x, layout, index))
        positions = _spread(layout.positions.flatten()[index], packed)
        past = self._past(k, v, layout, ring, positions, lengths)
        before = torch.arange(live.shape[1], device=m.device).expand(m.shape[0], -1)
        if past is not None:
            before = before + past[3].sum(1, keepdim=True)
        elif layout.cu_seqlens is not None:
            firsts = _first_of_document(m, layout).flatten()[index]
            before = before - _spread(firsts, packed)
        limits = []
        if self.config.window_axis == "position":
            old = () if past is None else (past[2],)
            limits.append((torch.cat([*old, positions], 1), self.config.sliding_window))
        q = self._queries(x, a, layout, index)
        keys, values = _after(past, k, v)
        o = select_attention(q, keys, values, packed, before, self.config.ring_size, limits)
        if ring is not None:
            ring.append(k, v, positions, lengths)
        return index, o

    def _dense_among_selected(self, x, a, m, layout, ring, dense):
        """Training: what every token would find among the selected ones before it and itself; of a program, what the
        selected ones find there. Columns are positions,
        and where the window is one of ranks all of them are read."""
        config, T = self.config, x.shape[1]
        k, v = self._keys(x, layout)
        writes = ring is not None or layout.shard is not None
        selected = _selected_first(k, v, m, layout) if writes else ()
        past = self._past(*selected[:2], layout, ring, *selected[2:]) if writes else None
        ranks = m.cumsum(1) - m.long()
        before, positions, readable, window = layout.positions, layout.positions, m, T
        if past is not None:
            ranks = torch.cat([torch.arange(-past[2].shape[1], 0, device=m.device).expand(m.shape[0], -1), ranks], 1)
            before = torch.arange(T, device=m.device) + past[3].sum(1, keepdim=True)
            positions, readable = torch.cat([past[2], positions], 1), torch.cat([past[3], m], 1)
            window = ranks.shape[1]
        limits = []
        if config.window_axis == "position":
            limits.append((positions, config.sliding_window))
            window = window if exported() else min(window, config.sliding_window)
        reach = config.ring_size if config.window_axis == "rank" else config.kv_cap
        if reach:
            limits.append((ranks, reach))
        packed = pack(m, window, every=dense)
        q = self._queries(x, a, layout, packed.index)
        keys, values = _after(past, k, v)
        o = select_attention(q, keys, values, packed, before, window, limits, readable)
        if ring is not None:
            ring.append(*selected)
        return packed.index, o

    def _past(self, k, v, layout, ring, positions=None, lengths=None):
        """(k, v, positions, real) of the last writes before the call, or None. Of the call's own k, v (B, N, K, P) the
        first `lengths` columns are written, None: all."""
        shard, steps, places, before = layout.shard, self.config.ring_size - 1, None, None
        if shard is None:
            return None if ring is None else ring.past(k.device)
        written = None if lengths is None else shard.gather(lengths)
        (k, v), real = shard.past(steps, [k, v], written)
        if written is not None:
            (places,), _ = shard.past(steps, [positions], written)
            before = written[: shard.rank].sum(0)
        if ring is not None:
            ring.hold(k, v, real, places, before)
        return k, v, places, real

    def _step(self, x, a, m, layout, ring):
        """One token of each row: a row that is not selected makes no query and reads nothing. Where steps go by mask it
        makes keys and a query in vain, and still reads nothing: a GPU is not asked which rows those are."""
        masked, every = steps_by_mask(ring.keys), self.config.kv_scope == "all"
        index = torch.arange(m.shape[0], device=m.device) if masked else m[:, 0].nonzero()[:, 0]
        if not index.shape[0] and not every:
            return self._nothing(x, a, layout)
        k, v = self._keys(x, layout) if every or masked else self._keys(x[index, 0], layout, index)
        positions, lengths = layout.positions, None if every else m[:, 0].long()
        if not (every or masked):
            k, v = (t.new_zeros(len(m), 1, *t.shape[1:]).index_copy(0, index, t[:, None]) for t in (k, v))
        seen = ring.held(1)
        ring.append(k, v, positions, lengths)
        if not index.shape[0]:
            return self._nothing(x, a, layout, k, v)
        keys, values = ring.keys, ring.values
        if not every and self.config.window_axis == "position":
            seen = seen & (positions - ring.places < self.config.sliding_window)
        q = self._queries(x[index, 0], a, layout, index)
        dtype, q = q.dtype, q.to(keys.dtype)
        if masked:
            return None, select_attention_step(q, keys, values, seen, rows=m[:, 0]).to(dtype)
        if len(index) < len(m):
            keys, values, seen = keys[index], values[index], seen[index]
        return index, select_attention_step(q, keys, values, seen).to(dtype)

    def _nothing(self, x, a, layout, k=None, v=None):
        """As `attend` before its output projection, where no token was selected. Keys may have been made already."""
        index = torch.zeros(0, dtype=torch.int64, device=x.device)
        if k is None:
            k, v = self._keys(x.flatten(0, 1)[index], layout, index)
        return index, self._queries(x, a, layout, index) + 0 * (k.sum() + v.sum())


def _selected_first(k, v, m, layout):
    """k, v (B, T, K, P) and positions (B, T) with the selected columns of each row first, and how many those are."""
    first = m.int().argsort(dim=1, descending=True, stable=True)
    k, v = (t.gather(1, first[..., None, None].expand_as(t)) for t in (k, v))
    return k, v, layout.positions.gather(1, first), m.sum(1)


def _after(past, k, v):
    """Keys and values with those of the past before them, which autocast may have left in another dtype."""
    if past is None:
        return k, v
    return tuple(torch.cat([old.to(new.dtype), new], 1) for old, new in zip(past[:2], (k, v), strict=True))


def _of_rows(proj, x, layout, index, width):
    """The projection, to `width` channels, of x (n, D), which are the rows `index` of B * T; None: x is the batch
    itself, or a column of it.

    Where rows of a batch have adapters of their own, peft tells them by the batch's first axis, which it has to see.

    No layer is given an input of no rows, on which quantized ones fail. For n = 0 it is called with a row of zeros
    where somebody waits for the call: a gradient, that each parameter has one, if of zeros; another process, for what
    is gathered in the call or sent after it. Else it is not called.
    """
    if x.ndim == 3:
        return project(proj, x)
    if adapts(proj) and hooked(proj):
        shape = layout.positions.shape
        batch = x if index is None else x.new_zeros(shape.numel(), x.shape[-1]).index_copy(0, index, x)
        y = project(proj, batch.view(*shape, -1)).flatten(0, 1)
        return y if index is None else y[index]
    if x.shape[0]:
        return project(proj, x)
    awaited = torch.is_grad_enabled() or layout.shard is not None or any(hooked(part) for part in proj.modules())
    return project(proj, x.sum(0, keepdim=True))[:0] if awaited else x.new_zeros(0, width)


def _spread(x, packed):
    """(n, ...) in the order of `packed` -> (B, N, ...), zeros where a row has fewer."""
    out = x.new_zeros(packed.shape[0] * packed.shape[1], *x.shape[1:])
    return out.index_copy(0, packed.index, x).view(*packed.shape, *x.shape[1:])


def _first_of_document(m, layout):
    """(1, T): how many tokens were selected before a column's document."""
    starts = torch.arange(m.shape[1], device=m.device) - layout.positions
    return (m.cumsum(1) - m.long()).gather(1, starts)


def _sums(x, layout):
    """(B, T, 3) -> (rows or documents, 4): sums over real tokens, and how many those are."""
    if layout.cu_seqlens is not None:
        sizes, column = layout.cu_seqlens.diff(), torch.arange(x.shape[1], device=x.device)
        document = torch.searchsorted(layout.cu_seqlens[1:].contiguous(), column, right=True)
        sums = x.new_zeros(len(sizes), x.shape[-1]).index_add(0, document, x[0])
        return torch.cat([sums, sizes[:, None].to(x.dtype)], 1)
    if layout.lengths is not None:
        x = x * layout.real
    lengths = x.new_full(x.shape[:1], x.shape[1]) if layout.lengths is None else layout.lengths.to(x.dtype)
    return torch.cat([x.sum(1), lengths[:, None]], 1)
