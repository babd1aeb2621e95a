"""ADORE's cache (adaptive token release, arXiv:2407.02328) for decoders of transformers, which stay as they are.

One call with q new tokens a row, as the cache sees it:
    1. the new tokens enter the history and get features
    2. the scorer ranks tokens for the last new one of its row, from embeddings alone: all is decided before layer 0
    3. the R best released tokens are put in front of the new ones, so that one pass gives all of them keys and values
    4. each layer attends [slots | rebuilt | new] and stores the tokens that stay, at the slots that became free
    5. the hidden states of the rebuilt tokens are cut off
With rebuild_from="host" the keys and values of the R tokens come from host memory instead, as they were when the token
came. The model runs on the new tokens alone; each layer attends [slots | brought back | new].
The first call of a text is the decoder's own causal pass; of its keys and values m a row are stored.

Of the published formula: the cache is attended before it releases (m + R + 1 keys), rebuilt keys are dropped after the
step. Where the paper says nothing, `AdoreSettings` names the choice.

B batch, T columns seen, q new, r rebuilt, m budget, w = min(m, T) slots in use, H key heads, P head size.
"""

import dataclasses
import os
from typing import Any

import torch
from torch import nn

from scrubjay.configuration.configuration_adore import AdoreSettings, warn_of_fixed_order
from scrubjay.modeling.caches.adore_history import TokenHistory
from scrubjay.modeling.caches.adore_layer import AdoreLayer, row_bytes
from scrubjay.modeling.caches.adore_schedule import AdoreSchedule
from scrubjay.modeling.caches.calibration import Calibrated, looked_at
from scrubjay.modeling.caches.host_rows import HostRows
from scrubjay.modeling.caches.saved_tensors import read_tensors, write_tensors
from scrubjay.modeling.decoder.attached import decoder_of
from scrubjay.modeling.decoder.controller import Scorer, check_scorer, scorer_for
from scrubjay.modeling.decoder.decoder_call import (
    check_adore_decoder,
    check_layers,
    check_rows,
    check_sizes,
    cut,
    device_of,
    each,
    joined,
    one_text,
    shape_of,
    tokens_of,
)
from scrubjay.modeling.inputs.cache_argument import named
from scrubjay.modeling.training.adapters import in_use

SINKS = 4  # of the policy "streaming", where `sinks` says nothing


