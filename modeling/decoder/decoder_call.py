"""What a call of a decoder of transformers takes and gives: its tokens, its mask, its output.

B batch, T time, Q queries, K keys, H heads, D hidden size.
"""

import torch

from scrubjay.modeling.inputs.arguments import given
from scrubjay.modeling.inputs.columns import DOCUMENTS, Marks, check_shapes, read_columns

ATTENTION = ("sdpa", "eager")


def check_layers(decoder, cache):
    """Refuse layers that would advance another layer's keys: attention names its own by a number that it was made with.

    Raises:
        ValueError: what the numbers are and how to set them; or a training step that would run layers twice.
    """
    layers, count = decoder.layers, len(cache.layers)
    places = [layer.self_attn.layer_idx for layer in layers]
    if len(places) != count:
        raise ValueError(
            f"The decoder has {len(places)} layers, this {type(cache).__name__} was made for {count}. Set "
            "num_hidden_layers in its configuration to the number of layers, and make a new cache."
        )
    if places != list(range(count)):
        raise ValueError(
            f"The decoder's layers stand in the order {places} of their numbers (self_attn.layer_idx), by which they "
            "find their keys in a cache. Number them anew: for i, layer in enumerate(model.model.layers): "
            "layer.self_attn.layer_idx = i. A layer that stands twice must be a copy (copy.deepcopy)."
        )
    if decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        if torch.is_grad_enabled():
            raise ValueError(
                "Gradient checkpointing runs layers twice and cannot advance a cache: pass none, or call model.eval()."
            )
        keep_caches(layers)


def keep_caches(layers):
    """Have layers that checkpoint gradients keep their cache where none are wanted: before transformers 5.24 they drop
    it there too (generate() in train mode). In a training step a decoder makes no cache."""
    for layer in layers:
        layer._can_checkpoint_with_cache = True


def check_rows(cache, held, batch):
    """Refuse a call of `batch` rows to a cache that holds others."""
    if held != batch:
        raise ValueError(
            f"This cache holds {held} rows, the input has {batch}. Use a new {type(cache).__name__}(model), or "
            "cache.batch_repeat_interleave / cache.batch_select_indices to change its rows."
        )


