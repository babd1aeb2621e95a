"""What a run says and leaves behind: headings, where it ran, a table for the terminal, and a figure."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

PACKAGES = ("scrubjay", "torch", "transformers", "tokenizers", "numpy", "triton")
OURS, FULL, GRAY = "#0b6e99", "#c4572a", "#8a8a8a"


def machine() -> dict:
    """Names and counts that decide how fast a run is."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": device,
    }


def cpu_name() -> str:
    """The processor's own name where Linux tells it, else what the platform says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Commit of the checkout this file is in, `+` where it has changes; None outside a checkout of scrubjay."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # a virtual environment inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_whole(path: Path, text: str) -> None:
    """The whole file or none of it: who is stopped meanwhile leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


@contextmanager
def section(title: str) -> Iterator[None]:
    """A heading, and how long what is under it took."""
    print(f"\n== {title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - started:.1f} s", flush=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table: first column left, the others right."""
    cells = [[title, *header], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
             for row in cells]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def size(nbytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.3g} GB"


def summary(result: Mapping) -> str:
    """The table at the end of a demo, from what it writes into demo.json."""
    name, bits, cache = result["model"], result["bits_per_byte"], result["cache"]
    rows = sorted(bits.items(), key=lambda row: row[1])
    rows = [[f"{key} (this run)" if key == name else key, f"{value:.3f}"] for key, value in rows]
    short, long = min(cache["full"]), max(cache["full"])
    ours = [size(cache["ours"].get(tokens, cache["full"][tokens])) for tokens in (short, long)]
    speed = result["tokens_per_second"]
    return "\n\n".join(
        [
            table("held-out text", ["bits per byte"], rows),
            table(
                "cache",
                [f"{short:,} tokens", f"{long:,} tokens"],
                [[name, *ours], ["full keys and values", size(cache["full"][short]), size(cache["full"][long])]],
            ),
            f"{name}: {speed['prefill']:,.0f} tokens/s prefill, {speed['decode']:,.0f} tokens/s decode",
        ]
    )


def figure(result: Mapping, path: Path) -> None:
    """Two panels: bits per byte over time with the baselines as lines, and bytes of cache against context."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    fig = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    _draw_learning(left, result)
    _draw_cache(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)


def _draw_learning(axes, result: Mapping) -> None:
    """Loss of every step (thin) and its running mean, estimates on held-out text, the final score, the baselines."""
    run, name = result["training"], result["model"]
    minutes = [seconds / 60 for seconds in run["seconds"]]
    axes.plot(minutes, run["bits_per_byte"], color=OURS, alpha=0.2, linewidth=0.8)
    axes.plot(minutes, _running_mean(run["bits_per_byte"]), color=OURS, linewidth=1.5, label="training")
    at, values = zip(*run["heldout"], strict=True)
    axes.plot([s / 60 for s in at], values, "o-", color=FULL, markersize=4, label="held-out, a sample")
    axes.plot(minutes[-1], result["bits_per_byte"][name], "*", color=FULL, markersize=13, label="held-out, all of it")
    top = max(values) * 1.05
    for baseline, value in result["bits_per_byte"].items():
        if baseline != name:
            axes.axhline(value, color=GRAY, linewidth=0.8, linestyle="--", zorder=0)
            label = baseline.replace(" after ", " after\n")
            where = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center"}
            axes.annotate(f"{label} {value:.2f}", (1.01, value), color=GRAY, fontsize=8, **where)
    axes.set(
        title=f"{name}, {result['parameters'] / 1e6:.1f}M parameters, {result['corpus']['name']}",
        xlabel="minutes of training",
        ylabel="bits per byte",
        ylim=(min(1.0, *result["bits_per_byte"].values()) * 0.95, top),
    )
    axes.legend(frameon=False, fontsize=8)


def _draw_cache(axes, result: Mapping) -> None:
    """Measured bytes of our cache, computed bytes of a full one."""
    full, ours = result["cache"]["full"], result["cache"]["ours"]
    axes.loglog(list(full), list(full.values()), "--", color=FULL, label="full keys and values (computed)")
    axes.loglog(list(ours), list(ours.values()), "o-", color=OURS, markersize=4, label=f"{result['model']} (measured)")
    axes.set(title="cache, one sequence", xlabel="tokens of context", ylabel="bytes")
    axes.grid(True, which="major", color="#eeeeee")
    axes.legend(frameon=False, fontsize=8)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the run, corrected for its start."""
    rate, mean, weight, out = max(0.02, 1 / max(1, len(values) / 50)), 0.0, 0.0, []
    for value in values:
        mean, weight = (1 - rate) * mean + rate * value, (1 - rate) * weight + rate
        out.append(mean / weight)
    return out
