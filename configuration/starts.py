"""How large the weights of a model start where nobody says so."""

WIDTH = 2048  # from which on 0.02, the common choice, is right: that of the Rodimus models


def initial_std(hidden_size: int) -> float:
    """Standard deviation of initial projections of a normalised stream: 0.02 from a width of 2048 on.

    Below it is larger, so that what they give has the same size at every width: what is fixed beside it (the bias of a
    convolution, the 1 that softmax compares scores with) would otherwise hide what tells tokens apart.
    """
    return 0.02 * max(1, WIDTH / max(hidden_size, 1)) ** 0.5
