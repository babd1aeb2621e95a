"""Taipan language models (arXiv:2410.18572): Mamba-2 blocks, and between them attention for tokens that a gate selects.

    Mamba-2 block     h <- h + Mixer(RMSNorm(h))
    selective layer   x = RMSNorm(h);  delta = gate(h);  a = sigmoid(delta);  m = [delta > 0]
                      h <- (1 - a) h + a W_O Attention(W_Q x, W_K x, W_V x)   where m = 1, over a sliding window
                      h <- h + SwiGLU(RMSNorm(h))                             for every token

No code was published, and the paper leaves much open; what was chosen, and the alternatives, stand in `TaipanConfig`.
Choices that matter: keys and values come from every token of the window, queries from selected ones alone; the budget
loss is given the soft probability p1 of every token, because with equation 3 as printed it would push tokens that were
not selected towards being selected; at inference there is no noise, and the share of tokens selected is what the gate
makes it, not C, unless `calibrate` has set the thresholds.

In training the budget loss is part of `loss`; in evaluation `loss` is the cross-entropy alone, so that it can be read
as a perplexity. With gradient accumulation (`num_items_in_batch`) it is weighted by the call's share of the labels, so
that the calls of one step sum to a mean, as the cross-entropy does. Packed documents (`seq_idx`, `cu_seq_lens_q` or
`position_ids` that restart) neither attend to each other nor share a state, and each has a budget of its own.

B batch, T time, D hidden size, H heads, K key heads, P head size, n selected tokens of the whole batch.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from scrubjay.configuration.configuration_taipan import TaipanConfig
from scrubjay.kernels.gate import logit, select, threshold_for
from scrubjay.kernels.rotary import rotary_table
from scrubjay.modeling.base import ZooForCausalLM, ZooModel
from scrubjay.modeling.caches.cache_taipan import TaipanCache
from scrubjay.modeling.heads import ZooForSequenceClassification, ZooForTokenClassification, asked
from scrubjay.modeling.inputs.cache_argument import ZooCausalLMOutput, ZooClassifierOutput, ZooModelOutput
from scrubjay.modeling.inputs.columns import Marks
from scrubjay.modeling.layers import GatedMLP, RMSNorm, normed
from scrubjay.modeling.modeling_ssd import SSDBlock, SSDMixer, SSDPreTrainedModel
from scrubjay.modeling.selective_layer import Gate, SelectiveAttention
from scrubjay.modeling.training.sharding import spread


@dataclass
class TaipanModelOutput(ZooModelOutput):
    """budget_loss: scalar, without its weight. selection: (selective layers, 3) shares of the real tokens, detached:
    selected in this call, mean of a, selected by argmax. sequence_selection: (rows or packed documents, selective
    layers, 3), the same of each; zeros where one has no real token.

    Out of training, and of heads without labels, budget_loss and selection are attributes and no items: pipelines take
    items apart row by row, and these have no rows."""

    budget_loss: torch.Tensor | None = None
    selection: torch.Tensor | None = None
    sequence_selection: torch.Tensor | None = None


@dataclass
class TaipanCausalLMOutput(ZooCausalLMOutput):
    """As `TaipanModelOutput`; `loss` holds budget_lambda * budget_loss in training."""

    budget_loss: torch.Tensor | None = None
    selection: torch.Tensor | None = None
    sequence_selection: torch.Tensor | None = None


@dataclass
class TaipanClassifierOutput(ZooClassifierOutput):
    """As `TaipanCausalLMOutput`."""

    budget_loss: torch.Tensor | None = None
    selection: torch.Tensor | None = None
    sequence_selection: torch.Tensor | None = None


def _with_shares(make, fields, items, **whole):
    """An output made of `fields`, that has what is said of the batch as a `whole`: `items`, or attributes alone."""
    if items:
        return make(**fields, **whole)
    out = make(**fields)
    for name, value in whole.items():
        object.__setattr__(out, name, value)  # whereas that of outputs makes an item of every field
    return out


class SelectiveBlock(GradientCheckpointingLayer):
    """Selective attention, then a feed-forward network for every token."""

    def __init__(self, config):
        super().__init__()
        self.attn = SelectiveAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.ffn = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x, layout, state=None, threshold=0.5):
        x, sums = self.attn(x, layout, state, threshold)
        return x + self.ffn(normed(self.ffn_norm, x, layout)), sums


class MixerBlock(SSDBlock):
    """A Mamba-2 block, with `mamba_mlp` followed by a feed-forward network."""

    def __init__(self, config):
        super().__init__(config)
        self.ffn = None
        if config.mamba_mlp:
            self.ffn_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
            self.ffn = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x, layout, state=None):
        x = super().forward(x, layout, state)
        return x if self.ffn is None else x + self.ffn(normed(self.ffn_norm, x, layout))


def _is_selective(block) -> bool:
    """Of a block as it was made, or with torch's wrapper for checkpoints around it."""
    return hasattr(block, "attn")


