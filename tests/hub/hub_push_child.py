"""What an author does with a Hub, in a process of its own: python hub_push_child.py FOLDER

The Hub is the server that HF_ENDPOINT names. Logits of every model pushed go to FOLDER/<label>.pt, what happened to
FOLDER/pushed.json.
"""

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from added_adapters import HAS_ADD_ADAPTER
from huggingface_hub import HfApi
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.utils import logging
from zoo import VOCAB, ZOO, tokens

import scrubjay_cli
from scrubjay.modeling.hub import publishing
from scrubjay.modeling.hub.verify_hub import verify

OUT = Path(sys.argv[1])
API = HfApi()
ENTRIES = {entry.name: entry for entry in ZOO}
NOTES = {
    "license": "cc-by-4.0",
    "training_data": "eleven acorns | and a pine cone",
    "training_command": "scrubjay demo --text `acorns`",
    "evaluation": {"bits per byte, acorns": 1.25, "recall": "all"},
}
OWN_TEXT = "---\nlicense: mit\nlanguage: en\n---\n# My jay\n\nIt *sings*.\n"
SHARD = "40KB"
WORDS = {"[UNK]": 0, **{f"w{i}": i for i in range(1, VOCAB)}}


def tokenizer():
    """Words w1 ... w96."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="w1", pad_token="w1")


def model(name: str, label: str, seed: int = 0):
    """A model of the zoo, whose logits are kept under a label."""
    made = ENTRIES[name].build(seed=seed)
    with torch.no_grad():
        torch.save(made(tokens(2, 12)).logits, OUT / f"{label}.pt")
    return made


def faults(**wanted) -> None:
    """Make the server have these, and only these."""
    urlopen(Request(f"{os.environ['HF_ENDPOINT']}/faults", json.dumps(wanted).encode(), method="PUT")).close()


def error_of(call) -> str:
    """What a call that must fail says."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def command(*argv: str) -> dict:
    """A command's exit code and output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = scrubjay_cli.main(list(argv))
    return {"code": code, "output": output.getvalue()}


def every_architecture() -> None:
    for name in ENTRIES:
        given = {"tokenizer": tokenizer()} if name in ("ssd", "rodimus_plus") else {}
        shard = {"max_shard_size": SHARD} if name in ("adore", "taipan") else {}
        card = {"card": NOTES} if name == "rodimus_plus" else {}
        model(name, name).push_to_hub(f"jay/{name}", **given, **shard, **card)


def revisions() -> dict:
    API.create_tag("jay/ssd", tag="v1.0")
    model("ssd", "v2", seed=2).push_to_hub("jay/ssd", revision="v2", commit_message="The second")
    proposed = model("ssd", "proposed", seed=3).push_to_hub("jay/ssd", create_pr=True, tags=["proposed"])
    model("rodimus", "secret", seed=4).push_to_hub("jay/secret", private=True, token=os.environ["HF_TOKEN"])
    public = error_of(lambda: ENTRIES["ssd"].build(seed=5).push_to_hub("jay/ssd", private=True))
    return {"pull_request": proposed.pr_url, "private_over_public": public}


def over_another_model() -> None:
    """Another architecture in more pieces, over what an author has added by hand."""
    ENTRIES["ssd"].build().push_to_hub("jay/grown", tokenizer=tokenizer())
    card = API.hf_hub_download("jay/grown", "README.md")
    part = Path(card).read_text(encoding="utf-8").partition("---\n<!--")[2]
    own = {"README.md": f"{OWN_TEXT}<!--{part}\nPS: nuts.\n", "handler.py": "# mine\n", "notes.txt": "x"}
    for name, text in own.items():
        API.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id="jay/grown")
    model("rodimus", "grown", seed=6).push_to_hub("jay/grown", max_shard_size=SHARD)


def broken() -> dict:
    found = {}
    model("taipan", "broken").push_to_hub("jay/broken")
    new = ENTRIES["taipan"].build(seed=7)
    for repository in ("jay/broken", "jay/never"):
        faults(drop_uploads=list(range(2, 200)))  # the first upload arrives
        found[repository] = error_of(lambda name=repository: new.push_to_hub(name, max_shard_size=SHARD))
    other = model("taipan", "once", seed=8)
    faults(drop_uploads=[2])
    found["jay/once"] = error_of(lambda: other.push_to_hub("jay/once", max_shard_size=SHARD))
    faults()
    return found


def overtaken() -> str:
    """Somebody else commits while a push is being prepared."""
    write = publishing.write_card

    def late(*args):
        API.upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id="jay/broken")
        write(*args)

    publishing.write_card = late
    try:
        return error_of(lambda: ENTRIES["taipan"].build(seed=9).push_to_hub("jay/broken"))
    finally:
        publishing.write_card = write


def altered() -> None:
    """A repository whose code leaves a mark when it runs, and whose card does not know."""
    made = model("ssd", "marked")
    made.push_to_hub("jay/marked")
    code = Path(API.hf_hub_download("jay/marked", "modeling_ssd.py")).read_text(encoding="utf-8")
    code += f"\nfrom pathlib import Path\n\nPath({str(OUT / 'mark')!r}).write_text('ran')\n"
    API.upload_file(path_or_fileobj=code.encode(), path_in_repo="modeling_ssd.py", repo_id="jay/marked")


def commands() -> dict:
    folder = OUT / "saved"
    model("adore", "exported", seed=10).save_pretrained(folder, tokenizer=tokenizer(), card={"license": "mit"})
    options = ["--push", "jay/exported", "--private", "--revision", "next"]
    return {
        "export": command("export", str(folder), str(OUT / "exported"), *options),
        "verify": command("verify", "jay/ssd"),
        "verify v2": command("verify", "jay/ssd", "--revision", "v2"),
        "verify marked": command("verify", "jay/marked"),
    }


def converted() -> dict:
    """A branch of a repository in another library's layout."""
    told = command("convert", "jay/ssd", str(OUT / "official"), "--to", "mamba_ssm", "--revision", "v2")
    with torch.no_grad():
        logits = ENTRIES["ssd"].model.from_pretrained(OUT / "official").eval()(tokens(2, 12)).logits
    return told | {"difference": float((logits - torch.load(OUT / "v2.pt")).abs().max())}


