"""Heads that give a text, or each of its tokens, scores of labels in place of the next token: classifiers and rewards.

B batch, T time, D hidden size, N labels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import can_return_tuple

from scrubjay.modeling.inputs.arguments import given
from scrubjay.modeling.inputs.cache_argument import CACHE, ZooClassifierOutput, takes_cache
from scrubjay.modeling.inputs.columns import Columns, Marks, are_integers, check_rows_hold_tokens
from scrubjay.modeling.losses import label_loss
from scrubjay.modeling.pretrained import ZooPreTrainedModel

NUMBERS = "regression"  # transformers' names of what is asked of a text
ONE_LABEL = "single_label_classification"
SEVERAL_LABELS = "multi_label_classification"
PROBLEMS = (NUMBERS, ONE_LABEL, SEVERAL_LABELS)


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
        shard = kwargs.get("shard")
        x = given(input_ids, inputs_embeds, self.config.hidden_size)
        said = {"attention_mask": attention_mask, "position_ids": position_ids} | kwargs
        columns = self.model.read(x.shape[:2], x.device, Marks.of(said), cache)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=cache is not None if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            columns=columns,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        # without a mask, pad tokens that end a text are padding, as in transformers
        ids = input_ids if attention_mask is None and columns.real is None else None
        logits = self.score(self.scored(hidden, columns.to(hidden.device), ids, shard))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None if labels is None else self.loss(logits, labels.to(logits.device), num_items_in_batch, shard)
        kept = {
            CACHE: getattr(outputs, CACHE),
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        out = ZooClassifierOutput(loss=loss, logits=logits, **kept)
        return self.output(out, outputs, None, num_items_in_batch, shift_labels=labels, shard=shard)

    def scored(self, x, columns: Columns, ids, shard):
        """What `score` is called with, of the hidden states x (B, T, D). ids: input_ids, of which those that pad may
        end a text; or None."""
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

    The attention_mask says what is padding. Without one, columns of `config.pad_token_id` at the end of a row, or of a
    packed document, are taken for it, as in transformers.
    """

    def scored(self, x, columns, ids, shard):
        if shard is not None:
            raise ValueError(
                f"{type(self).__name__} scores the last token of a row, which lies in one rank's slice alone. Pass "
                "whole rows, without shard_sequence."
            )
        pad = self.config.pad_token_id
        real = columns.real if ids is None or pad is None else (ids != pad).to(x.device)
        if columns.packed:
            return _last_of_documents(x, columns, real if columns.real is None else None)
        if real is None:
            return x[:, -1]
        if columns.real is not None:
            check_rows_hold_tokens(real)
        return x[torch.arange(len(x), device=x.device), x.shape[1] - 1 - real.flip(1).int().argmax(1)]

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

    def scored(self, x, columns, ids, shard):
        return self.dropout(x)

    def loss(self, logits, labels, num_items_in_batch, shard):
        _check(labels, [logits.shape[:2]], "integers, one for each token", whole=True)
        compute = label_loss if shard is None else partial(shard.loss, label_loss)
        return compute(logits=logits, labels=None, shift_labels=labels, num_items_in_batch=num_items_in_batch)


def sequence_loss(logits, labels, config, num_items_in_batch=None):
    """transformers' loss of a classifier of texts, as a scalar: the mean over labels asked for, or the sum over
    `num_items_in_batch`.

    Raises:
        ValueError: labels of another shape than the logits and `config.problem_type` need; a problem_type not known.
    """
    rows, count = logits.shape
    problem = config.problem_type
    if problem is None:  # as transformers decides it
        numbered = labels.dtype in (torch.int64, torch.int32)
        problem = NUMBERS if count == 1 else ONE_LABEL if numbered else SEVERAL_LABELS
    if problem not in PROBLEMS:
        raise ValueError(f"config.problem_type must be one of {PROBLEMS} or None; got {problem!r}.")
    if problem == ONE_LABEL:
        _check(labels, [(rows,), (rows, 1)], "integers, one for each row or packed document", problem, whole=True)
        config.problem_type = problem
        return label_loss(logits, shift_labels=labels.reshape(-1), num_items_in_batch=num_items_in_batch)
    shapes = [(rows, count)] + ([(rows,)] if count == 1 else [])
    _check(labels, shapes, f"numbers, {count} for each row or packed document", problem)
    config.problem_type = problem
    compare = F.mse_loss if problem == NUMBERS else F.binary_cross_entropy_with_logits
    total = compare(logits, labels.reshape(rows, count).to(logits.dtype), reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(total))


def asked(labels, config) -> torch.Tensor:
    """How many labels of texts `sequence_loss` has counted, once `config.problem_type` is known: -100 is a number where
    numbers are asked for."""
    counted = labels != -100 if config.problem_type == ONE_LABEL else torch.ones_like(labels, dtype=torch.bool)
    return counted.sum()


def _last_of_documents(x, columns, real):
    """(documents, D): x (B, T, D) at the last token of each, of those that are `real` (B, T) where there is one; None:
    of all."""
    if bool((columns.offsets.diff() == 0).any()):
        raise ValueError("A document without tokens has no score. Leave it out of cu_seq_lens_q.")
    last = columns.offsets[1:] - 1
    if real is not None:
        number, _ = columns.located()
        token = torch.arange(len(number), device=x.device).masked_fill(~columns.gather(real), -1)
        found = torch.full_like(last, -1).scatter_reduce(0, number - 1, token, "amax")
        last = torch.where(found < 0, last, found)
    return columns.gather(x)[last]


def _check(labels, shapes, what, problem=None, whole=False):
    """Refuse labels of other shapes, and if they are to be `whole`, of other numbers than integers."""
    fits = tuple(labels.shape) in [tuple(shape) for shape in shapes]
    if fits and not (whole and not are_integers(labels)):
        return
    needed = " or ".join(str(tuple(shape)) for shape in shapes)
    got = f"got {tuple(labels.shape)} of {labels.dtype}"
    if problem is not None:
        got += f", read as {problem}. Labels of another kind are named by config.problem_type, one of {PROBLEMS}"
    raise ValueError(f"labels must have shape {needed} ({what}); {got}.")
