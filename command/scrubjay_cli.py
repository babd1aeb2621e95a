"""The command line: scrubjay demo | generate | convert | export | verify | eval | bench.

A module outside of the package, since importing the package imports torch: help and errors of parsing need neither, and
come at once. Thin: each command parses its arguments and calls one function, and imports what it needs only then. What
the help says of names and defaults that are the package's own, the tests hold against it.
"""

import argparse
import json
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

# Of scrubjay.examples, which the tests hold against it. The first model is the default.
MODELS = ("rodimus_plus", "rodimus", "ssd", "ssd-hybrid", "taipan", "llama")
CACHES = ("recycled", "lowrank", "quest", "snapkv", "h2o", "tova", "streaming", "full", "adore")
QUICK_MINUTES, SIZES = 8, ("0.6M", "5M")  # up to so many minutes the demo's models are of the first size
OVERHEAD = 1, 3  # minutes that a demo takes beside training, at least and at most: vocabulary, baselines, measurements


class Parser(argparse.ArgumentParser):
    """Errors are one line, whatever the command."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}. See: {self.prog} --help")


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print(f"scrubjay: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class Ended(BaseException):
    """A signal that ends the process arrived; its number is the argument."""


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what runs inside as an error does, so that it removes what it began.

    The exit code is 128 + the signal's number. A signal that is ignored (nohup) or that a caller handles stays so.
    """

    def end(number, frame):
        for one in heard:  # a terminal that closes sends it twice, and the second would end the removal
            signal.signal(one, signal.SIG_IGN)
        raise Ended(number)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    possible = threading.current_thread() is threading.main_thread()
    heard = [number for number in known if possible and signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in heard:
            signal.signal(number, end)
        yield
    except Ended as ended:
        number = ended.args[0]
        with suppress(OSError):  # the terminal may be gone
            print(f"scrubjay: ended by {signal.Signals(number).name}", file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments, rest = make_parser().parse_known_args(argv)
    if rest:
        fail(f"unknown arguments: {shlex.join(rest)}. See: scrubjay {arguments.command} --help")
    arguments.line = shlex.join(["scrubjay", *argv])
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("scrubjay: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if arguments.traceback:
            raise
        fail(str(error) or type(error).__name__)


def make_parser() -> Parser:
    """All commands and their arguments."""
    parser = Parser(prog="scrubjay", description="Language models with small caches, for Hugging Face Transformers.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    add_demo(commands)
    add_generate(commands)
    add_convert(commands)
    add_export(commands)
    add_verify(commands)
    add_eval(commands)
    add_bench(commands)
    return parser


def add_demo(commands) -> None:
    text = "train a small model on real text, load it where scrubjay is absent, hold it against baselines"
    parser = commands.add_parser("demo", help=text, description=f"{text.capitalize()}. Needs no network.")
    parser.set_defaults(run=demo)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="what to train (default: %(default)s)")
    parser.add_argument(
        "--text", type=Path, metavar="PATH", help="file or folder of UTF-8 text (default: Python's standard library)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=2.0,
        help=f"time to train; a model of {SIZES[0]} parameters up to {QUICK_MINUTES}, of {SIZES[1]} in more "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        help="folder for model, numbers, figure (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, data order and sampling (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, help="windows a step (default: what suits the minutes)")
    parser.add_argument("--length", type=int, help="tokens a window (default: 128)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a few steps: seconds on a CPU")


def demo(arguments: argparse.Namespace) -> None:
    text = arguments.text or "the source of Python's standard library"
    size = SIZES[arguments.minutes > QUICK_MINUTES]
    what, minutes = f"a {size}-parameter {arguments.model}", f"{arguments.minutes:g} minutes"
    least, most = (arguments.minutes + more for more in OVERHEAD)
    whole = f"{least:g} to {most:g} minutes in all on two idle cores"
    if arguments.smoke:
        what, minutes, whole = f"a tiny {arguments.model}", "a few steps", "under a minute in all"
    print(f"Trains {what} on {text} for {minutes} and holds it against baselines: {whole}.")
    print(f"Into {arguments.output}: the model, every number, a figure.", flush=True)  # the imports take seconds

    from scrubjay.examples.demo import demo as run
    from scrubjay.examples.learning.recipe import Recipe

    given = {"batch_size": arguments.batch_size, "length": arguments.length}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = Recipe.within(arguments.model, arguments.minutes, **given)
    run(
        arguments.model,
        recipe=recipe.smoke() if arguments.smoke else recipe,
        text=arguments.text,
        minutes=arguments.minutes,
        output=arguments.output,
        seed=arguments.seed,
        command=arguments.line,
    )


def add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt, as it comes.")
    parser.set_defaults(run=generate)
    _add_source(parser, "model")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="PATH", help="file with the text to continue, in UTF-8")
    parser.add_argument("--chat", action="store_true", help="answer the prompt, in the model's chat template")
    text = "cache of few keys, for a Llama, Qwen or Mistral of transformers (default: the model's own)"
    parser.add_argument("--cache", choices=CACHES, help=text)
    parser.add_argument("--budget", type=int, help="keys that a step reads in each layer and head")
    parser.add_argument("--stride", type=int, help="with --cache recycled: every such step reads all keys")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="at most so many (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of the mass kept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")


def generate(arguments: argparse.Namespace) -> None:
    check_source(arguments.model)
    from scrubjay.examples.generate import generate as run
    from scrubjay.examples.generate import sampling

    options = sampling(arguments.temperature, arguments.top_p, arguments.max_new_tokens)
    prompt = arguments.prompt_file.read_text(encoding="utf-8") if arguments.prompt_file else arguments.prompt
    cache = {"kind": arguments.cache, "budget": arguments.budget, "stride": arguments.stride}
    run(*_load(arguments), prompt, **cache, chat=arguments.chat, seed=arguments.seed, **options)


def add_convert(commands) -> None:
    text = "a checkpoint of another library as a folder of this one, or a folder of this one as another library's"
    parser = commands.add_parser("convert", help=text, description=f"Write {text}.")
    parser.set_defaults(run=convert)
    parser.add_argument("source", help="folder, file of weights, or owner/name on the Hub; its layout is found out")
    parser.add_argument("destination", type=Path, help="folder to make")
    parser.add_argument(
        "--to",
        metavar="LAYOUT",
        help="mamba_ssm, transformers, fla, codestral or codefuse; adore or recycled for a decoder such as Llama "
        "(default: this library's)",
    )
    text = "compare logits with another implementation and write a report"
    parser.add_argument("--check", action="store_true", help=text)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="cast (default: each tensor's own)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file of safetensors (default: %(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the new configuration; repeatable"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def convert(arguments: argparse.Namespace) -> None:
    settings = dict(_setting(text) for text in arguments.set)
    import torch
    from transformers.utils import logging

    from scrubjay.conversion.convert import convert as run
    from scrubjay.conversion.source import local_path

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that a Mamba-2 file is read by another class is the purpose here
    local_path(arguments.source, arguments.revision)  # a download leaves nothing to remove, and ends more slowly so
    with ended_cleanly():
        report = run(
            arguments.source,
            arguments.destination,
            to=arguments.to,
            check=arguments.check,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            max_shard_size=arguments.max_shard_size,
            progress=not arguments.quiet,
            settings=settings,
            revision=arguments.revision,
        )
    print(report.text())


def _setting(text: str):
    """NAME=VALUE; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--set takes NAME=VALUE; got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_export(commands) -> None:
    text = "write a model, its tokenizer and its code into a folder that loads where scrubjay is not installed"
    parser = commands.add_parser("export", help=text, description=f"{text.capitalize()}.")
    parser.set_defaults(run=export)
    _add_source(parser, "source")
    parser.add_argument("destination", type=Path, help="folder to make")
    parser.add_argument("--push", metavar="OWNER/NAME", help="put the same onto the Hub, in one commit")
    parser.add_argument("--private", action="store_true", default=None, help="make that repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="commit to this branch of it")


def export(arguments: argparse.Namespace) -> None:
    check_source(arguments.source)
    from scrubjay.conversion.export_hub import export as run

    hub = {"push": arguments.push, "private": arguments.private, "revision": arguments.revision}
    here = Path(arguments.source).is_dir() and not arguments.push  # transfers end by themselves
    with ended_cleanly() if here else nullcontext():
        files = run(arguments.source, arguments.destination, trust_remote_code=arguments.trust_remote_code, **hub)
    print(f"{arguments.destination}: {', '.join(files)}")
    if arguments.push:
        print(f"pushed to {arguments.push}")


def add_verify(commands) -> None:
    text = "compare the code of a folder or repository with its card and with this library; runs none of it"
    parser = commands.add_parser("verify", help=text, description=f"{text.capitalize()}. Exit code 1: they differ.")
    parser.set_defaults(run=verify)
    parser.add_argument("source", help="folder that save_pretrained wrote, or owner/name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def verify(arguments: argparse.Namespace) -> int:
    check_source(arguments.source)
    from scrubjay.modeling.hub.verify_hub import verify as run

    found = run(arguments.source, revision=arguments.revision)
    print("\n".join(found.lines()))
    return 0 if found.agrees else 1


def add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="bits per byte on a text", description="Bits per byte on a text file.")
    parser.set_defaults(run=evaluate)
    _add_source(parser, "model")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--length", type=int, default=512, help="tokens a window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a step (default: %(default)s)")


def evaluate(arguments: argparse.Namespace) -> None:
    if arguments.length < 16 or arguments.batch_size < 1:
        raise ValueError(
            f"got --length {arguments.length} and --batch-size {arguments.batch_size}, at least 16 and 1 are needed."
        )
    text = arguments.text.read_text(encoding="utf-8")
    if not text:
        raise ValueError(f"{arguments.text} is empty. Pass a file with text in it.")
    model, tokenizer = _load(arguments)
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {arguments.model} lacks a tokenizer.json or an eos_token, which marks where text starts "
            "and ends. Add them to its folder."
        )
    from scrubjay.examples.data.corpus import encode, num_bytes
    from scrubjay.examples.measuring.measure import stream_bits

    stream = encode(tokenizer, [text])
    bits = stream_bits(model, stream, arguments.length, arguments.batch_size)
    print(f"{bits / num_bytes([text]):.4f} bits per byte ({num_bytes([text]):,} bytes, {len(stream) - 1:,} tokens)")


def add_bench(commands) -> None:
    text = "speed and memory beside the peers, as ratios within one run"
    about = (
        f"{text.capitalize()}: forty minutes on two cores without bfloat16. Run it alone: on a busy machine it says "
        "little. One that was stopped goes on where it was."
    )
    parser = commands.add_parser("bench", help=text, description=about)
    parser.set_defaults(run=bench)
    parser.add_argument("--cpu", action="store_true", required=True, help="the comparison on this machine's CPU")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="samples of each side and row (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="measure only rows whose name contains this")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="also beside llama.cpp: its folder, built")
    parser.add_argument("--causes", action="store_true", help="instead: ours with one cause of slowness switched")
    parser.add_argument("--tables", action="store_true", help="instead: print the recorded runs in Markdown")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--fresh", action="store_true", help="do not go on with a run that was stopped")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write, a PNG beside it (default: examples/results/benchmark_cpu_<processor>.json; "
        "none with --only, --causes or --smoke)",
    )


def bench(arguments: argparse.Namespace) -> None:
    from scrubjay.examples.benchmarks.benchmark import run

    run(
        threads=arguments.threads,
        repetitions=arguments.repetitions,
        only=arguments.only,
        llama_cpp=arguments.llama_cpp,
        causes=arguments.causes,
        tables=arguments.tables,
        smoke=arguments.smoke,
        fresh=arguments.fresh,
        out=arguments.out,
        command=arguments.line,
    )


def _add_source(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(name, help="folder that save_pretrained wrote, or owner/name on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def check_source(source: str) -> None:
    """Refuse what is neither a model's folder nor a name on the Hub."""
    if not (Path(source) / "config.json").is_file() and (Path(source).exists() or source.count("/") != 1):
        raise ValueError(
            f"no config.json in {source}. Pass a folder that save_pretrained wrote, such as the --output of `scrubjay "
            "demo`, or owner/name on the Hub."
        )


def _load(arguments: argparse.Namespace):
    """Model (on the GPU where there is one) and tokenizer."""
    source = arguments.model
    check_source(source)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    trust = {"trust_remote_code": arguments.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(source, **trust).eval()
    if torch.cuda.is_available():
        model.cuda()
    return model, AutoTokenizer.from_pretrained(source, **trust)


if __name__ == "__main__":
    raise SystemExit(main())
