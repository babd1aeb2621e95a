"""What every language model of the zoo shares around its blocks: embedding, arrangement of the batch, cache, head.

B batch, T time, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from scrubjay.kernels.dispatch import one_token, traced
from scrubjay.kernels.tied import looked_up, scores, shared
from scrubjay.modeling.inputs.arguments import given, refuse_unknown
from scrubjay.modeling.inputs.cache_argument import (
    CACHE,
    ZooCausalLMOutput,
    ZooModelOutput,
    by_its_name,
    named,
    pop_cache,
    takes_cache,
)
from scrubjay.modeling.inputs.columns import Columns, Marks, one_text_a_row
from scrubjay.modeling.inputs.positions import without_positions
from scrubjay.modeling.layers import RMSNorm, normed, project
from scrubjay.modeling.layout import arrange
from scrubjay.modeling.losses import causal_lm_loss
from scrubjay.modeling.pretrained import ZooPreTrainedModel
from scrubjay.modeling.training.adapters import for_peft, hooked, refuse_prefix
from scrubjay.modeling.training.context_parallel import SequenceShard

# Columns that a block takes at a time on a CPU when no gradient is wanted, which bounds the memory of its temporaries.
# Fewer read the weights more often: 2048 tokens took 7 % longer in four segments of 512 than in one.
SEGMENT = 2048


class ZooModel(ZooPreTrainedModel):
    """Embedding, blocks, final norm. Subclasses give `block_class`, called as block(x, layout, state).

    A block's state is the cache's layer at its place in `layers`, wherever the block was when the model was made.
    """

    block_class: Callable[..., nn.Module]
    norm_eps_name = "rms_norm_eps"
    has_padding_row = False  # whether the embedding of pad_token_id is zero and learns nothing

    def __init__(self, config):
        config.validate()  # from_pretrained changes fields after it has read them
        super().__init__(config)
        padding_row = config.pad_token_id if self.has_padding_row else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_row)
        self.layers = nn.ModuleList(self.make_block(i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, getattr(config, self.norm_eps_name))
        self.gradient_checkpointing = False
        self.post_init()

    def make_block(self, place: int) -> nn.Module:
        """The block that is made for this place in `layers`."""
        return self.block_class(self.config)

    def embed(self, inputs_embeds):
        """What happens to embeddings before the first block."""
        return inputs_embeds

    def locate(self, layout, dtype):
        """The layout with what blocks need to know of positions."""
        return layout

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
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        shard: SequenceShard | None = None,
        columns: Columns | None = None,
        words: torch.Tensor | None = None,
        **kwargs,
    ) -> ZooModelOutput:
        """(B, T) tokens to (B, T, D) hidden states.

        Args:
            attention_mask: (B, T), or with a cache (B, seen + T): 1 for tokens, 0 for padding anywhere in a row. Also
                the numbers of packed documents from 1 on, or what is added to scores; see `masks.MASKS`.
            position_ids, cu_seq_lens_q, seq_idx: mark packed documents, as collators give them: positions that restart,
                offsets (D + 1,) over the B * T columns, or document numbers (B, T), negative at padding. Padding beside
                documents comes back as zeros. Positions are counted by the model. torch.export: one document a row.
            cu_seq_lens_k: the same as cu_seq_lens_q.
            cache: the model's own, advanced in place: the text of each row goes on, and a document that starts with the
                call is refused. Not so position_ids of 0 in a call of one column, which nobody looks at, so that a
                decode step waits for no value. `past_key_values` is the same, as before transformers 5.24.
            inputs_embeds: (B, T, D) instead of input_ids.
            shard: the T columns are one rank's slice of longer rows, as `shard_sequence` says.
            columns: what a head has read of these arguments already.
            words: the embedding's weight as a head shares it; see kernels/tied.py.

        Raises:
            ValueError: inputs that do not fit each other or the cache, or that the model does not know; each says what
                came and what was needed.
        """
        refuse_unknown(self, {"output_attentions": self.config.output_attentions} | kwargs)
        x, held = self._embedded(input_ids, inputs_embeds, words), cache
        cache, use_cache = self._cache(held, use_cache, x)
        seen = 0 if cache is None else cache.get_seq_length()
        counts = cache.layers[0].counts.to(x.device) if seen else None
        marks = Marks(attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        columns = self.read(x.shape[:2], x.device, marks, held) if columns is None else columns.to(x.device)
        cache = None if columns.packed else cache  # documents that end in a row have no state to hand on
        plan = arrange(columns, counts, shard is None and one_token(x))
        layout = plan.layout if shard is None else _slice(plan.layout, shard, x.shape, seen, cache)
        layout = self.locate(layout, x.dtype)
        x = plan.enter(self.embed(x))
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x, states, notes = self._through(x, plan, layout, cache, output_hidden_states)
        if shard is not None:
            notes = [shard.sum(note) for note in notes]
        x = plan.leave(normed(self.norm, x, layout))
        hidden_states = (*states, x) if output_hidden_states else None
        return self.output(
            notes, last_hidden_state=x, hidden_states=hidden_states, **named(cache if use_cache else None)
        )

    def _through(self, x, plan, layout, cache, keep):
        """x after all blocks; if `keep`, the hidden states before each, as the caller's columns are; and the notes."""
        states: list[torch.Tensor] = []
        notes: list[torch.Tensor] = []
        for place, block in enumerate(self.layers):
            if keep:  # what is returned is what goes on, so that gradients reach it
                states.append(plan.leave(x))
                x = plan.enter(states[-1])
            x = self._run(block, place, x, layout, cache, notes)
        return x, states, notes

    def holds(self, cache, marks, columns):
        return cache.layers[0].counts > 0

    def output(self, notes, **fields):
        """What forward returns. `notes`: what blocks gave beside their output, in order."""
        return ZooModelOutput(**fields)

    def _embedded(self, input_ids, inputs_embeds, words):
        given(input_ids, inputs_embeds, self.config.hidden_size)
        if inputs_embeds is not None:
            return inputs_embeds
        if words is not None:
            return looked_up(input_ids, words, self.embed_tokens.padding_idx)
        return self.embed_tokens(input_ids)

    def _cache(self, cache, use_cache, x):
        """The cache to advance, if any, and whether to return it."""
        if use_cache is None:  # a training step has no use for one, and its states would hold the graph
            use_cache = self.config.use_cache and not self.training
        checkpointing = self.checkpoints(cache)
        self.check_places()
        if cache is not None:
            self.check_cache(cache)
            cache.check(self.config, x.shape[0])
            return cache, use_cache
        if not use_cache or checkpointing:
            return None, False
        return self.cache_class(self.config), True

    def _run(self, block, place, x, layout, cache, notes):
        """One block over all columns, in segments where that saves memory.

        A block gives its output, or a pair: the output, and sums over tokens that are kept in `notes`.
        """
        T = x.shape[1]
        whole = T <= SEGMENT or torch.is_grad_enabled() or x.device.type != "cpu"
        if whole or traced() or layout.cu_seqlens is not None or layout.shard is not None:
            pieces = ((x, layout),)
        else:
            cache = cache if cache is not None else self.cache_class(self.config)
            cuts = [(start, min(start + SEGMENT, T)) for start in range(0, T, SEGMENT)]
            pieces = [(x[:, a:b], layout.segment(a, b)) for a, b in cuts]
        outs = []
        for piece, part in pieces:
            outs.append(block(piece, part, state=None if cache is None else cache.layers[place]))
            if cache is not None:
                cache.count(place, piece.shape[1], part.lengths)
        if isinstance(outs[0], tuple):
            outs, sums = zip(*outs, strict=True)
            notes.append(sum(sums))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def _slice(layout, shard, shape, seen, cache):
    """The layout of one rank's columns; the cache counts those before them."""
    shard.check(shape, layout, seen)
    for layer in () if cache is None else cache.layers:
        layer.skip(shard.start)
    return replace(layout, positions=layout.positions + shard.start, shard=shard)


