"""Heads that give a text, or each of its tokens, scores of labels in place of the next token: classifiers and rewards.

B batch, T time, D hidden size, N labels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import can_return_tuple

from scrubjay.kernels.dispatch import traced
from scrubjay.modeling.base import ZooPreTrainedModel
from scrubjay.modeling.inputs.cache_argument import CACHE, ZooClassifierOutput, takes_cache
from scrubjay.modeling.inputs.columns import read_columns
from scrubjay.modeling.losses import causal_lm_loss

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class ZooClassifier(ZooPreTrainedModel):
    """A model without head and `score` (D -> N). Subclasses set `model_class`.

    The checkpoint of a language model loads with a new `score`; its `lm_head` is left out.
    """

    model_class: type[ZooPreTrainedModel]

    def __init__(self, config):
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = [*(self._keys_to_ignore_on_load_unexpected or ()), r"^lm_head\."]
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.score = self.make_score(config)
        self.post_init()

    def make_score(self, config) -> nn.Module:
        """The layer that is called `score`."""
        return nn.Linear(config.hidden_size, config.num_labels, bias=False)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ZooClassifierOutput:
        """(B, T) tokens to `logits`, in float32 or wider: see the class for their shape, and for that of `labels`.

        Args:
            use_cache: None makes no cache, which nothing here would read; one that is given is advanced.
            num_items_in_batch: number by which the summed loss is divided; None takes the mean.
            Others: see `forward` of the model without head.
        """
        seen = 0 if cache is None else cache.get_seq_length()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=cache is not None if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        said = {"mask": attention_mask, "position_ids": position_ids, "seen": seen}
        said |= {"cu_seqlens": kwargs.get("cu_seq_lens_q"), "seq_idx": kwargs.get("seq_idx")}
        shard = kwargs.get("shard")
        x = self.scored(outputs.last_hidden_state, input_ids, said, shard)
        logits = self.score(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None if labels is None else self.loss(logits, labels.to(logits.device), num_items_in_batch, shard)
        kept = {
            CACHE: getattr(outputs, CACHE),
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        out = ZooClassifierOutput(loss=loss, logits=logits, **kept)
        return self.output(out, outputs, None, num_items_in_batch, shift_labels=labels, shard=shard)

    def scored(self, x, input_ids, said, shard):
        """What `score` is called with, of the hidden states x (B, T, D). said: arguments of `read_columns`."""
        raise ValueError(f"{type(self).__name__} has no scores: subclasses of ZooClassifier define scored().")

    def loss(self, logits, labels, num_items_in_batch, shard):
        """Scalar."""
        raise ValueError(f"{type(self).__name__} has no loss: subclasses of ZooClassifier define loss().")

    def output(self, out, outputs, labels, num_items_in_batch=None, shift_labels=None, shard=None):
        """See `ZooForCausalLM.output`."""
        return out


class ZooForSequenceClassification(ZooClassifier):
    """Scores of a text: those at the last token of its row, wherever padding stands.

    logits: (B, N), or where documents are packed (documents, N) in their order. labels: (rows,) int64, -100 where
    nothing is asked; of a regression (rows,) or (rows, N) numbers; of several labels at once (rows, N), 0 or 1 each.
    `config.problem_type` says which; None is decided by N and the labels' dtype and kept, as in transformers.

    The attention_mask says what is padding. Without one, columns of `config.pad_token_id` at a row's end are taken for
    it, as in transformers.
    """

    def scored(self, x, input_ids, said, shard):
        if shard is not None:
            raise ValueError(
                f"{type(self).__name__} scores the last token of a row, which lies in one rank's slice alone. Pass "
                "whole rows, without shard_sequence."
            )
        shape = x.shape[:2]
        columns = read_columns(shape, x.device, **said)
        if columns.packed:
            if bool((columns.offsets.diff() == 0).any()):
                raise ValueError("A document without tokens has no score. Leave it out of cu_seq_lens_q.")
            return columns.gather(x)[columns.offsets[1:] - 1]
        real, pad = columns.real, self.config.pad_token_id
        if real is not None:
            _check_tokens(real)
        elif said["mask"] is None and input_ids is not None and pad is not None:
            real = (input_ids != pad).to(x.device)
        if real is None:
            return x[:, -1]
        return x[torch.arange(shape[0], device=x.device), shape[1] - 1 - real.flip(1).int().argmax(1)]

    def loss(self, logits, labels, num_items_in_batch, shard):
        return sequence_loss(logits, labels, self.config, num_items_in_batch)


class ZooForTokenClassification(ZooClassifier):
    """Scores of each token. logits: (B, T, N). labels: (B, T) int64, -100 where nothing is asked; they are not shifted.

    As in transformers, `score` has a bias unless `config.token_classification_bias` is False, and in training there is
    dropout before it of `config.classifier_dropout`, else `config.hidden_dropout`, else 0.1.
    """

    def make_score(self, config):
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        return nn.Linear(config.hidden_size, config.num_labels, bias=getattr(config, "token_classification_bias", True))

    def scored(self, x, input_ids, said, shard):
        return self.dropout(x)

    def loss(self, logits, labels, num_items_in_batch, shard):
        _check(labels, [logits.shape[:2]], "int64, one for each token")
        compute = causal_lm_loss if shard is None else partial(shard.loss, causal_lm_loss)
        return compute(
            logits=logits,
            labels=None,
            shift_labels=labels,
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
        )


def sequence_loss(logits, labels, config, num_items_in_batch=None):
    """transformers' loss of a classifier of texts, as a scalar: the mean over labels asked for, or the sum over
    `num_items_in_batch`.

    Raises:
        ValueError: labels of another shape than the logits and `config.problem_type` need; a problem_type not known.
    """
    rows, count = logits.shape
    if config.problem_type is None:
        whole = not labels.dtype.is_floating_point
        config.problem_type = PROBLEMS[0] if count == 1 else PROBLEMS[1] if whole else PROBLEMS[2]
    if config.problem_type not in PROBLEMS:
        raise ValueError(f"config.problem_type must be one of {PROBLEMS} or None; got {config.problem_type!r}.")
    if config.problem_type == PROBLEMS[1]:
        _check(labels, [(rows,), (rows, 1)], "int64, one for each row or packed document")
        return causal_lm_loss(logits, None, count, num_items_in_batch, shift_labels=labels.reshape(-1))
    shapes = [(rows, count)] + ([(rows,)] if count == 1 else [])
    _check(labels, shapes, f"numbers, {count} for each row or packed document")
    compare = F.mse_loss if config.problem_type == PROBLEMS[0] else F.binary_cross_entropy_with_logits
    total = compare(logits, labels.reshape(rows, count).to(logits.dtype), reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(total))


def _check_tokens(mask):
    real = mask.any(1)
    if traced():  # the values are not known yet
        torch._assert_async(real.all(), "A row has no token in this call by its attention_mask, and so no score.")
    elif not bool(real.all()):
        rows = (~real).nonzero()[:, 0].tolist()
        raise ValueError(
            f"Row {rows[0]} of {len(mask)} has no token in this call by its attention_mask, and so no score (rows "
            f"without: {len(rows)}). Leave such rows out."
        )


def _check(labels, shapes, what):
    if tuple(labels.shape) not in [tuple(shape) for shape in shapes]:
        needed = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"labels must have shape {needed} ({what}); got {tuple(labels.shape)}.")