def check_adore_decoder(decoder):
    """Refuse what an AdoreCache cannot work with."""
    chosen = decoder.config._attn_implementation
    if chosen not in ATTENTION:
        raise ValueError(
            f"AdoreCache gives attention a mask of its own, which {chosen!r} does not take. Load the model with "
            f"attn_implementation= one of {ATTENTION}."
        )
    kind = (getattr(decoder.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"The frequencies of rope_type {kind!r} change with the length of the text, so keys cached at different "
            "lengths do not fit each other. Load the model with a fixed rope_type; for texts beyond the length that it "
            "was trained on, position_mode='compact' serves."
        )


def sizes_of(config):
    """[layers, key heads, head size]."""
    heads = config.num_key_value_heads
    return [
        config.num_hidden_layers,
        heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    ]


def check_sizes(what, held, decoder):
    """Refuse `what` if it holds other `sizes_of` than the decoder's."""
    if held != (needed := sizes_of(decoder.config)):
        raise ValueError(
            f"{what} was made for another model: it holds {held} (layers, key heads, head size), this one has {needed}."
        )


def mesh_of(decoder):
    """The devices that hold parts of the decoder's weights; None where each of them is whole."""
    weight = getattr(decoder.layers[0].self_attn.q_proj, "weight", None)  # some quantizers keep it by another name
    return getattr(weight, "device_mesh", None)


def device_of(decoder) -> torch.device:
    """Where the decoder's embeddings are looked up. Of weights that accelerate brings when they are needed, its hook
    knows that; the weights themselves are on no device between two calls."""
    embedding = decoder.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    asked = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    held = [tensor.device for tensor in embedding.parameters()]
    return torch.device(next((device for device in (*asked, *held) if device is not None), "cpu"))


def mean_over_devices(x, mesh):
    """The mean of x over a tensor-parallel group, whose devices have as many heads each: the same bits on all."""
    group = mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_group()
    x = x.contiguous()
    torch.distributed.all_reduce(x, group=group)
    return x / group.size()


def attendable(keys, values, like):
    """keys and values as attention takes them: in the dtype of `like`, or under autocast as they are."""
    if torch.is_autocast_enabled(like.device.type):
        return keys, values
    return keys.to(like.dtype), values.to(like.dtype)


def tokens_of(kwargs):
    """The tokens of a call that has some, as ids or embeddings."""
    x = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if x is None else x


def shape_of(decoder, kwargs):
    """(B, T) of a call.

    Raises:
        ValueError: no tokens, or ids and embeddings at once, or one of the wrong shape.
    """
    return given(kwargs.get("input_ids"), kwargs.get("inputs_embeds"), decoder.config.hidden_size).shape[:2]


def one_text(kwargs, cache, seen):
    """A call's keyword arguments, its mask read, for a cache of `seen` columns: each row goes on with its text.

    Raises:
        ValueError: a row of several documents; arguments that do not fit.
    """
    x, marks = tokens_of(kwargs), Marks.of(kwargs)
    mask = marks.attention_mask
    if x.shape[1] == 1 and all(getattr(marks, name) is None for name in DOCUMENTS):
        check_shapes(tuple(x.shape[:2]), marks, seen)
        if mask is None or not mask.is_floating_point():
            return kwargs if mask is None else kwargs | {"attention_mask": mask != 0}  # a step waits for no value
    held = cache.held(mask, x.shape[1])
    columns = read_columns(x.shape[:2], x.device, marks, seen=seen, cache=cache, held=held)
    return kwargs if columns.mask is None else kwargs | {"attention_mask": columns.mask}


def remembered(before, mask, shape, seen):
    """(B, S + T) bool, which columns are tokens, of a cache of S that remembers `before`; None: all.

    Each call says it of its own columns alone, once: what was padding stays padding, whatever later masks say.

    Args:
        before: (B, S) bool, None: all were. mask: (B, T) or (B, S + T) bool, None: all are. shape: (B, T).
    """
    new = None if mask is None else mask[:, -shape[1] :]
    if before is None and new is None:
        return None
    like = new if before is None else before
    before = like.new_ones(shape[0], seen) if before is None else before
    new = like.new_ones(shape) if new is None else new.to(like.device)
    return torch.cat([before, new], 1)


def as_attention_takes_it(mask, decoder):
    """(B, Q, K) bool to the 4-D mask of the decoder's attention: bool for sdpa, additive for eager."""
    if decoder.config._attn_implementation == "sdpa":
        return mask[:, None]
    low = torch.finfo(decoder.dtype).min
    return torch.zeros(mask.shape, dtype=decoder.dtype, device=mask.device).masked_fill_(~mask, low)[:, None]


def each(change, *outputs):
    """A model's output (or a tuple of its fields) with every field changed, from the fields of one or more."""
    if isinstance(outputs[0], tuple):
        return tuple(change(*fields) for fields in zip(*outputs, strict=True))
    return type(outputs[0])(**{name: change(*(output[name] for output in outputs)) for name in outputs[0]})


def cut(x, first):
    """Hidden states (B, T, D) or probabilities (B, H, T, K), alone or in a tuple, without their first queries."""
    if isinstance(x, tuple):
        return tuple(cut(part, first) for part in x)
    if isinstance(x, torch.Tensor):
        x = x[:, first:] if x.ndim == 3 else x[:, :, first:]
        # a product of a view with frozen weights copies them for every row: the head's took ten times the step
        return x.clone(memory_format=torch.contiguous_format)
    return x


def joined(*parts):
    """Hidden states (B, T, D) of several calls in a row; probabilities, whose keys differ, stay apart in a tuple."""
    if isinstance(parts[0], tuple):
        return tuple(joined(*layer) for layer in zip(*parts, strict=True))
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, 1) if parts[0].ndim == 3 else parts
    return parts[-1]
