"""lm-eval's own command, where scrubjay cannot be imported: python lm_eval_child.py TASKS OUT FOLDER ..."""

import json
import sys
from pathlib import Path

from isolated import Absent


def main(tasks: str, out: str, folders: list[str]) -> None:
    """Evaluate each folder; numbers and samples go to OUT/<folder's name>."""
    sys.meta_path.insert(0, Absent())
    from lm_eval.__main__ import cli_evaluate

    sizes = json.dumps({"pairs": 5, "questions": 2, "sentences": 3, "num_docs": 6})
    for folder in folders:
        model = ["--model", "hf", "--model_args", f"pretrained={folder}", "--trust_remote_code", "--device", "cpu"]
        what = ["--tasks", "scrubjay_mqar,scrubjay_needle", "--include_path", tasks, "--metadata", sizes]
        kept = ["--batch_size", "4", "--log_samples", "--output_path", str(Path(out) / Path(folder).name)]
        sys.argv = ["lm_eval", "run", *model, *what, *kept]
        cli_evaluate()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