class TaipanPreTrainedModel(SSDPreTrainedModel):
    """Mamba-2 blocks start as their authors' do, selective layers as transformers usually do."""

    config_class = TaipanConfig
    cache_class = TaipanCache
    _no_split_modules = ["MixerBlock", "SelectiveBlock"]
    _keep_in_fp32_modules_strict = [
        "A_log",
        "D",
        "dt_bias",
        "gate",
    ]  # one bit of it decides whether a token is attended
    no_weight_decay = (*SSDPreTrainedModel.no_weight_decay, "gate")

    @torch.no_grad()
    def _init_weights(self, module):
        config = self.config
        if isinstance(module, Gate):
            init.normal_(module.weight, std=config.initializer_range)
            # half on each logit: delta starts at logit(C)
            bias = torch.tensor(config.capacity).logit() / 2 if config.gate_bias_init == "capacity" else torch.zeros(())
            init.copy_(module.bias, spread(torch.stack([-bias, bias]), module.bias))
            if module.hidden_weight is not None:
                init.normal_(module.hidden_weight, std=config.initializer_range)
                init.zeros_(module.hidden_bias)
        elif isinstance(module, nn.Linear):
            shrunk = config.rescale_prenorm_residual and hasattr(module, "ends_branch")
            init.normal_(module.weight, std=config.initializer_range * (config.num_branches**-0.5 if shrunk else 1))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SSDMixer):
            for part in (module.in_proj, module.out_proj, module):
                super()._init_weights(part)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def calibrate(
        self, input_ids: torch.Tensor, rate: float | None = None, attention_mask: torch.Tensor | None = None
    ) -> list[float]:
        """Set `config.eval_threshold` so that at inference a share `rate` of these tokens attends, in each layer.

        Nothing else makes that share the capacity: training controls the mean of a, inference asks where a > 1/2. One
        pass over the text for each selective layer, in order: what a layer selects changes what later ones see.

        Args:
            input_ids: (B, T) text like that to come; a few thousand tokens.
            rate: None is `config.capacity`.
            attention_mask: (B, T), as `forward` takes it; padding does not count. None: all are tokens.

        Returns: the share of this text that each selective layer selects, in order; with eval_gate="sample" the
            expected one.

        Raises:
            ValueError: a rate that is not between 0 and 1, a text of padding alone, or blocks that are not where the
                configuration says. After this or any other error nothing is changed.
        """
        rate = self.config.capacity if rate is None else rate
        if not 0 < rate < 1:
            raise ValueError(f"rate must lie between 0 and 1; got {rate}.")
        model, config, shares = self.base_model, self.config, []
        columns = model.read(input_ids.shape, input_ids.device, Marks.of({"attention_mask": attention_mask}), None)
        if columns.real is not None and not bool(columns.real.any()):
            raise ValueError("calibrate needs at least one real token; attention_mask says that all is padding.")
        model.check_places()
        before, thresholds, sampled = config.eval_threshold, list(config.thresholds), config.eval_gate == "sample"
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for place, layer in enumerate(config.selective_layers):
                delta = _deltas(model, layer, input_ids, columns)
                thresholds[place] = threshold_for(delta, rate, sampled)
                config.eval_threshold = list(thresholds)
                odds = torch.sigmoid(delta.double() - logit(thresholds[place]))
                shares.append(float((odds if sampled else select(delta, thresholds[place]).double()).mean()))
        except BaseException:
            config.eval_threshold = before
            raise
        finally:
            for module, training in modes:
                module.training = training
        return shares