def averaged() -> None:
    """A model saved with other weights than its own."""
    other = {"state_dict": model("ssd", "averaged", seed=13).state_dict()}
    made = model("ssd", "adapted", seed=12)
    made.save_pretrained(OUT / "averaged", push_to_hub=True, repo_id="jay/averaged", **other)


def adapters() -> dict:
    """An adapter alone, where nothing is, where a model is, and where everybody reads."""
    made, given = model("ssd", "adapted", seed=12), {"tokenizer": tokenizer()}
    API.create_repo("jay/public")
    made.add_adapter(LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    made.push_to_hub("jay/adapter", tags=["small"], **given)
    API.create_branch("jay/adapter", branch="v2")
    API.upload_file(path_or_fileobj=OWN_TEXT.encode(), path_in_repo="README.md", repo_id="jay/adapter", revision="v2")
    made.push_to_hub("jay/adapter", revision="v2", tags=["small"])
    made.save_pretrained(OUT / "saved_adapter", push_to_hub=True, repo_id="jay/saved_adapter", **given)
    return {
        "over a model": error_of(lambda: made.push_to_hub("jay/ssd")),
        "private over public": error_of(lambda: made.push_to_hub("jay/public", private=True)),
        "with notes": error_of(lambda: made.push_to_hub("jay/public", card=NOTES)),
    }


def trained() -> dict:
    """What Trainer pushes, and the model after it."""
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(2, 12)]
    about = {"hub_model_id": "jay/trained", "push_to_hub": True, "hub_token": os.environ["HF_TOKEN"]}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(OUT / "trained"), max_steps=1, **about, **quiet)
    trainer = Trainer(ENTRIES["rodimus"].build(seed=11), arguments, train_dataset=rows, processing_class=tokenizer())
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
        trainer.push_to_hub(blocking=True)
    with torch.no_grad():
        torch.save(trainer.model.eval()(tokens(2, 12)).logits, OUT / "trained.pt")
    unpinned = error_of(lambda: verify("jay/trained"))
    trainer.model.push_to_hub("jay/trained")
    return {"unpinned": unpinned, "verify": command("verify", "jay/trained")}


def main() -> None:
    logging.disable_progress_bar()
    time.sleep = lambda seconds: None  # the client waits between its attempts
    every_architecture()
    found = {"revisions": revisions()}
    over_another_model()
    found |= {"broken": broken(), "overtaken": overtaken()}
    altered()
    averaged()
    found |= {"commands": commands(), "converted": converted(), "trained": trained()}
    if HAS_ADD_ADAPTER:
        found |= {"adapters": adapters()}
    (OUT / "pushed.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
