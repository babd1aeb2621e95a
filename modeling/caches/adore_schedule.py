"""What a call of ADORE's cache does, decided before layer 0 for all layers at once (arXiv:2407.02328).

B batch, T columns seen, q new, r brought back, m budget, w = min(m, T) slots in use.
"""

from typing import Any

import torch

from scrubjay.configuration.configuration_adore import AdoreSettings
from scrubjay.kernels.release import compacted, highest, ranking, release_step, visibility
from scrubjay.modeling.caches.adore_history import TokenHistory
from scrubjay.modeling.caches.adore_layer import AdoreLayer, Step
from scrubjay.modeling.decoder.attached import AttachedCache
from scrubjay.modeling.decoder.decoder_call import as_attention_takes_it, tokens_of


class AdoreSchedule(AttachedCache):
    """The tokens of a text, which of them are cached, released and brought back, and who sees whom.

    slots: (B, m) int64 columns of the history, -1 where a slot is free. last_rebuilt: (B, r) int64 columns that the
    last call brought back, -1 for none. last_attended: (B, .) int64 columns that it attended, its own among them,
    likewise. None all before the first call.
    """

    settings: AdoreSettings
    scorer: Any  # a Scorer
    layers: list[AdoreLayer]

    def _clear(self):
        self.history = TokenHistory()
        self.slots = None  # (B, m) columns of the history, -1 where a slot is free
        self.last_rebuilt = None  # (B, r) columns rebuilt by the last call, -1 for none
        self.last_attended = None
        self._table = None
        self._calls = 0
        self._step = None
        self._failed = False

    @property
    def from_host(self) -> bool:
        """Whether released tokens come back from host memory."""
        return self.layers[0].host is not None

    def _append(self, decoder, kwargs, real):
        """Enter the new columns into the history."""
        history, embedding = self.history, decoder.get_input_embeddings()
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None or self.settings.store == "embeds":
            history.embed(embedding)
        as_ids = embeds is None and self.settings.store == "ids" and "embeds" not in history.tables
        embeds = embedding(kwargs["input_ids"]) if embeds is None else embeds
        positions = history.locate(real)
        features, state = self.scorer.read(embeds, positions, real, history.state if history.rows else None)
        columns = {"positions": positions.int(), "real": real, "features": features}
        if self.from_host:
            first = self.layers[0].host.length
            columns["host"] = torch.arange(first, first + real.numel(), device=real.device).view_as(real).int()
        elif self.settings.rebuild:
            columns |= {"ids": kwargs["input_ids"].int()} if as_ids else {"embeds": embeds.detach()}
        self._failed = True  # until the call has ended well
        history.append(columns, state)
        if self._table is None or len(self._table) < history.capacity:
            self._table = self.scorer.table(history.capacity, embeds)

    def _plan(self, decoder, kwargs):
        """Decide the call: set the step, the slots, positions and mask; returns the columns brought back, (B, r)."""
        settings, history = self.settings, self.history
        new = tokens_of(kwargs).shape[1]
        seen = history.length - new
        if self.slots is None:
            self.slots = history.counts.new_full((history.batch_size, settings.cache_size), -1)
        rebuilt, is_rebuilt = self._rebuilt(seen)
        self.last_rebuilt = rebuilt.masked_fill(~is_rebuilt, -1)
        width = min(settings.cache_size, seen)
        held = self.slots[:, :width]
        fresh = torch.arange(seen, seen + new, device=held.device).expand(len(held), -1)
        columns = torch.cat([held, rebuilt, fresh], 1)
        is_real = torch.cat([held >= 0, is_rebuilt, history["real"][:, seen:]], 1)
        pos = history["positions"].gather(1, columns.clamp(min=0)).long()
        kept, target = self._admit(columns, is_real, pos, width, rebuilt.shape[1])
        if settings.release_before:
            is_real[:, :width] &= kept
        self.last_attended = columns.masked_fill(~is_real, -1)
        first = width + rebuilt.shape[1] if self.from_host else width  # of what runs through the model
        if seen:
            mask = visibility(pos[:, first:].clone(), pos, is_real)
            if settings.rebuild_mask == "full":
                mask[:, : rebuilt.shape[1]] |= is_real[:, None]
            kwargs["attention_mask"] = as_attention_takes_it(mask, decoder)
        self._step = Step(width + rebuilt.shape[1] - first, new, width, target)
        if first > width:
            self._step.back = history["host"].gather(1, rebuilt).cpu().long()
        if settings.position_mode == "compact":
            pos = compacted(pos, is_real)
            self._turn(decoder, pos, first)
        kwargs["position_ids"] = pos[:, first:]
        return rebuilt

    def _rebuilt(self, seen):
        """Columns (B, r) of the best released tokens, and which of them are to be rebuilt."""
        history, settings = self.history, self.settings
        count = min(settings.rebuild, max(0, seen - settings.cache_size))  # no row can have released more than that
        if self._calls % settings.rebuild_every:
            count = 0
        none = history.counts.new_zeros(history.batch_size, 0)
        if count == 0:
            return none, none.bool()
        cached = torch.zeros(len(none), seen + 1, dtype=torch.bool, device=none.device)
        cached.scatter_(1, torch.where(self.slots < 0, seen, self.slots), True)
        cached, real = cached[:, :seen], history["real"][:, :seen]
        pos = history["positions"][:, :seen]
        score = self._scores()[:, :seen]
        rank = ranking(score, pos, real & ~cached)
        found, is_real = highest(rank, count)
        if settings.rebuild_gate:
            worst = ranking(-score, pos, cached)  # its highest is the lowest score, whose sign is the one compared
            lowest = score.gather(1, highest(worst, 1)[0])
            is_real &= score.gather(1, found[:, :1]) > lowest
            if not bool(is_real.any()):
                return none, none.bool()
        return found, is_real

    def _scores(self, columns=None):
        """(B, C) scores of columns for the current token of each row; of all where none are named."""
        history = self.history
        features, pos = history["features"], history["positions"]
        if columns is not None:
            at = columns.clamp(min=0)
            features = features.gather(1, at[..., None].expand(-1, -1, features.shape[2]))
            pos = pos.gather(1, at)
        return self.scorer.score(features, pos.long(), history.counts[:, None] - 1, history.state, self._table)

    def _admit(self, columns, is_real, pos, width, rebuilt):
        """Let entries compete for the m slots: which of the first `width` slots stay (B, w), and where others go."""
        settings = self.settings
        if settings.rebuild_commit == "discard":  # what was rebuilt does not compete
            columns, is_real, pos = (
                torch.cat([x[:, :width], x[:, width + rebuilt :]], 1) for x in (columns, is_real, pos)
            )
        kept, target, self.slots = release_step(
            self._scores(columns), pos, is_real, columns, self.slots, width,
            self.history.counts, settings.sinks, settings.recent,
        )  # fmt: skip
        return kept, target

    def _turn(self, decoder, pos, first):
        """Give the step the rotations of compact positions (B, w + r + q), of which those from `first` on run."""
        like = torch.empty(0, dtype=decoder.dtype, device=pos.device)
        cos, sin = decoder.rotary_emb(like, pos)
        self._step.held = (cos[:, :first], sin[:, :first]) if first else None
        self._step.own = (cos[:, first:], sin[:, first:])

    def _inputs(self, decoder, kwargs, rebuilt):
        """The model's inputs with the rebuilt tokens in front."""
        if self._step.rebuilt == 0:
            return {}
        history = self.history
        if "ids" in history.tables:
            ids = kwargs["input_ids"]
            return {"input_ids": torch.cat([history["ids"].gather(1, rebuilt).to(ids.dtype), ids], 1)}
        new = kwargs.get("inputs_embeds")
        new = decoder.get_input_embeddings()(kwargs["input_ids"]) if new is None else new
        table = history["embeds"]
        old = table.gather(1, rebuilt[..., None].expand(-1, -1, table.shape[2])).to(new.dtype)
        return {"input_ids": None, "inputs_embeds": torch.cat([old, new], 1)}

    def real(self):
        """(B, seen) bool, which columns given so far are tokens; None before the first."""
        return self.history["real"] if self.history.rows else None
