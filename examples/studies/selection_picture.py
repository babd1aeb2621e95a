"""Which tokens of a text a Taipan model attends for, as a text and as a picture that a person can read."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scrubjay.examples.measuring.run_report import OURS
from scrubjay.kernels.gate import logit

COLUMNS = 96  # of the picture, in characters
TAB = 4


@torch.no_grad()
def read_selection(model: PreTrainedModel, ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> dict:
    """{"tokens": T strings, "layers": {place: T numbers}} of ids (T,), read from the start. The numbers are what the
    gate says against its threshold, in nats: above 0 the token attends. Of a text's end the string is empty."""
    config, found = model.config, {}
    hooks = [
        model.base_model.layers[place].attn.gate.register_forward_hook(
            lambda gate, args, delta, place=place: found.update({place: delta[0]})
        )
        for place in config.selective_layers
    ]
    try:
        model.eval()(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    above = {
        str(place): [round(value, 3) for value in (found[place] - logit(threshold)).tolist()]
        for place, threshold in zip(config.selective_layers, config.thresholds, strict=True)
    }
    return {"tokens": [tokenizer.decode([token], skip_special_tokens=True) for token in ids.tolist()], "layers": above}


def marked(tokens: Sequence[str], numbers: Sequence[float], marks: str = "‹›") -> str:
    """The text, with what is selected between marks."""
    pairs = zip(tokens, numbers, strict=True)
    return "".join(f"{marks[0]}{token}{marks[1]}" if number > 0 else token for token, number in pairs)


def cells(tokens: Sequence[str], columns: int = COLUMNS) -> list[list[tuple[int, int, str]]]:
    """Of each token its characters as (line, column, character) of a page so wide. A line's end takes a cell as well,
    shown as a sign, so that a selected one can be seen."""
    line = column = 0
    placed = []
    for token in tokens:
        here = []
        for character in token:
            if column >= columns:
                line, column = line + 1, 0
            here.append((line, column, {"\n": "↵", "\t": "→"}.get(character, character)))
            column += TAB if character == "\t" else 1
            if character == "\n":
                line, column = line + 1, 0
        placed.append(here)
    return placed


def draw_selection(found: dict, path: Path, title: str) -> None:
    """A panel for each selective layer: the text, and behind each selected token a shade, the darker the surer."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.patches import Rectangle

    page = cells(found["tokens"])
    lines = 1 + max((line for token in page for line, _, _ in token), default=0)
    layers = found["layers"]
    figure = Figure(figsize=(COLUMNS * 0.075, len(layers) * (0.5 + 0.16 * lines)), layout="constrained")
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, (place, numbers) in zip(panels, layers.items(), strict=True):
        for token, number in zip(page, numbers, strict=True):
            for line, column, character in token:
                if number > 0:
                    shade = 0.25 + 0.5 * min(number, 3) / 3
                    axes.add_patch(Rectangle((column, line), 1, 1, color=OURS, alpha=shade, linewidth=0))
                faint = {"color": "#bbbbbb"} if character in "↵→" else {}
                middle = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 8, "parse_math": False}
                axes.text(column + 0.5, line + 0.5, character, **middle, **faint)
        share = sum(number > 0 for number in numbers) / len(numbers)
        axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
        axes.set_title(f"{title}, layer {place}: {share:.0%} of these tokens attend", fontsize=9)
        axes.axis("off")
    figure.savefig(path, dpi=150)
