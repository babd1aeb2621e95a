"""Tables of the study of ADORE (releasing.py), and what they come to in one sentence."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from scrubjay.examples.studies.drawing import write_between
from scrubjay.examples.studies.laboratory import effort
from scrubjay.examples.studies.real_tables import shown

RESULTS = Path(__file__).resolve().parents[1] / "results" / "releasing.json"
GUIDE = Path(__file__).with_name("README.md")
TUNED = {"none": "as published", "sparse": "tuned under the mask", "full": "tuned with full attention"}
Column = tuple[str, int, int, int]  # kind, tokens of the prompt, m, R


def of(records: Iterable[dict], model: str, **settings) -> list[dict]:
    """Done records of a model with these settings, by seed."""
    found = [
        one
        for one in records
        if "result" in one
        and one["cell"]["model"] == model
        and all(one["cell"]["settings"].get(name) == value for name, value in settings.items())
    ]
    return sorted(found, key=lambda one: one["cell"]["seed"])


def measured(records: list[dict], model: str, tuning: str, column: Column) -> dict[str, dict]:
    """{cache: {"losses", "scores": of each prompt, "mass", "recall": mean over cells}} of a tuning, of all seeds."""
    names = ("kind", "length", "cache_size", "rebuild")
    cells = of(records, model, part="measure", tuning=tuning, **dict(zip(names, column, strict=True)))
    found: dict[str, dict] = {}
    for name in cells[0]["result"] if cells else ():
        parts = [one["result"][name] for one in cells]
        mine = found[name] = {key: [x for part in parts for x in part[key]] for key in ("losses", "scores")}
        if "mass" in parts[0]:
            mine |= {key: fmean(part[key] for part in parts) for key in ("mass", "recall")}
    return found


def columns(records: list[dict], model: str) -> list[Column]:
    """That are there, by budget, kind and length."""
    settings = [one["cell"]["settings"] for one in of(records, model, part="measure")]
    found = {(s["kind"], s["length"], s["cache_size"], s["rebuild"]) for s in settings}
    return sorted(found, key=lambda c: (-c[2], c[3], c[0], c[1]))


def beyond(mine: dict, full: dict) -> list[float]:
    """Loss beyond full attention's, of each prompt."""
    return [a - b for a, b in zip(mine["losses"], full["losses"], strict=True)]


