"""One layer of Recycled Attention (RefreshKV, arXiv:2411.05787): all keys are held, most steps read a few of them.

B batch, H query heads, G key heads, P head size, T new columns, n columns held, K budget.
"""

import torch

from scrubjay.kernels.recycle import decode, decode_with_scores, top
from scrubjay.modeling.caches.buffers import appended, roomy, writable
from scrubjay.modeling.caches.kept_keys import TAIL, KeepingLayer, Kept
from scrubjay.modeling.decoder.decoder_call import mean_over_devices

GROWTH = 1.25  # of the full buffer when it is full


class RecycledLayer(KeepingLayer):
    """All keys and values in one buffer, and the K that partial steps attend.

    full_keys, full_values: (B, G, capacity, P), `seen` columns in use. tail: (B, H, 64, P), the query of column c at
    c mod 64; where c is padding, that of the token before it. waiting: (B, G, n) scores of the last full step, from
    which `kept` is chosen when a partial step needs it. Under the dynamic schedule, means: (B, 1, 64, P), the mean of
    `tail` over the heads, and reference: (B, P), that of the last full step.
    """

    names = ("full_keys", "full_values", "tail", "means", "waiting", "reference")
    counters = ("seen", "since", "oldest", "full_steps", "partial_steps")
    is_croppable = True

    def clear(self) -> None:
        super().clear()
        self.since = self.oldest = self.full_steps = self.partial_steps = 0
        self.exact_when_short = True  # attend the buffer itself while it holds no more than K

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask for `query_length` new columns."""
        return self.seen + query_length, 0

    def extend(self, k, v):
        """Append to the buffer; returns views of all columns."""
        used = self.seen - k.shape[2]
        if torch.is_grad_enabled() and k.requires_grad:  # a graph may need what is there: no writing in place
            old = (x[:, :, :used] for x in (self.full_keys, self.full_values)) if used else (k[:, :, :0], v[:, :, :0])
            self.full_keys, self.full_values = (appended(*pair) for pair in zip(old, (k, v), strict=True))
            return self.full_keys.view_as(self.full_keys), self.full_values
        self.full_keys, self.full_values = (
            _written(buffer, new, used) for buffer, new in ((self.full_keys, k), (self.full_values, v))
        )
        return self.full_keys[:, :, : self.seen], self.full_values[:, :, : self.seen]

    def attend(self, query, key, value, scaling):
        """(B, T, H, P), or None to attend all keys as the model always does."""
        settings, first = self.settings, self.tail is None
        short = self.exact_when_short and self.seen <= settings.budget
        self.note(query)
        if first or query.shape[2] > 1:
            self.renew()
            return None
        if settings.policy == "full" or self.layer_idx in settings.full_layers:
            return None if short else decode(query[:, :, 0], key, value, scaling, self.real_until(self.seen))[:, None]
        full = self.wants_all()
        self.full_steps += full
        self.partial_steps += not full
        if settings.schedule == "fixed" and settings.stride == 1 and settings.full_output:
            return None
        with torch.no_grad():
            if short:
                return self.short_step(full, key, scaling)
            step = self.full_step if full else self.partial_step
            return step(self.query_of(self.seen), key, value, scaling)[:, None]

    def note(self, query):
        """Remember the last queries, from which a later choice may have to be made."""
        last = self.call.last(query, TAIL).detach()
        start, new = self.seen - last.shape[2], {"tail": last}
        if self.settings.schedule == "dynamic":
            new["means"] = self.mean_of(last)[:, None]
        if self.tail is None:
            self.oldest = start
        columns = torch.arange(start, self.seen, device=last.device)
        for name, rows in new.items():
            held = getattr(self, name)
            if held is None:
                held = rows.new_zeros(*rows.shape[:2], TAIL, rows.shape[3])
            held = roomy(writable(held), rows)
            rows = rows.to(held.dtype)
            if getattr(self, name) is not None and self.call.source is not None:
                before = held[:, :, (self.seen - query.shape[2] - 1) % TAIL, None]  # no token in this call so far
                rows = torch.where(self.call.source[:, None, :, None] < 0, before, rows)
            held[:, :, columns % TAIL] = rows
            setattr(self, name, held)
        self.oldest = max(self.oldest, self.seen - TAIL)

    def query_of(self, columns):
        """(B, H, P): of the last token of the first `columns`."""
        return self.tail[:, :, (columns - 1) % TAIL]

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

    def short_step(self, full, k, scaling):
        """All keys fit the budget and are attended: only the order in which they will be evicted is noted."""
        if full:
            self.refer()
        if full or self.waiting is None:
            columns = self.seen - (not full)
            self.waiting = self.scored(self.query_of(columns), k[:, :, :columns], scaling, self.real_until(columns))

    def full_step(self, q, k, v, scaling):
        """Attend all keys and remember how; the K best are gathered when a partial step comes."""
        real = self.real_until(self.seen)
        out, logp = decode_with_scores(q, k, v, scaling, real)
        self.kept, self.waiting = None, self.pool(logp, k.shape[1], real)
        self.refer()
        if not self.settings.full_output:
            self.choose(k, v, scaling)
            keys, values, real = self.kept.held()
            out = decode(q, keys, values, scaling, real)
        return out

    def partial_step(self, q, k, v, scaling):
        """Attend what is kept, the new token among it."""
        if self.kept is None:
            self.choose(k[:, :, :-1], v[:, :, :-1], scaling)
        self.put_newest(k[:, :, -1:], v[:, :, -1:])
        keys, values, real = self.kept.held()
        return decode(q, keys, values, scaling, real)

    def choose(self, k, v, scaling):
        """Keep the K best of the keys (B, G, n, P), as the last token of the last full step attended them.

        Tokens since then, while all fitted the budget, follow.
        """
        settings, columns = self.settings, k.shape[2]
        real, scores = self.real_until(columns), self.waiting
        if scores is None:
            scores = self.scored(self.query_of(columns), k, scaling, real)
        known = scores.shape[2]
        index = top(scores, settings.budget, settings.recent, settings.sinks, self.real_until(known))
        if known < columns:
            since = torch.arange(known, columns, device=k.device).expand(*index.shape[:2], -1)
            index = torch.cat([index, since], 2)
        self.kept = Kept(k, v, index, self.capacity, real, self.pinned(columns, k))
        self.waiting = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns (a negative count, as transformers passes it)."""
        tokens_to_remove = int(tokens_to_remove)  # assisted generation counts with a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of columns to forget; got {tokens_to_remove}.")
        if tokens_to_remove == 0:
            return
        columns = self.seen + tokens_to_remove
        if columns <= self.oldest:
            raise ValueError(
                f"The queries of the last {self.seen - self.oldest} columns are remembered, and a crop needs one that "
                f"stays; got {tokens_to_remove}. Keep a copy (copy.deepcopy(cache)) to go further back."
            )
        self.seen = columns
        self.renew()


def _written(buffer, new, used):
    """The buffer with new columns written behind `used` ones, in larger memory if they do not fit."""
    (B, G, _, P), needed = new.shape, used + new.shape[2]
    buffer = None if buffer is None else roomy(writable(buffer), new)
    if buffer is None or buffer.shape[2] < needed:
        columns = max(256, needed + int(needed * (GROWTH - 1)) if used else needed + 256)
        larger = (new if buffer is None else buffer).new_empty(B, G, columns, P)
        if used:
            larger[:, :, :used] = buffer[:, :, :used]
        buffer = larger
    buffer[:, :, used:needed] = new
    return buffer
