"""Models that carry a decoder of transformers together with a cache of the zoo. B batch, T time."""

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from scrubjay.modeling.base import ZooForCausalLM
from scrubjay.modeling.decoder.attached import AttachedCache, refuse_prefixes
from scrubjay.modeling.decoder.decoder_call import as_attention_takes_it, keep_caches, remembered
from scrubjay.modeling.inputs.arguments import given, refuse_unknown
from scrubjay.modeling.inputs.cache_argument import CACHE, ZooModelOutput, named, takes_cache
from scrubjay.modeling.inputs.columns import Columns, Marks
from scrubjay.modeling.pretrained import ZooPreTrainedModel
from scrubjay.modeling.training.adapters import prefix_tuned

DECODERS_OWN = ("output_hidden_states", "output_attentions", "recycled_tail")  # what goes on to the decoder as it is


class ZooWrapperPreTrainedModel(ZooPreTrainedModel):
    """What a `ZooWrapperModel` and all that stands on one share: new weights start by the decoder's own rule."""

    _supports_sdpa = True

    def _init_weights(self, module):
        self.base_model.decoder._init_weights(module)


class ZooWrapperModel(ZooWrapperPreTrainedModel):
    """A decoder of transformers whose default cache is the zoo's. Its parameters have the decoder's own names.

    Positions are those of the real tokens of each row, so that padding on any side changes nothing.
    """

    def __init__(self, config):
        try:
            config.validate()  # from_pretrained changes fields after it has read them
        except StrictDataclassError as error:  # is no ValueError, which a caller expects
            raise ValueError(str(error.__cause__ or error)) from error
        _check_devices(config)
        super().__init__(config)
        decoder = AutoModel.from_config(config.base_config)
        for name, child in decoder.named_children():
            self.add_module(name, child)
        self.cache_class.stay(decoder)
        self.__dict__["decoder"] = decoder  # not as a module: its children are this model's own, under their own names
        self._no_split_modules = decoder._no_split_modules
        keep_caches(decoder.layers)
        self.post_init()

    def __setattr__(self, name, value):
        """As in torch; what replaces a child (an adapter, other embeddings) does so in the decoder, too."""
        super().__setattr__(name, value)
        decoder = self.__dict__.get("decoder")
        if decoder is not None and name in decoder._modules:
            setattr(decoder, name, getattr(self, name))

    def get_decoder(self):
        """transformers' own model."""
        return self.decoder

    def set_input_embeddings(self, value):
        """The decoder's."""
        self.embed_tokens = value

    def train(self, mode: bool = True):
        """As in torch; the decoder follows."""
        self.decoder.training = mode
        return super().train(mode)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        columns: Columns | None = None,
        **kwargs,
    ) -> ZooModelOutput:
        """(B, T) tokens to (B, T, D) hidden states.

        Args:
            attention_mask: (B, T), or with a cache (B, seen + T): 1 for tokens, 0 for padding anywhere in a row. Also
                the numbers of packed documents from 1 on, or what is added to scores; see `masks.MASKS`. The zoo's
                caches remember the padding that they were given.
            position_ids, cu_seq_lens_q, seq_idx: mark packed documents, as collators give them: positions that restart,
                offsets (D + 1,) over the B * T columns, or document numbers (B, T), negative at padding. Rows of
                documents may be padded. Positions are counted by the model itself.
            cu_seq_lens_k: the same as cu_seq_lens_q.
            cache: the zoo's for this model, or one of transformers' (in generate() a `DynamicCache`): the text of each
                row goes on, and a document that starts with the call is refused. Not so position_ids of 0 in a call of
                one column, which nobody looks at, so that a decode step waits for no value. `past_key_values` is the
                same, as before transformers 5.24.
            columns: what a head has read of these arguments already.

        Raises:
            ValueError: inputs that do not fit each other or the cache, or that the model does not know; each says what
                came and what was needed.
        """
        _refuse_shard(self, kwargs)
        marks = Marks(attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        asked = {name: kwargs.pop(name) for name in DECODERS_OWN if kwargs.get(name) is not None}
        refuse_unknown(self, kwargs)
        self.check_places()
        flags = {name: getattr(self.config, name) for name in ("output_hidden_states", "output_attentions")}
        x = given(input_ids, inputs_embeds, self.config.hidden_size)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        use_cache = not self.checkpoints(cache) and use_cache
        columns = self.read(x.shape[:2], x.device, marks, cache) if columns is None else columns.to(x.device)
        use_cache = use_cache and not columns.packed  # documents that end in a row have nothing to hand on
        mask, positions = _arranged(columns, cache, self.decoder)
        if use_cache and cache is None:
            cache = self.cache_class(self)
        out = self.decoder(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **named(cache),
            **flags | asked,
        )
        return ZooModelOutput(**out)

    def check_cache(self, cache):
        if cache is not None and not isinstance(cache, Cache):
            name = self.cache_class.__name__
            raise ValueError(
                f"{type(self).__name__} needs a {name}, or a cache of transformers; got {type(cache).__name__}. Pass "
                f"{name}(model), or none."
            )

    def holds(self, cache, marks, columns):
        return cache.held(marks.attention_mask, columns) if isinstance(cache, AttachedCache) else None


def _refuse_shard(model, kwargs):
    if kwargs.get("shard") is not None:
        raise ValueError(
            f"{type(model).__name__} attends to every token before its own and hands no state from rank to rank: it "
            "cannot run on a slice of a sequence. Pass whole rows, without shard_sequence."
        )


def _check_devices(config):
    """Refuse to split attention over devices that its heads do not divide by (from_pretrained says how many there are).

    Raises:
        ValueError: what came, what was needed, what to do.
    """
    distributed = getattr(config, "distributed_config", None)
    devices, plan = getattr(distributed, "tp_size", None) or 1, getattr(distributed, "tp_plan", None)
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    own = isinstance(plan, dict) and any("self_attn" in name for name in plan)  # the caller's, which may split less
    if (heads % devices or keys % devices) and not own:
        raise ValueError(
            f"Tensor parallelism splits attention by heads, and {heads} heads with {keys} key heads cannot be shared "
            f"evenly by {devices} devices. Use a number that divides both, or shard_model, which takes any."
        )


class ZooWrapperForCausalLM(ZooWrapperPreTrainedModel, ZooForCausalLM):
    """A `ZooWrapperModel` and the decoder's language-model head. A checkpoint of the decoder loads as it is."""

    def get_decoder(self):
        """transformers' own model."""
        return self.model.decoder

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Give generate() the model's own cache; `cache_implementation` may be "dynamic", and a cache that is given
        the zoo's for this model or, for full attention, a `DynamicCache`.

        With prefix tuning it is transformers' own, as in training: keys of no token cannot be ranked among those that
        belong to one.
        """
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"{type(self).__name__} makes a cache of its own, which no {wanted!r} one can stand in for. Leave "
                "cache_implementation out; for full attention, pass DynamicCache(config=model.config)."
            )
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            refuse_prefixes(self)
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"{type(self).__name__} reads masks of tokens and padding, and generate() makes another for a "
                f"{type(cache).__name__}. For full attention, pass DynamicCache(config=model.config)."
            )
        if cache is not None or generation_config.use_cache is False or prefix_tuned(self):
            return super(ZooForCausalLM, self)._prepare_cache_for_generation(
                generation_config, model_kwargs, *args, **kwargs
            )
        model_kwargs[CACHE] = self.cache_class(self)


def _arranged(columns, cache, decoder):
    """The decoder's attention_mask and position_ids for a call."""
    if columns.packed:
        return _documents(columns, decoder)
    seen = 0 if cache is None else cache.get_seq_length()
    mask = _whole_mask(cache, seen, columns.shape, columns.mask)
    return mask, _positions(columns.shape, columns.device, mask, seen)


def _whole_mask(cache, seen, shape, mask):
    """(B, seen + T), from a mask of the new columns and what the cache knows of those before; None: no padding."""
    if not seen or not isinstance(cache, AttachedCache):
        return mask
    return remembered(cache.real(), mask, shape, seen)


def _documents(columns, decoder):
    """The 4-D mask under which documents see themselves, and positions (B, T) in each. Padding sees padding: attention
    that sees nothing is not a number."""
    number, position = (columns.spread(x) for x in columns.located())
    seen = (number[:, :, None] == number[:, None]).tril()
    return as_attention_takes_it(seen, decoder), position


def _positions(shape, device, mask, seen):
    """(B, T): numbers of the real tokens of each row, from 0."""
    if mask is None or mask.shape[1] != seen + shape[1]:
        return torch.arange(seen, seen + shape[1], device=device).expand(shape)
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -shape[1] :]
