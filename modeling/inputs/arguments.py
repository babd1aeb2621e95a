"""What a forward pass is called with: what is given, and that nothing of it is ignored in silence."""

# What tokenizers, collators, Trainer and generate() pass to any model, and what says nothing that a model here needs.
HARMLESS = (
    "token_type_ids",  # a tokenizer's, for models that read pairs of texts
    "max_length_q",  # sizes for kernels that cannot read them off cu_seq_lens_q
    "max_length_k",
    "cache_position",  # of older versions of transformers: a cache counts its columns itself
    "num_items_in_batch",  # Trainer's: heads of the zoo read it, those of others hand it on to the model without one
)
# What may be asked of other models, and the answer that these give anyway.
ANSWERS = {"output_attentions": False, "output_router_logits": False, "is_causal": True}


def given(input_ids, inputs_embeds, hidden_size):
    """Whichever of the two a call has.

    Raises:
        ValueError: both, neither, or one of the wrong shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "Pass exactly one of input_ids (batch, length) and inputs_embeds (batch, length, hidden_size)."
        )
    if inputs_embeds is not None and (inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != hidden_size):
        raise ValueError(
            f"inputs_embeds must have shape (batch, length, {hidden_size}); got {tuple(inputs_embeds.shape)}."
        )
    if input_ids is not None and input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, length); got {tuple(input_ids.shape)}.")
    return input_ids if inputs_embeds is None else inputs_embeds


def refuse_unknown(model, kwargs: dict) -> None:
    """Refuse keyword arguments that the model would ignore. None stands for one that was not given.

    Raises:
        ValueError: their names.
    """
    for name, value in kwargs.items():
        if value is None or name in HARMLESS or (name in ANSWERS and value is ANSWERS[name]):
            continue
        if name in ANSWERS:
            raise ValueError(
                f"{type(model).__name__} cannot be called with {name}={value!r}: it gives what {name}={ANSWERS[name]} "
                "asks for. Leave it out, here and in the configuration."
            )
        raise ValueError(
            f"{type(model).__name__} has no argument {name!r} and would have ignored it. Leave it out, or see the "
            "documentation of its forward method for those it has."
        )
