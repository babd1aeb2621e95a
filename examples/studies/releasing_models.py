"""What the study of ADORE trains: a decoder tuned to few tokens or to all, and controllers that learn what it looks at.

Everything is kept in a folder, a training that was stopped too, and made again from the same seeds where it is missing.
"""

import hashlib
import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from scrubjay import AdoreConfig
from scrubjay.examples.data.real_model import DTYPES, folder_of
from scrubjay.examples.learning.adore_training import streams, train_controllers
from scrubjay.examples.learning.sparse_tuning import adapted, heldout_losses, tune
from scrubjay.examples.measuring.run_report import write_whole
from scrubjay.modeling.decoder.controller import Controller

TUNINGS = ("none", "sparse", "full")  # under which attention the decoder was tuned
MODES = ("query", "bilinear")
STOPPED = "stopped.pt"  # a training that is not done


@dataclass(frozen=True)
class Recipe:
    """How decoders are tuned and controllers taught. A text has `length` tokens; labels are the `label_k` best.

    train_bytes, heldout_bytes: of text. tune_*: LoRA on all linear layers but the head. queries: labelled in each text.
    """

    length: int = 1024
    label_k: int = 96
    seed: int = 0
    train_bytes: int = 1 << 22
    heldout_bytes: int = 1 << 19
    eval_texts: int = 8
    tune_steps: int = 64
    tune_batch: int = 2
    tune_lr: float = 5e-4
    rank: int = 16
    alpha: int = 32
    teach_steps: int = 400
    teach_batch: int = 2
    teach_lr: float = 2e-3
    queries: int = 64


class Workshop:
    """A decoder by name or folder, its tunings and its controllers.

    Args:
        model: `smollm2`, or what `from_pretrained` takes.
        dtype: of the frozen weights: "float32" or "bfloat16".
        kept: folder for what is trained.
    """

    def __init__(self, model: str, dtype: str, kept: Path, recipe: Recipe):
        self.source, self.dtype, self.recipe = folder_of(model), DTYPES[dtype], recipe
        self.kept = kept / Path(model).name / dtype
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self._streams: list[np.ndarray] | None = None
        self._ready: tuple[str, torch.nn.Module] | None = None

    @property
    def train(self) -> np.ndarray:
        """Ids to learn from."""
        return self._texts()[0]

    @property
    def heldout(self) -> np.ndarray:
        """Ids to be measured on."""
        return self._texts()[1]

    def _texts(self):
        if self._streams is None:
            self._streams = streams(self.source, None, self.recipe.train_bytes, self.recipe.heldout_bytes)
        return self._streams

    def loaded(self, dtype: torch.dtype):
        """The decoder as it was published."""
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype, attn_implementation="sdpa").eval()

    def config(self, model) -> AdoreConfig:
        """What labels and masks are made by."""
        return AdoreConfig(base_config=model.config, cache_size=self.recipe.label_k, label_k=self.recipe.label_k)

    def decoder(self, tuning: str):
        """The decoder after a tuning, its adapters merged, frozen; held until another is asked for."""
        if self._ready is None or self._ready[0] != tuning:
            self._ready = None  # before the next one takes memory
            if tuning == "none":
                model = self.loaded(self.dtype)
            else:
                self.tuning(tuning)
                model = PeftModel.from_pretrained(self.loaded(torch.float32), self._folder(tuning)).merge_and_unload()
                model = model.to(self.dtype)
            self._ready = tuning, model.eval().requires_grad_(False)
        return self._ready[1]

    def tuning(self, tuning: str) -> dict:
        """{"losses": of each step, "heldout": {"sparse", "full"}, the loss by the attention at the time}."""
        return self._report(self._folder(tuning), self._tune, tuning)

    def teaching(self, tuning: str) -> dict:
        """{mode: the loss of each step} of the controllers of a tuned decoder, which share their labels."""
        return self._report(self._folder(tuning, "controllers"), self._teach, tuning)

    def controllers(self, tuning: str) -> dict[str, Controller]:
        """By mode."""
        self.teaching(tuning)
        return {mode: Controller.load(self._folder(tuning, "controllers") / mode) for mode in MODES}

    def _folder(self, tuning, *parts):
        """Of what was trained by this recipe; the fields that decide it are its name."""
        left_out = ["eval_texts", "heldout_bytes"] if parts else ["teach_", "queries"]
        left_out += ["tune_", "rank", "alpha"] if tuning == "none" else []
        decides = {k: v for k, v in asdict(self.recipe).items() if not k.startswith(tuple(left_out))}
        name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return self.kept.joinpath(tuning, *parts, name)

    @staticmethod
    def _report(folder, make, tuning):
        report = folder / "report.json"
        if not report.is_file():
            made = make(tuning, folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(report, json.dumps(made) + "\n")  # the last file: what lies there is whole
        return json.loads(report.read_text(encoding="utf-8"))

    def _tune(self, tuning, folder):
        recipe = self.recipe
        args = Namespace(length=recipe.length, batch_size=recipe.tune_batch, steps=recipe.tune_steps, seed=recipe.seed)
        args.lr, args.rank, args.alpha, args.dropout = recipe.tune_lr, recipe.rank, recipe.alpha, 0.0
        args.eval_texts, args.kept = recipe.eval_texts, folder / STOPPED
        self._ready = None
        torch.manual_seed(recipe.seed)
        model = self.loaded(self.dtype)
        config = self.config(model)
        if tuning == "none":
            return {"losses": [], "heldout": heldout_losses(model, self.heldout, config, args)}
        model = adapted(model, args)
        losses = tune(model, self.train, config, args, full=tuning == "full")
        model.save_pretrained(folder)
        return {"losses": losses, "heldout": heldout_losses(model, self.heldout, config, args)}

    def _teach(self, tuning, folder):
        recipe, model = self.recipe, self.decoder(tuning)
        args = Namespace(length=recipe.length, batch_size=recipe.teach_batch, steps=recipe.teach_steps)
        args.seed, args.lr, args.queries, args.pos_weight = recipe.seed + 1, recipe.teach_lr, recipe.queries, 1.0
        args.kept = folder / STOPPED
        config, controllers = self.config(model), {}
        for mode in MODES:
            torch.manual_seed(recipe.seed)
            controllers[mode] = Controller(model.config.hidden_size, score_mode=mode, label_k=recipe.label_k)
        losses = train_controllers(controllers, model, self.train, config, args)
        for mode, controller in controllers.items():
            controller.save(folder / mode)
        return losses