class AdoreCache(Calibrated, AdoreSchedule):
    """Holds `cache_size` tokens of each row and rebuilds `rebuild` released ones with every step.

    Pass it as `cache` (before transformers 5.24 as `past_key_values`) to the model's forward or generate(). It takes
    part in the calls of this very model that are given it, and in no other; `close()` it, use it with `with`, or drop
    it to end that. Positions are those of the real tokens of each row: it counts them by the attention_mask, whatever
    position_ids say, but for packed documents, which are refused: a cache holds one text a row. Padding is remembered:
    a later mask, (B, T) or (B, seen + T), speaks of the new columns alone.

    Bytes: layers * B * H * (m + 1) * (P_keys + P_values) * itemsize of keys and values, whatever the number of tokens;
    and for each token, released or not, 4 (its id) + 4 + 1 + the features of its scorer (`controller_hidden` *
    itemsize; 4 for static scores, none for a policy), allocated in pieces of 256. With rebuild_from="host" also, on the
    host, layers * H * (P_keys + P_values) * itemsize for each token, and room for half as many more; pinned where the
    model is on CUDA. `nbytes` is all of it, `nbytes_by_place` says what is where.

    Args:
        model: a Llama, Qwen2, Qwen3 or Mistral model of transformers, with or without head, or an Adore model.
        settings: `AdoreSettings`; None takes those of an Adore model, else the defaults.
        controller: a trained `Controller`, any `Scorer`, or a policy by name: "recency", "streaming" (recency and,
            where `sinks` is 0, 4 sinks) or "random". None takes the controller of an Adore model, else "streaming".
        changes: fields of `AdoreSettings` by keyword: cache_size, rebuild, recent, sinks, ...

    Raises:
        ValueError: a model, settings or a controller that do not fit, with the reason.
    """

    row_bytes = staticmethod(row_bytes)
    size, searched = "cache_size", ("cache_size", "rebuild")
    stride_found = None  # no step attends all tokens
    scorer: Any  # of a pickle that is not yet attached, the name of its kind

    def __init__(
        self,
        model: nn.Module,
        settings: AdoreSettings | None = None,
        *,
        controller: Scorer | str | None = None,
        **changes,
    ):
        if not isinstance(settings, AdoreSettings | None):
            raise ValueError(f"settings must be AdoreSettings or fields by keyword (cache_size=...); got {settings!r}.")
        settings = settings or getattr(getattr(model, "config", None), "settings", None) or AdoreSettings()
        unknown = set(changes) - {field.name for field in dataclasses.fields(AdoreSettings)}
        if unknown:
            raise ValueError(f"AdoreCache has no setting {sorted(unknown)}. See AdoreSettings for those it has.")
        settings = dataclasses.replace(settings, **changes)
        if controller is None:
            controller = in_use(getattr(model, "controller", None)) or "streaming"
        if controller == "streaming" and settings.sinks == 0:
            settings = dataclasses.replace(settings, sinks=min(SINKS, settings.cache_size - settings.recent))
        decoder: Any = decoder_of(model)
        self._build(settings, scorer_for(controller, decoder), decoder.config.num_hidden_layers)
        self.attach(model)
        if settings.rebuild and not self.scorer.moving:
            warn_of_fixed_order(type(self.scorer).__name__, settings)

    def attach(self, model: nn.Module, controller: Scorer | None = None) -> None:
        """Take part in the calls of `model` that are given this cache: the model that it was made for, or its equal.

        Args:
            controller: after a pickle, which has no weights: the one that the cache had, if the model has none.

        Raises:
            ValueError: a model of other sizes, or another kind of controller.
        """
        decoder: Any = decoder_of(model)
        check_adore_decoder(decoder)
        if self.layers[0].is_initialized:
            check_sizes("This cache", [len(self.layers), *self.layers[0].keys.shape[1::2]], decoder)
        if isinstance(self.scorer, str):
            controller = controller or in_use(getattr(model, "controller", None))
            self.scorer = scorer_for(check_scorer("This cache", self.scorer, controller), decoder)
        super().attach(model)

    def _build(self, settings, scorer, num_layers):
        self.settings, self.scorer = settings, scorer
        host = settings.rebuild_from == "host" and settings.rebuild > 0
        super().__init__(layers=[AdoreLayer(settings.cache_size, host) for _ in range(num_layers)])
        self._clear()

    def _clear(self):
        super()._clear()
        self._pieces = None

    def enter(self, decoder: nn.Module, kwargs: dict) -> dict:
        """Put the rebuilt tokens before the new ones, with their positions and the mask of who sees whom."""
        if self._failed:
            raise ValueError("A call with this cache failed half way: its layers differ. reset() it or make a new one.")
        check_adore_decoder(decoder)
        check_layers(decoder, self)
        batch, _ = shape_of(decoder, kwargs)
        if self.history.rows:
            check_rows(self, self.history.batch_size, batch)
        kwargs = one_text(kwargs, self, self.history.length)
        real = self._real(kwargs)
        pieces = None
        if self.settings.prefill == "chunked" and real.shape[1] > self.settings.cache_size:
            if not bool(real.all()):
                raise ValueError(
                    "prefill='chunked' cuts all rows at the same columns, so a padded row would release other tokens "
                    "than it does alone. Give rows of one length, or use prefill='full'."
                )
            pieces, kwargs = self._run_ahead(decoder, kwargs)
            real = real[:, -tokens_of(kwargs).shape[1] :]
        kwargs = dict(kwargs)
        self._failed = pieces is not None  # they are in
        # scores are those of the state's own dtype, wherever the text is read
        with torch.no_grad(), torch.autocast(real.device.type, enabled=False):
            self._append(decoder, kwargs, real)
            rebuilt = self._plan(decoder, kwargs)
        kwargs |= self._inputs(decoder, kwargs, rebuilt)
        self._fetch(0)
        self._pieces = pieces
        return kwargs

    def leave(self, decoder: nn.Module | None, output):
        """Cut the rebuilt tokens off, and put what was run ahead in front."""
        step, pieces = self._step, self._pieces
        self._step = self._pieces = None
        if output is None:
            return None
        self._failed = False
        self._calls += 1
        if step.rebuilt:
            output = each(lambda x: cut(x, step.rebuilt), output)
        return output if pieces is None else each(joined, *pieces, output)

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """As transformers calls it, within a call that `enter` has prepared."""
        attended = super().update(key_states, value_states, layer_idx, self._step)
        self._fetch(layer_idx + 1)
        return attended

    def _fetch(self, layer_idx):
        """Send for what a layer needs from the host: the host gathers it while the device is a layer behind."""
        if self._step is not None and self._step.back is not None and layer_idx < len(self.layers):
            layer = self.layers[layer_idx]
            layer.host.fetch(self._step.back, layer.keys.device)

    def _real(self, kwargs):
        """Which of the new columns are tokens, (B, q) bool."""
        x, mask = tokens_of(kwargs), kwargs.get("attention_mask")
        if mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return mask[:, -x.shape[1] :]

    def _run_ahead(self, decoder, kwargs):
        """Outputs of all pieces of a prompt but the last, and the arguments of the last."""
        x, mask = tokens_of(kwargs), kwargs.get("attention_mask")
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        new, size = x.shape[1], self.settings.cache_size
        pieces = []
        for start in range(0, new, size):
            piece = dict(kwargs) | {name: x[:, start : start + size], "position_ids": None}
            if mask is not None:
                piece["attention_mask"] = mask[:, -new:][:, start : start + size]
            if start + size >= new:
                return pieces, piece
            self._ahead = True
            try:
                pieces.append(decoder(**piece))
            except BaseException:
                self._failed = self._failed or bool(pieces)
                raise
            finally:
                self._ahead = False

    def best_first(self):
        """See `Calibrated`."""
        return "rebuild", (16, 8, 4, 0) if self.scorer.moving else (0,)

    def refuses(self, settings):
        """See `Calibrated`."""
        try:
            dataclasses.replace(self.settings, **settings)
        except ValueError as error:
            return error
        labelled = getattr(getattr(self._model(), "config", None), "label_k", None)  # of an Adore model, where it says
        if labelled is not None and settings[self.size] < labelled:
            return f"cache_size must be label_k = {labelled} at least."
        return None

    def read(self, prompt):
        """See `Calibrated`."""

    def begun(self, settings, read, prompt):
        """See `Calibrated`."""
        cache = type(self)(self._model(), dataclasses.replace(self.settings, **settings), controller=self.scorer)
        self._model()(prompt, **named(cache), logits_to_keep=1)
        return cache

    def looked(self, prompt, rest, read):
        """See `Calibrated`."""
        return looked_at(self._model(), torch.cat([prompt, rest], 1), prompt.shape[1])

    def attended(self):
        """See `Calibrated`."""
        return [self.last_attended[:, None]] * len(self.layers)

    def reads(self, columns):
        """See `Calibrated`."""
        return min(columns, self.settings.cache_size + self.settings.rebuild + 1)

    def adopt(self, settings):
        """See `Calibrated`."""
        self._build(dataclasses.replace(self.settings, **settings), self.scorer, len(self.layers))
        config = getattr(self._model(), "config", None)
        if hasattr(config, "settings"):  # an Adore model's
            for name, value in dataclasses.asdict(self.settings).items():
                setattr(config, name, value)

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first token."""
        return self.history.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(self.nbytes_by_place.values())

    @property
    def nbytes_by_place(self) -> dict[str, int]:
        """Bytes of all tensors held, by where they are: where the model computes ("device"), or in the host's memory to
        come back from there ("host")."""
        layers = [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        others = [x for x in (self.slots, self._table) if x is not None]
        return {
            "device": sum(x.nbytes for x in layers + others) + self.history.nbytes,
            "host": sum(layer.host.nbytes for layer in self.layers if layer.host is not None),
        }

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._clear()

    def _map(self, change):
        rows = self.batch_size
        super()._map(change)
        self.history.map(change)
        if (
            self.from_host and not self._failed and self.batch_size < rows
        ):  # the rows that left are not held on the host for nothing
            numbers = self.history.renumber()
            for layer in self.layers:
                layer.host.keep(numbers)
        if self.slots is not None:
            self.slots = change(self.slots)
            self.last_rebuilt = change(self.last_rebuilt)

    def __getstate__(self):
        """What a pickle holds: of a scorer with weights its kind alone."""
        weights = next(self.scorer.parameters(), None) if isinstance(self.scorer, nn.Module) else None
        return super().__getstate__() | ({} if weights is None else {"scorer": type(self.scorer).__name__})

    def __deepcopy__(self, memo):
        """A fork shares the scorer, which holds no state of its own."""
        memo[id(self.scorer)] = self.scorer
        return super().__deepcopy__(memo)

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to one safetensors file, all of it or nothing; not the scorer."""
        if self.slots is None:
            raise ValueError("This cache is empty: run the model on a prompt before saving it.")
        tensors = {f"history.{name}": x for name, x in self.history.tensors().items()} | {"slots": self.slots}
        for i, layer in enumerate(self.layers):
            tensors |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
            if layer.host is not None:
                tensors[f"{i}.rows"] = layer.host.tensor()
        about: dict = {"settings": dataclasses.asdict(self.settings), "scorer": type(self.scorer).__name__}
        about |= {"seen": self.get_seq_length(), "calls": self._calls, "num_layers": len(self.layers)}
        write_tensors(path, tensors, type(self), about)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module, controller: Scorer | str | None = None) -> "AdoreCache":
        """Read what `save` wrote, for the same model and with the same kind of scorer.

        Raises:
            ValueError: a file of another kind of cache or of another model, or another scorer.
        """
        decoder: Any = decoder_of(model)
        tensors, about = read_tensors(path, cls)
        device = device_of(decoder)
        tensors = {name: x if name.endswith(".rows") else x.to(device) for name, x in tensors.items()}
        cache = cls(model, AdoreSettings(**about["settings"]), controller=controller)
        check_sizes(path, [about["num_layers"], tensors["0.keys"].shape[1], tensors["0.keys"].shape[3]], decoder)
        check_scorer(path, about["scorer"], cache.scorer)
        cache.history = TokenHistory.of(
            {name.removeprefix("history."): x for name, x in tensors.items() if name.startswith("history.")}
        )
        cache.settings = AdoreSettings(**about["settings"])  # a policy by name may have added sinks
        cache.slots, cache._calls = tensors["slots"], about["calls"]
        cache.last_rebuilt = cache.slots[:, :0]
        for i, layer in enumerate(cache.layers):
            layer.lazy_initialization(tensors[f"{i}.keys"], tensors[f"{i}.values"])
            if layer.host is not None:
                layer.host = HostRows(tensors[f"{i}.rows"])
            layer.keys, layer.values, layer.seen = tensors[f"{i}.keys"], tensors[f"{i}.values"], about["seen"]
        return cache