def _deltas(model, layer, input_ids, columns):
    """(n,): what the gate of a layer says of the real tokens."""
    found: list[torch.Tensor] = []
    hook = model.layers[layer].attn.gate.register_forward_hook(lambda gate, args, delta: found.append(delta))
    try:
        model(input_ids=input_ids, columns=columns, use_cache=False)
    finally:
        hook.remove()
    delta = torch.cat(found, 1)  # of the segments of a long text
    if columns.real is None or columns.packed:  # blocks see the tokens alone
        return delta.flatten()
    lengths = columns.real.to(delta.device).sum(1, keepdim=True)
    return delta[torch.arange(delta.shape[1], device=delta.device) < lengths]  # blocks see real tokens first


class TaipanModel(TaipanPreTrainedModel, ZooModel):
    """Embedding, Mamba-2 and selective blocks, final norm."""

    norm_eps_name = "layer_norm_epsilon"

    def make_block(self, place):
        return (SelectiveBlock if place in self.config.selective_layers else MixerBlock)(self.config)

    def _run(self, block, place, *args):
        """A selective block is told its threshold, which belongs to its place as well."""
        if not _is_selective(block):
            return super()._run(block, place, *args)
        threshold = self.config.thresholds[self.config.selective_layers.index(place)]
        return super()._run(partial(block, threshold=threshold), place, *args)

    def check_places(self):
        super().check_places()
        places = [i for i, block in enumerate(self.layers) if _is_selective(block)]
        if places != list(self.config.selective_layers):
            raise ValueError(
                f"The model has selective blocks at {places} and its configuration at "
                f"{list(self.config.selective_layers)} (attention_every = {self.config.attention_every}), by which "
                "caches and checkpoints are made. Keep whole groups of blocks."
            )

    def locate(self, layout, dtype):
        if not self.config.rotary_dim:
            return layout
        return layout.with_rotary(rotary_table(layout.positions, self.config.rotary_dim, self.config.rope_theta, dtype))

    def output(self, notes, **fields):
        x = fields["last_hidden_state"]
        sums = torch.stack([note.to(x.device) for note in notes])  # (N, rows, 4)
        tokens, selected = sums[0, :, 3], sums[..., 0]
        capacity = self.config.capacity
        filled, total = tokens > 0, tokens.sum().clamp(min=1)
        if self.config.budget_reduction == "sequence":
            errors = (capacity - selected / tokens.clamp(min=1)).square() * filled
            budget = errors.sum() / filled.sum().clamp(min=1)
        else:
            budget = (capacity - selected.sum(1) / total).square().sum()
        found, real = sums.detach().split([3, 1], -1)
        fields["sequence_selection"] = (found / real.clamp(min=1)).transpose(0, 1)
        whole = {"budget_loss": budget, "selection": found.sum(1) / real.sum(1).clamp(min=1)}
        return _with_shares(TaipanModelOutput, fields, self.training, **whole)


class WithBudget:
    """What all heads share: the budget loss in their own, in training."""

    model_class = TaipanModel
    output_class: type[TaipanCausalLMOutput] | type[TaipanClassifierOutput]

    def output(self, out, outputs, labels, num_items_in_batch=None, shift_labels=None, shard=None):
        loss = out.loss
        if loss is not None and self.training:
            share = 1.0
            if num_items_in_batch is not None:
                count = self.asked(labels[..., 1:] if shift_labels is None else shift_labels).to(loss.device)
                share = (count if shard is None else shard.sum(count)) / num_items_in_batch
            loss = loss + self.config.budget_lambda * share * outputs.budget_loss
        fields = {**out, "loss": loss, "sequence_selection": outputs.sequence_selection}
        whole = {"budget_loss": outputs.budget_loss, "selection": outputs.selection}
        return _with_shares(self.output_class, fields, self.training or loss is not None, **whole)

    def asked(self, targets):
        """How many labels the loss has counted."""
        return (targets != -100).sum()


class TaipanForCausalLM(TaipanPreTrainedModel, WithBudget, ZooForCausalLM, GenerationMixin):
    """Taipan language model."""

    output_class = TaipanCausalLMOutput


class TaipanForSequenceClassification(TaipanPreTrainedModel, WithBudget, ZooForSequenceClassification):
    """Taipan with scores of a text."""

    output_class = TaipanClassifierOutput

    def asked(self, targets):
        return asked(targets, self.config)


class TaipanForTokenClassification(TaipanPreTrainedModel, WithBudget, ZooForTokenClassification):
    """Taipan with scores of each token."""

    output_class = TaipanClassifierOutput


__all__ = [
    "TaipanForCausalLM",
    "TaipanForSequenceClassification",
    "TaipanForTokenClassification",
    "TaipanModel",
    "TaipanPreTrainedModel",
]
