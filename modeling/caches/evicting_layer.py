"""The policies that forget keys: SnapKV (arXiv:2404.14469), H2O (arXiv:2306.14048), TOVA (arXiv:2401.06104),
StreamingLLM (arXiv:2309.17453).

B batch, H query heads, G key heads, P head size, T new columns, n columns, m columns kept, K budget.
"""

import torch
import torch.nn.functional as F

from scrubjay.kernels.recycle import (
    attend_received,
    attend_seen,
    decode,
    decode_with_scores,
    pooled,
    received,
    scores_of,
    top,
)
from scrubjay.kernels.rotary import turned
from scrubjay.kernels.slots import put_rows
from scrubjay.modeling.caches.buffers import appended, roomy, writable
from scrubjay.modeling.caches.holding_layer import HoldingLayer
from scrubjay.modeling.caches.kept_keys import KeepingLayer, Kept, pick
from scrubjay.modeling.decoder.decoder_call import mean_over_devices

ROOM = 64  # slots that SnapKV takes ahead of the tokens after its prompt


class EvictingLayer(KeepingLayer):
    """The K keys of a policy that forgets all others, O(K) bytes; under SnapKV K of the prompt and all that come later.

    A prompt is read with full attention, each further piece of several tokens with what is kept and itself. A row with
    one token in such a piece keeps that rule, so it attends one key more than alone, where one token is a step and what
    it replaces leaves first.
    mass: (B, G, capacity), attention that each kept key has received: all of it (H2O), or of the last query, in the
    mean over all heads (TOVA). Where positions count from the start of the cache, evicted: (B,) int64, tokens
    forgotten, and sink_keys: (B, G, sinks, P), keys of the sinks at their own positions. A window keeps its distances
    as it moves, so the sinks alone are turned, to follow it.
    """

    names = ("mass", "evicted", "sink_keys")
    is_croppable = False

    def take(self, other: HoldingLayer) -> None:
        """Have read what a layer has read that forgot nothing, and forget."""
        queries, n = other.remembered(), other.seen
        if self.settings.policy == "h2o" or self.settings.recent > queries.shape[2]:
            raise ValueError(
                f"The queries of the last {queries.shape[2]} tokens are remembered; "
                f"policy={self.settings.policy!r} needs more of them. Give the text to a cache of its own."
            )
        keys, values = (x[:, :, :n] for x in other.everything())
        self.lazy_initialization(keys, values)
        self.seen = n
        columns = torch.arange(n, device=keys.device).expand(*keys.shape[:2], n)
        self.choose(queries, keys, values, columns, None, other.scaling)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask for `query_length` new columns."""
        return (0 if self.kept is None else self.kept.filled) + query_length, 0

    def extend(self, k, v):
        """What a piece attends: what is kept, then itself."""
        self.new = k, v
        if self.kept is None or k.shape[2] == 1:
            return k.view_as(k), v
        order = self.kept.sort()
        if self.mass is not None:
            self.mass = writable(self.mass)
            self.mass[:, :, : self.kept.filled] = self.mass.gather(2, order)
        keys, values, _ = self.kept.held()
        return appended(keys, k), appended(values, v)

    def attend(self, query, key, value, scaling):
        """(B, T, H, P), or None to attend all keys as the model always does."""
        (k, v), self.new, T = self.new, None, query.shape[2]
        columns = torch.arange(self.seen - T, self.seen, device=k.device).expand(len(k), k.shape[1], T)
        with torch.no_grad():
            if self.kept is None:
                out = self.read(query, k, v, scaling)
                self.choose(query, k, v, columns, None, scaling)
                return out
            if T == 1:
                return self.step(query[:, :, 0], k, v, scaling)[:, None]
            columns = torch.cat([self.kept.index[:, :, : self.kept.filled], columns], 2)
            seen = self.visible(key, T)
            out = attend_seen(query, key, value, seen, scaling)
            self.choose(query, key, value, columns, seen, scaling)
            return out

    def read(self, query, k, v, scaling):
        """Attention of a prompt, (B, T, H, P), where what its keys receive comes of it; None: as the model always does,
        which has a gradient, padding, probabilities to tell, and autocast's dtype."""
        other = query.requires_grad or self.call.probabilities or torch.is_autocast_enabled(query.device.type)
        if self.settings.policy != "h2o" or self.call.real is not None or other:
            return None
        out, self.mass = attend_received(query, k, v, scaling)
        return out

    def step(self, q, k, v, scaling):
        """One token: evict, write, attend."""
        if self.settings.policy not in ("h2o", "tova"):
            if self.settings.policy == "snapkv" and self.kept.filled == self.kept.keys.shape[2]:
                self.kept.enlarge(max(ROOM, self.kept.filled // 8))
            self.put_newest(k, v)
            self.turn_sinks()
            keys, values, real = self.kept.held()
            return decode(q, keys, values, scaling, real)
        self.rank_by_mass()
        slot = self.put_newest(k, v)
        keys, values, real = self.kept.held()
        out, logp = decode_with_scores(q, keys, values, scaling, real)
        mass = self.mass.scatter(2, slot, 0)
        if self.settings.policy == "h2o":
            mass[:, :, : self.kept.filled] += logp.exp().unflatten(1, (k.shape[1], -1)).amax(2)
        else:
            mass[:, :, : self.kept.filled] = self.over_heads(logp)
        new = None if self.call.source is None else self.call.real[:, self.seen - 1, None, None]
        self.mass = mass if new is None else torch.where(new, mass, self.mass)
        return out

    def rank_by_mass(self):
        """What has received the least goes first; the newest half and pinned tokens stay."""
        kept, recent, real = self.kept, self.settings.recent, self.real_until(self.seen)
        newest = kept.index >= self.seen - recent
        if real is not None:
            newest = pick(real.flip(1).cumsum(1).flip(1) <= recent, kept.index.clamp(min=0))
        rank = self.mass.double().masked_fill(newest, torch.finfo(torch.float64).max)
        rank = rank.masked_fill(kept.rank == torch.inf, torch.inf)
        kept.rank = rank if kept.real is None else rank.masked_fill(~kept.real, -torch.inf)

    def visible(self, key, T):
        """(B, G, T, m + T) bool: what is kept, and the new columns up to the query's own."""
        (B, G), m = key.shape[:2], self.kept.filled
        real = torch.ones(B, G, m, dtype=torch.bool, device=key.device)
        real = real if self.kept.real is None else self.kept.real[:, :, :m]
        new = torch.ones(T, T, dtype=torch.bool, device=key.device).tril().expand(B, G, T, T)
        if self.call.real is not None:
            itself = torch.eye(T, dtype=torch.bool, device=key.device)  # a padded query must see something
            new = new & self.call.real[:, None, None, self.seen - T :] | itself
        return torch.cat([real[:, :, None].expand(-1, -1, T, -1), new], 3)

    def choose(self, query, keys, values, columns, seen, scaling):
        """Keep K of keys (B, G, n, P), which came from columns (B, G, n). seen: what each query saw, None: causal."""
        settings, n, T = self.settings, keys.shape[2], query.shape[2]
        real = None if self.call.real is None else pick(self.call.real, columns)
        pinned, mass = pick(self.pinned(self.seen, keys), columns), None
        if settings.policy == "streaming":
            scores = torch.arange(n, dtype=torch.float32, device=keys.device).expand(*keys.shape[:2], n)
        elif settings.policy == "snapkv":
            scores = self.watched(query, keys, scaling, real) if self.kept is None else None
        elif settings.policy == "tova":
            last = self.call.last(query, 1)[:, :, 0]
            scores = mass = self.over_heads(scores_of(last, keys, scaling, real)).expand(*keys.shape[:2], n)
            if self.kept is not None and self.call.source is not None:  # rows without a new token remember their last
                before = F.pad(self.mass[:, :, : self.kept.filled], (0, T))
                scores = mass = torch.where(self.call.source[:, -1, None, None] < 0, before, mass)
        else:
            if seen is None:
                seen = torch.ones(T, n, dtype=torch.bool, device=keys.device).tril(n - T)
            if real is not None:
                seen = seen & real[:, :, None] & real[:, :, -T:, None]
            known = self.kept is None and self.mass is not None  # from `read`
            mass = self.mass if known else received(query, keys, scaling, seen)
            if self.kept is not None and self.mass is not None:
                mass[:, :, : self.kept.filled] += self.mass[:, :, : self.kept.filled]
            scores = mass
        if scores is None:  # what follows SnapKV's prompt stays
            index = torch.arange(n, device=keys.device).expand(*keys.shape[:2], n)
        else:
            index = top(scores.masked_fill(pinned, torch.inf), settings.budget, settings.recent, 0, real)
        room = index.shape[2] + ROOM if settings.policy == "snapkv" else self.capacity
        self.kept = Kept(keys, values, index, room, real, pinned)
        self.kept.index[:, :, : index.shape[2]] = columns.gather(2, index)
        if mass is not None:
            self.mass = F.pad(mass.gather(2, index), (0, self.capacity - index.shape[2]))
        self.turn_sinks()

    def over_heads(self, logp):
        """(B, 1, n): the mean of probabilities over all heads, from their logarithms (B, H, n) (TOVA)."""
        mean = logp.exp().mean(1)
        if logp.shape[1] < self.settings.num_attention_heads:  # tensor parallel: other devices have the others
            mean = mean_over_devices(mean, self.call.mesh)
        return mean[:, None]

    def watched(self, query, keys, scaling, real):
        """(B, G, n): what a prompt's keys receive from the last `window` tokens of each row, the largest of neighbours
        (SnapKV). Of the heads that share a key the largest counts, which is ours: there each has its own."""
        n, T = keys.shape[2], query.shape[2]
        window, known = min(self.settings.recent, T), self.real_until(n)
        if known is None:
            at, there = torch.arange(n - window, n, device=query.device)[None], None
        else:
            at = known.int().argsort(dim=1, stable=True)[:, -window:]  # tokens come last
            there = known.gather(1, at) & (at >= n - T)
        seen = torch.arange(n, device=query.device) <= at[..., None]
        if there is not None:
            seen = seen & there[..., None] & known[:, None]
        rows = (at - (n - T)).clamp(min=0)[:, None, :, None].expand(len(query), query.shape[1], -1, query.shape[3])
        mass = received(query.gather(2, rows), keys, scaling, seen[:, None])
        return pooled(mass, keys.shape[1], "max", self.settings.pool_kernel, known)

    def turn_sinks(self):
        """Move the sinks of each row on by the number of tokens that it has forgotten."""
        if self.settings.rope_mode == "absolute":
            return
        kept, real = self.kept, self.real_until(self.seen)
        count = torch.full((len(kept.keys),), self.seen, device=kept.keys.device) if real is None else real.sum(1)
        before = torch.zeros_like(count) if self.evicted is None else self.evicted
        self.evicted = (count - kept.filled).clamp(min=0)
        columns = kept.index.masked_fill(kept.rank != torch.inf, self.seen)
        slots = columns.topk(min(self.settings.sinks, columns.shape[2]), 2, largest=False).indices
        rows = slots[..., None].expand(-1, -1, -1, kept.keys.shape[3])
        now = kept.keys.gather(2, rows)
        if self.sink_keys is None or self.sink_keys.shape != now.shape:
            self.sink_keys = now
        own = self.sink_keys = torch.where(before.view(-1, 1, 1, 1) > 0, self.sink_keys, now)  # so far nothing turned
        cos, sin = (x.float() for x in self.call.table(own, self.evicted[:, None]))
        norm = (cos.square() + sin.square()).sqrt()  # keys are scaled already, where the table is
        wide = torch.promote_types(own.dtype, torch.float32)
        moved = turned(own.to(wide), cos / norm, sin / norm).to(own.dtype)
        is_sink = kept.rank.gather(2, slots) == torch.inf
        moved = torch.where(is_sink[..., None] & (self.evicted > 0).view(-1, 1, 1, 1), moved, now)
        kept.keys = put_rows(roomy(writable(kept.keys), moved), slots, moved)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted keys cannot come back."""
        if tokens_to_remove:
            raise ValueError(
                f"The policy {self.settings.policy!r} has evicted keys and cannot go {abs(tokens_to_remove)} tokens "
                "back. Keep a copy (copy.deepcopy(cache)) at the point that you want to return to."
            )
