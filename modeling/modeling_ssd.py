"""SSD language model (Mamba-2, arXiv:2405.21060, sections 6, 7 and 9; https://github.com/state-spaces/mamba).

    X <- X + Mixer(RMSNorm(X))        for each block; then a norm and the head
    X <- X + MLP(RMSNorm(X))          after each mixer, where the configuration has `intermediate_size`

In a hybrid the mixer of some blocks is attention (`attn_layer_idx`, attention_mixer.py).

Where this differs from other ports, and why: the step size is computed in float32 and its clamp holds in every path
(one token at a time too); the gated norm takes its mean over each group of channels, as the authors' kernel does;
states are float32; packed documents never mix; padding may stand anywhere.

B batch, T time, D hidden size, I = H * P inner width, H heads, P head_dim, G groups, N state size, K convolution taps.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from scrubjay.configuration.configuration_ssd import SSDConfig
from scrubjay.kernels.one_token import decay_token, ssd_token
from scrubjay.kernels.rotary import rotary_table
from scrubjay.kernels.ssd import log_decay, ssd, ssd_change
from scrubjay.modeling.attention_mixer import AttentionMixer
from scrubjay.modeling.base import ZooForCausalLM, ZooModel
from scrubjay.modeling.caches.cache_ssd import SSDCache
from scrubjay.modeling.heads import ZooForSequenceClassification, ZooForTokenClassification
from scrubjay.modeling.key_names import Copy, Rename, as_mapping
from scrubjay.modeling.layers import (
    CausalConv,
    GatedRMSNorm,
    RMSNorm,
    ends_branch,
    inverse_softplus,
    log_uniform,
    normed,
    project,
    swiglu,
)
from scrubjay.modeling.pretrained import ZooPreTrainedModel
from scrubjay.modeling.training.adapters import heads_of
from scrubjay.modeling.training.sharding import spread

NO_LIMIT = (0.0, float("inf"))  # of a step size, which is positive
LEAVES = (
    "norm.weight",
    "mixer.in_proj.weight",
    "mixer.in_proj.bias",
    "mixer.conv1d.weight",
    "mixer.conv1d.bias",
    "mixer.dt_bias",
    "mixer.A_log",
    "mixer.D",
    "mixer.norm.weight",
    "mixer.out_proj.weight",
    "mixer.out_proj.bias",
    "norm2.weight",
    "mlp.fc1.weight",
    "mlp.fc2.weight",
)


def key_names(embedding: str, prefix: str = "", head_written: bool = False):
    """Rows of a layout in which the embedding is called `embedding`, and whose files may repeat it as the head."""
    head = f"{prefix}lm_head.weight"
    return (
        Rename(f"{prefix}backbone.{embedding}.weight", "model.embed_tokens.weight"),
        *(Rename(f"{prefix}backbone.layers.*.{leaf}", f"model.layers.*.{leaf}") for leaf in LEAVES),
        Rename(f"{prefix}backbone.norm_f.weight", "model.norm.weight"),
        Rename(head, "lm_head.weight"),
        Copy(head, f"{prefix}backbone.{embedding}.weight", written=head_written),
    )


# The authors' files, transformers' own (fla's are called alike), and Mistral's, load as they are.
KEY_NAMES = {
    "mamba_ssm": key_names("embedding", head_written=True),
    "transformers": key_names("embeddings"),
    "codestral": key_names("embedding", prefix="model.", head_written=True),
}
register_checkpoint_conversion_mapping(SSDConfig.model_type, as_mapping(*KEY_NAMES.values()), overwrite=True)


class SSDMixer(nn.Module):
    """(B, T, D) -> (B, T, D). `in_proj` packs z (I), v (I), k (G N), q (G N), dt (H): the authors' [z, x, B, C, dt]."""

    def __init__(self, config):
        super().__init__()
        self.inner, self.keys, self.heads = config.inner_size, config.n_groups * config.state_size, config.num_heads
        self.groups, self.chunk, self.limit = config.n_groups, config.chunk_size, config.time_step_limit
        out = self.inner + config.conv_size + self.heads
        self.in_proj = nn.Linear(config.hidden_size, out, bias=config.use_bias)
        self.conv1d = CausalConv(config.conv_size, config.conv_kernel, config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedRMSNorm(self.inner, config.layer_norm_epsilon, self.groups)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.use_bias)

    def forward(self, x, layout, state=None):
        """`state`: the block's `StateLayer`, advanced in place, or None."""
        if layout.one_token and state is not None and type(self.norm) is GatedRMSNorm:
            return self._one_token(x, layout, state)
        B, T, _ = x.shape
        z, vkq, dt = project(self.in_proj, x).split([self.inner, self.inner + 2 * self.keys, self.heads], -1)
        conv, s = (None, None) if state is None else state.read(vkq)
        if layout.shard is not None:
            conv = layout.shard.halo(vkq, self.conv1d.taps - 1)
        vkq, conv = self.conv1d(vkq, conv, layout)
        v, k, q = vkq.split([self.inner, self.keys, self.keys], -1)

        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.limit)  # (B, T, H), step size > 0
        if layout.lengths is not None:
            dt = dt * layout.real  # a step of size 0 leaves the state as it is
        steps = (
            k.view(B, T, self.groups, -1),
            v.view(B, T, self.heads, -1),
            log_decay(dt, self.A_log.to(wide)),
            dt,
        )
        if layout.shard is not None:
            s = layout.shard.entering(*ssd_change(*steps))
        q = q.view(B, T, self.groups, -1)
        # `overwrite`: the cache's own, replaced below
        y, s = ssd(q, *steps, s, layout.cu_seqlens, chunk=self.chunk, overwrite=True)
        if state is not None:
            state.write(conv, s)
        skip = self.D[:, None].expand(-1, self.inner // self.heads).reshape(-1)
        return project(self.out_proj, self.norm(y.flatten(2), z, v, skip))

    def _one_token(self, x, layout, state):
        """`forward` of (B, 1, D) in fewer calls."""
        z, vkq, dt = project(self.in_proj, x).split([self.inner, self.inner + 2 * self.keys, self.heads], -1)
        conv, s = state.read(vkq)
        vkq, conv = self.conv1d(vkq, conv, layout)
        v, k, q = vkq.float().split([self.inner, self.keys, self.keys], -1)
        step = F.softplus(dt.float() + self.dt_bias.float())
        if tuple(self.limit) != NO_LIMIT:
            step = step.clamp_(*self.limit)
        q, k, v = q.view(len(x), self.groups, -1), k.view(len(x), self.groups, -1), v.view(len(x), self.heads, -1)
        y, s = ssd_token(q, k, v, decay_token(step, self.A_log.float()), step, s)
        state.write(conv, s)
        return project(self.out_proj, self.norm(y.addcmul_(v, self.D.float()[:, None]).view(z.shape), z))


class SSDMLP(nn.Module):
    """SwiGLU, (B, T, D) -> (B, T, D); `fc1` packs [up, gate]."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * size, bias=False)
        self.fc2 = ends_branch(nn.Linear(size, hidden_size, bias=False))

    def forward(self, x):
        return project(self.fc2, swiglu(project(self.fc1, x)))


class SSDBlock(GradientCheckpointingLayer):
    """Norm, mixer or attention, residual; with `mlp_size` then norm, MLP, residual."""

    def __init__(self, config, attends: bool = False, mlp_size: int = 0):
        super().__init__()
        self.attends = attends
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = (AttentionMixer if attends else SSDMixer)(config)
        self.mlp = None
        if mlp_size:
            self.norm2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
            self.mlp = SSDMLP(config.hidden_size, mlp_size)

    def forward(self, x, layout, state=None):
        x = x + self.mixer(normed(self.norm, x, layout), layout, state)
        return x if self.mlp is None else x + self.mlp(normed(self.norm2, x, layout))


class SSDPreTrainedModel(ZooPreTrainedModel):
    """Initialisation as in the authors' code."""

    config_class = SSDConfig
    cache_class = SSDCache
    _no_split_modules = ["SSDBlock"]
    # the recurrence multiplies an error in these over the whole sequence
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias"]
    no_weight_decay: tuple[str, ...] = ("A_log", "D", "dt_bias")

    @torch.no_grad()
    def _init_weights(self, module):
        config = self.config
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, nn.Linear) and any(module is head for head in heads_of(self)):
            init.normal_(module.weight, std=config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, CausalConv):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if config.rescale_prenorm_residual and hasattr(module, "ends_branch"):
                self._shrink(module)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (RMSNorm, GatedRMSNorm)):
            init.ones_(module.weight)
        elif isinstance(module, SSDMixer):
            self._init_mixer(module)

    def _init_mixer(self, mixer):
        config = self.config
        steps = log_uniform(mixer.heads, config.time_step_min, config.time_step_max, config.time_step_floor)
        init.copy_(mixer.dt_bias, spread(inverse_softplus(steps), mixer.dt_bias))
        rates = torch.empty(mixer.heads).uniform_(*config.A_initializer_range)
        init.copy_(mixer.A_log, spread(rates.log(), mixer.A_log))
        init.ones_(mixer.D)
        if config.rescale_prenorm_residual:
            self._shrink(mixer.out_proj)

    def _shrink(self, projection):
        """The start of a branch's last projection: as any other's, over the root of the number of blocks. With an MLP
        the authors mean twice that number, but their head's pass over all modules, which is the last, counts one
        branch a block."""
        bound = (projection.in_features * self.config.num_hidden_layers) ** -0.5
        init.uniform_(projection.weight, -bound, bound)


