"""One layer of Recycled Attention (RefreshKV, arXiv:2411.05787): all keys are held, most steps read a few of them.

B batch, H query heads, G key heads, P head size, T new columns, n columns held, K budget.
"""

import torch

from scrubjay.kernels.recycle import decode, decode_with_scores, top
from scrubjay.modeling.caches.holding_layer import HoldingLayer
from scrubjay.modeling.caches.kept_keys import TAIL, Kept
from scrubjay.modeling.decoder.decoder_call import mean_over_devices


class RecycledLayer(HoldingLayer):
    """All keys and values in one buffer, and the K that partial steps attend.

    waiting: (B, G, n) scores of the last full step, from which `kept` is chosen when a partial step needs it. Under the
    dynamic schedule, means: (B, 1, 64, P), the mean of `tail` over the heads, and reference: (B, P), that of the last
    full step.
    """

    names = (*HoldingLayer.names, "means", "waiting", "reference")
    counters = (*HoldingLayer.counters, "since", "full_steps", "partial_steps")

    def clear(self) -> None:
        super().clear()
        self.since = self.full_steps = self.partial_steps = 0
        self.exact_when_short = True  # attend the buffer itself while it holds no more than K

    def take(self, other: HoldingLayer) -> None:
        """Have read what another has read, which must have compared queries if this one does."""
        super().take(other)
        if self.settings.schedule == "dynamic":
            if getattr(other, "means", None) is None:
                raise ValueError(
                    "schedule='dynamic' compares queries from the start: make the first cache with it as well."
                )
            self.means = other.means.clone()
        self.renew()

    def step(self, query, key, value, scaling):
        """A full step or a partial one."""
        settings = self.settings
        full = self.wants_all()
        self.full_steps += full
        self.partial_steps += not full
        if settings.schedule == "fixed" and settings.stride == 1 and settings.full_output:
            return None
        with torch.no_grad():
            if self.exact_when_short and self.seen <= settings.budget:
                return self.short_step(full, key, scaling)
            step = self.full_step if full else self.partial_step
            return step(self.query_of(self.seen), key, value, scaling)[:, None]

    def last_queries(self, query):
        """And their means over the heads."""
        new = super().last_queries(query)
        if self.settings.schedule == "dynamic":
            new["means"] = self.mean_of(new["tail"])[:, None]
        return new

    def mean_of(self, queries):
        """(B, H, m, P) -> (B, m, P); where `qsim_space` is "pre", turned back to position 0, alike for all heads."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        mean = queries.to(wide).mean(1)
        if queries.shape[1] < self.settings.num_attention_heads:  # tensor parallel: other devices have the others
            mean = mean_over_devices(mean, self.call.mesh)
        if self.settings.qsim_space == "post":
            return mean
        cos, sin = (x.to(wide) for x in self.call.rotary)
        a, b = mean.chunk(2, -1)
        return mean * cos + torch.cat([b, -a], -1) * sin

    def renew(self):
        """All keys were attended: what was kept is stale."""
        self.kept = self.waiting = None
        self.since = 0
        self.refer()

    def refer(self):
        """Later queries are compared with that of the last column."""
        if self.means is not None:
            self.reference = self.means[:, 0, (self.seen - 1) % TAIL].clone()

    def wants_all(self):
        """Whether this decode step is a full one."""
        self.since += 1
        if self.settings.schedule == "fixed":
            return self.since % self.settings.stride == 0
        if self.since % self.settings.qc:
            return False
        now = self.means[:, 0, (self.seen - 1) % TAIL]
        apart = torch.cosine_similarity(now, self.reference, dim=-1) <= self.settings.threshold
        return bool(apart.any() if self.settings.qsim_batch == "any" else apart.all())

    def reads(self, columns):
        """All at full steps, the budget at others."""
        settings, steps = self.settings, self.full_steps + self.partial_steps
        share = 1 / settings.stride if settings.schedule == "fixed" else self.full_steps / max(steps, 1)
        return settings.budget + (columns - settings.budget) * share

    def short_step(self, full, k, scaling):
        """All keys fit the budget and are attended: only the order in which they will be evicted is noted."""
        if full:
            self.refer()
        if full or self.waiting is None:
            columns = self.seen - (not full)
            self.waiting = self.scored_until(columns, k, scaling)

    def full_step(self, q, k, v, scaling):
        """Attend all keys and remember how; the K best are gathered when a partial step comes."""
        real = self.real_until(self.seen)
        out, logp = self.attend_all(q, k, v, scaling, real)
        self.kept, self.waiting = None, self.pool(logp, k.shape[1], real)
        self.refer()
        if not self.settings.full_output:
            self.choose(self.seen, k, v, scaling)
            keys, values, real = self.kept.held()
            out = decode(q, keys, values, scaling, real)
        return out

    def partial_step(self, q, k, v, scaling):
        """Attend what is kept, the new token among it."""
        if self.kept is None:
            self.choose(self.seen - 1, k, v, scaling)
        self.put_newest(k[:, :, -1:], v[:, :, -1:])
        keys, values, real = self.kept.held()
        return decode(q, keys, values, scaling, real)

    def attend_all(self, q, k, v, scaling, real):
        """(B, H, P), and the log-probabilities (B, H, n) of all keys."""
        return decode_with_scores(q, k, v, scaling, real)

    def scored_until(self, columns, k, scaling):
        """Pooled scores (B, G, columns) of the first columns for the last of their queries."""
        return self.scored(self.query_of(columns), k[:, :, :columns], scaling, self.real_until(columns))

    def choose(self, columns, k, v, scaling):
        """Keep the K best of the first columns, as the last token of the last full step attended them.

        Tokens since then, while all fitted the budget, follow.
        """
        settings, scores = self.settings, self.waiting
        if scores is None:
            scores = self.scored_until(columns, k, scaling)
        known = scores.shape[2]
        index = top(scores, settings.budget, settings.recent, settings.sinks, self.real_until(known))
        if known < columns:
            since = torch.arange(known, columns, device=index.device).expand(*index.shape[:2], -1)
            index = torch.cat([index, since], 2)
        self.kept = self.keep(k, v, index, columns)
        self.waiting = None

    def keep(self, k, v, index, columns):
        """`Kept` of the columns at index (B, G, M)."""
        return Kept(k, v, index, self.capacity, self.real_until(columns), self.pinned(columns, k))
