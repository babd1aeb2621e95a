"""lm-eval's own command, where scrubjay cannot be imported: python lm_eval_child.py TASKS OUT FOLDER ..."""

import json
import sys
from pathlib import Path

from isolated import Absent

SHORT = {"pairs": 5, "questions": 2, "sentences": 3, "num_docs": 6}
LONG = {"sentences": 120, "num_docs": 2}  # prompts of more than the 2048 tokens that lm-eval takes for the most


def evaluate(folder: str, tasks: str, out: Path, names: str, sizes: dict, more: str = "") -> None:
    """One run of the command; numbers and samples go to `out`. more: further arguments of the model."""
    from lm_eval.__main__ import cli_evaluate

    model = ["--model", "hf", "--model_args", f"pretrained={folder}{more}", "--trust_remote_code", "--device", "cpu"]
    what = ["--tasks", names, "--include_path", tasks, "--metadata", json.dumps(sizes)]
    kept = ["--batch_size", "4", "--log_samples", "--output_path", str(out)]
    sys.argv = ["lm_eval", "run", *model, *what, *kept]
    cli_evaluate()


def prompted(tasks: str, out: Path, folder: str) -> None:
    """The ids of each long prompt as the model's `generate` got them, in `prompts.json`."""
    from transformers.generation import GenerationMixin

    given, generate = [], GenerationMixin.generate

    def noted(model, *args, **kwargs):
        given.extend(kwargs["input_ids"].tolist())
        return generate(model, *args, **kwargs)

    GenerationMixin.generate = noted
    try:
        evaluate(folder, tasks, out, "scrubjay_needle", LONG, ",max_length=32768")
    finally:
        GenerationMixin.generate = generate
    (out / "prompts.json").write_text(json.dumps(given), encoding="utf-8")


def main(tasks: str, out: str, folders: list[str]) -> None:
    """Evaluate each folder; what is found goes to OUT/<folder's name> and, of long prompts, to OUT/long/<...>."""
    sys.meta_path.insert(0, Absent())
    for folder in folders:
        name = Path(folder).name
        evaluate(folder, tasks, Path(out) / name, "scrubjay_mqar,scrubjay_needle", SHORT)
        prompted(tasks, Path(out) / "long" / name, folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