def lines(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def tuned(records: list[dict], model: str) -> str:
    """Held-out losses of the decoders, under the mask and with full attention."""
    rows = []
    for tuning, title in TUNED.items():
        for one in of(records, model, part="tune", tuning=tuning):
            held = one["result"]["heldout"]
            rows.append([title, f"{held['sparse']:.3f}", f"{held['full']:.3f}"])
    return lines(["held-out loss of the decoder", "under the top-K mask", "with full attention"], rows)


def grid(records: list[dict], model: str, wanted: list[Column], what: str, tunings=tuple(TUNED)) -> str:
    """A row for each decoder and cache. what: "losses", "kept" or "scores"."""
    rows = []
    for tuning, title in ((tuning, TUNED[tuning]) for tuning in tunings):
        found = [measured(records, model, tuning, column) for column in wanted]
        for name in dict.fromkeys(name for one in found for name in one):
            texts = [_cell(one, name, what) for one in found]
            if any(texts):
                rows.append([title, name, *texts])
    head = {"losses": "nats more, ", "kept": "", "scores": ""}[what]
    titles = [
        f"{head}{length} tokens" if kind == "text" else f"{kind}, {length} tokens" for kind, length, _, _ in wanted
    ]
    return lines(["decoder", "cache", *titles], rows)


def _cell(found: dict, name: str, what: str) -> str:
    if name not in found:
        return ""
    if what == "losses":
        mine, full = found[name], found["full"]
        return f"loss {shown(mine['losses'], 3)}" if name == "full" else shown(beyond(mine, full), 3)
    if what == "scores":
        return shown(found[name]["scores"])
    return f"{found[name]['mass']:.3f}, {found[name]['recall']:.3f}" if "mass" in found[name] else ""


def times(records: list[dict], model: str) -> str:
    """Milliseconds of a step, and tokens a second where rows differ."""
    cells = sorted(of(records, model, part="speed"), key=lambda one: _place(one["cell"]["settings"]))
    heads = [f"{s['length']} tokens, {_batch(s)}" for s in (one["cell"]["settings"] for one in cells)]
    names = dict.fromkeys(name for one in cells for name in one["result"])
    rows = [[name, *(_time(one, name) for one in cells)] for name in names]
    return lines(["ms a step", *heads], rows)


def _batch(settings: dict) -> str:
    return f"batch {settings['rows']}" if isinstance(settings["rows"], int) else settings["rows"]


def _place(settings: dict) -> tuple:
    return settings["length"], settings["rows"] if isinstance(settings["rows"], int) else 1 << 20


def _time(record: dict, name: str) -> str:
    mine = record["result"].get(name)
    if mine is None:
        return ""
    if isinstance(record["cell"]["settings"]["rows"], int):
        return f"{mine['ms']:.1f}"
    return f"{mine['ms']:.1f} for {mine['rows']} rows, {1e3 * mine['rows'] / mine['ms']:.0f} tokens/s"


def verdict(records: list[dict], model: str) -> str:
    """How much faster at how much loss: of learned scores the cache with the least loss after the longest prompts."""
    wanted = [column for column in columns(records, model) if column[0] == "text"]
    reference, candidates = None, []
    for column in sorted(wanted, key=lambda c: (c[1], c[2])):
        found = {tuning: measured(records, model, tuning, column) for tuning in TUNED}
        against = "full" if found["full"] else "none"
        if not found[against]:
            continue
        full = found[against]["full"]
        reference = column, against
        candidates = [
            (fmean(beyond(mine, full)), tuning, name)
            for tuning, caches in found.items()
            for name, mine in caches.items()
            if name.startswith(("query", "bilinear", "StreamingLLM")) and len(mine["losses"]) == len(full["losses"])
        ]
    ours = [one for one in candidates if one[2] != "StreamingLLM"]
    if reference is None or not ours:
        return "Nothing is measured yet."
    (_, length, size, rebuild), against = reference
    loss, tuning, name = min(ours)
    best = f"ADORE by the best learned scores ({name}, {size + rebuild} keys, decoder {TUNED[tuning]})"
    plain, other, _ = min(one for one in candidates if one[2] == "StreamingLLM")
    fast = _faster(records, model, length, f"ADORE, {name.rpartition(', ')[2]}")
    stream = _faster(records, model, length, "StreamingLLM")
    return (
        f"After {length} tokens {best} is {fast}, at {loss:+.3f} nats a token beside full attention (decoder "
        f"{TUNED[against]}); StreamingLLM with as many keys (decoder {TUNED[other]}) is {stream}, at {plain:+.3f}."
    )


def _faster(records: list[dict], model: str, length: int, name: str) -> str:
    found = []
    for one in sorted(of(records, model, part="speed", length=length), key=lambda r: _place(r["cell"]["settings"])):
        result, full = one["result"], one["result"]["full"]
        if name in result:
            gain = (result[name]["rows"] / result[name]["ms"]) / (full["rows"] / full["ms"])
            found.append(f"{gain:.2f} times ({_batch(one['cell']['settings'])})")
    return f"{', '.join(found)} as fast as full attention without copies" if found else "not timed yet"


def _decoder(record: dict) -> tuple[str, str]:
    return record["cell"]["model"], record["cell"]["settings"]["dtype"]


def table(records: list[dict]) -> str:
    """What the guide has."""
    parts = []
    done = [record for record in records if "result" in record]
    for model, dtype in dict.fromkeys(map(_decoder, done)):
        records = [record for record in done if _decoder(record) == (model, dtype)]
        parts.append(f"**{model}**, {dtype}")
        if of(records, model, part="tune"):
            parts.append(tuned(records, model))
        there = columns(records, model)
        for size, rebuild in dict.fromkeys(column[2:] for column in there):
            texts = [c for c in there if c[2:] == (size, rebuild) and c[0] == "text"]
            others = [c for c in there if c[2:] == (size, rebuild) and c[0] != "text"]
            if texts:
                parts += [
                    f"m = {size}, R = {rebuild}: loss of text after a prompt.",
                    grid(records, model, texts, "losses"),
                ]
            if texts and (size, rebuild) == there[0][2:]:
                parts += [
                    "Share of full attention, and of its best K, on what is attended; tuning changes it little.",
                    grid(records, model, texts, "kept", ("none",)),
                ]
            if others:
                parts += [
                    f"m = {size}, R = {rebuild}: tokens and answers found.",
                    grid(records, model, others, "scores"),
                ]
        if of(records, model, part="speed"):
            parts.append(times(records, model))
        if there:
            parts.append(verdict(records, model))
    return "\n\n".join([*parts, effort(done)]) if parts else "Not run yet."


def show(records: list[dict], guide: bool) -> None:
    """The tables on the terminal, and in the guide if asked for."""
    text = table(records)
    print(text)
    if guide:
        write_between(GUIDE, "releasing", text)
