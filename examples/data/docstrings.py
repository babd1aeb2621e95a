"""Instructions that are on every machine: say what a function of Python's standard library does.

The prompt is a function without its docstring, the completion the docstring's first paragraph, as its author wrote it.
"""

import ast
import textwrap
import warnings
from collections.abc import Iterable, Iterator

SHORTEST, LONGEST = 20, 300  # characters of a completion: less says nothing, more is no summary


def pairs_of(documents: Iterable[str]) -> list[dict[str, str]]:
    """{"prompt", "completion"} of every documented function in Python sources, each pair once, in their order."""
    found = (pair for text in documents for pair in _pairs(text))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in dict.fromkeys(found)]


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the strings of old files
            tree = ast.parse(text)
    except SyntaxError:  # the library keeps some files for its own tests of the parser
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        summary = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
        if SHORTEST <= len(summary) <= LONGEST:
            said = node.body[0]
            source = lines[node.lineno - 1 : said.lineno - 1] + lines[said.end_lineno : node.end_lineno]
            yield f"{textwrap.dedent(chr(10).join(source))}\n\n# What {node.name} does:\n", f"{summary}\n"