class ZooForCausalLM(ZooPreTrainedModel, GenerationMixin):
    """A `ZooModel` and its language-model head. Subclasses set `model_class`, and have GenerationMixin among their own
    bases: of a class that was loaded with a folder and has not, transformers makes a second, which cannot be pickled.
    """

    model_class: type[ZooModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init_subclass__(cls, **kwargs):
        """Trainer shifts the labels, where it smooths them itself, of models whose names stand in a list."""
        super().__init_subclass__(**kwargs)
        if cls.config_class is not None:
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"{cls.config_class.model_type}: {cls.__name__}"] = cls.__name__

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> ZooCausalLMOutput:
        """(B, T) tokens to (B, T, V) logits, and the loss where `labels` (or `shift_labels`) are given.

        Args:
            labels: (B, T), -100 where nothing is asked; shifted inside. `shift_labels` (B, T) are not.
            logits_to_keep: last columns whose logits are wanted, 0 for all; or their indices (int) or mask (bool), 1-D.
            num_items_in_batch: number by which the summed loss is divided; None takes the mean.
            shard: see `shard_sequence`. The loss is that of all ranks' columns, and asks for `shift_labels`.
            Others: see `forward` of the model without head.
        """
        shard = kwargs.get("shard")
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        words, head_words = (None if input_ids is None else self._shared_words()) or (None, None)
        if words is not None:
            kwargs["words"] = words
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        x = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        x = x if isinstance(keep, int) else x[:, keep]
        logits, loss = self.head(x, head_words), None
        if labels is not None or loss_kwargs.get("shift_labels") is not None:
            compute = self.loss_function if shard is None else partial(shard.loss, self.loss_function)
            loss = compute(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        kept = {
            CACHE: getattr(outputs, CACHE),
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        out = ZooCausalLMOutput(loss=loss, logits=logits, **kept)
        return self.output(out, outputs, labels, shard=shard, **loss_kwargs)

    def _shared_words(self):
        """The weight of embedding and head where they share one and nothing acts on either, to save memory of its
        gradient; else None."""
        if not isinstance(self.model, ZooModel):
            return None
        embedding, head = self.model.embed_tokens, self.lm_head
        if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.weight is not embedding.weight:
            return None
        unusual = embedding.max_norm is not None or embedding.scale_grad_by_freq or head.bias is not None
        return None if unusual or hooked(embedding) or hooked(head) else shared(head.weight)

    def head(self, x, words=None):
        """The logits (..., V) of hidden states (..., D), in float32 or wider. `words`: see `_shared_words`."""
        logits = project(self.lm_head, x) if words is None else scores(x, words)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def output(self, out, outputs, labels, num_items_in_batch=None, shift_labels=None, shard=None):
        """What forward returns: `out`, to which a model may add what its blocks gave beside the hidden states."""
        return out

    def generate(self, *args, **kwargs):
        """As in transformers; the cache may be given by either name on every version, and a mask in any convention.

        Raises:
            ValueError: packed documents.
        """
        return super().generate(*args, **by_its_name(one_text_a_row(kwargs, *args[:1])))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Give generate() the model's own cache; `cache_implementation` may be "dynamic" or "offloaded"."""
        refuse_prefix(self)
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "dynamic_full", "offloaded"):
            raise ValueError(
                f"{type(self).__name__} has one cache, its own, and needs no {wanted!r} one. "
                'Leave cache_implementation out, or pass "offloaded".'
            )
        if model_kwargs.get(CACHE) is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        model_kwargs[CACHE] = self.cache_class(self.config, offload=wanted == "offloaded")

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        """As in transformers, which would feed the whole prompt again when it holds nothing new."""
        cache = pop_cache(kwargs)
        if next_sequence_length is not None and next_sequence_length < 1:
            given = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            raise ValueError(
                f"The cache holds {cache.get_seq_length()} columns and the prompt has {given}: nothing is new. Pass "
                "the whole conversation with at least one new token, or only the new tokens with an attention_mask "
                "that covers the old ones too."
            )
        inputs = {"next_sequence_length": next_sequence_length, "inputs_embeds": inputs_embeds, **named(cache)}
        prepared = super().prepare_inputs_for_generation(input_ids, **inputs, **kwargs)
        return for_peft(self, without_positions(prepared, 0 if cache is None else cache.get_seq_length()), cache)