class SSDModel(SSDPreTrainedModel, ZooModel):
    """Embedding, SSD blocks and those of attention, final norm."""

    norm_eps_name = "layer_norm_epsilon"

    def make_block(self, place):
        return SSDBlock(self.config, place in self.config.attn_layer_idx, self.config.mlp_size)

    def check_places(self):
        super().check_places()
        places = [i for i, block in enumerate(self.layers) if block.attends]
        if places != list(self.config.attn_layer_idx):
            raise ValueError(
                f"The model has attention layers at {places} and its configuration at "
                f"{list(self.config.attn_layer_idx)} (attn_layer_idx), by which caches and checkpoints are made. Set "
                "config.attn_layer_idx to the places that they have now."
            )

    def locate(self, layout, dtype):
        sizes = self.config.attn_cfg
        if not self.config.attn_layer_idx or not sizes["rotary_emb_dim"]:
            return layout
        table = rotary_table(layout.positions, sizes["rotary_emb_dim"], sizes["rotary_emb_base"], dtype)
        return layout.with_rotary(table)


class SSDForCausalLM(SSDPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """SSD language model."""

    model_class = SSDModel


class SSDForSequenceClassification(SSDPreTrainedModel, ZooForSequenceClassification):
    """SSD with scores of a text."""

    model_class = SSDModel


class SSDForTokenClassification(SSDPreTrainedModel, ZooForTokenClassification):
    """SSD with scores of each token."""

    model_class = SSDModel


__all__ = [
    "SSDForCausalLM",
    "SSDForSequenceClassification",
    "SSDForTokenClassification",
    "SSDModel",
    "SSDPreTrainedModel",
]
