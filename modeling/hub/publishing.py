"""Saving a model into a folder or onto the Hub with its code and card: all of it, or what was there before."""

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import create_and_tag_model_card

from scrubjay.modeling.hub.model_card import CARD, Notes, Place, pinned, read_card, write_card
from scrubjay.modeling.hub.remote_code import auto_map, check_folder, write_code, written_class
from scrubjay.modeling.training.sharding import is_sharded, whole_state

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
TOKENIZER = "tokenizer_config.json"
TOKENIZER_FILES = ("added_tokens.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer.json", TOKENIZER)
PUSHED = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")


class Published(PreTrainedModel):
    """`save_pretrained` and `push_to_hub` of the zoo."""

    def describe(self, **notes) -> None:
        """Say on the model's card what only you know; each later save and push repeats it. See `Notes` for the names.

        Raises:
            ValueError: a note that the card has no place for, or of the wrong type.
        """
        self._note(notes)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *,
        card: dict | None = None,
        tokenizer: Any = None,
        **kwargs,
    ) -> None:
        """Write weights, configuration, the code that runs them, and a card, README.md.

        The folder loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or with that of
        another head, where torch and transformers are installed and this library is not. Everything is written beside
        what the folder holds and then takes its place: until then an error leaves the folder as it was, and in that
        moment it has no config.json, so that it does not load. Shards and code files of an earlier save go; other
        files, and text of your own in README.md, stay.

        Args:
            card: notes for the card, as `describe` takes them.
            tokenizer: saved too, if given.
            Others: those of transformers, and with `push_to_hub` those of `push_to_hub`.

        Raises:
            ValueError: a path that is a file, a folder with an adapter that would be loaded on top, wrong notes, notes
                for an adapter (`add_adapter`), which is saved alone, or a README.md whose metadata cannot be read.
        """
        check_folder(save_directory)
        self._note(card)
        hub = {name: kwargs.pop(name) for name in PUSHED if name in kwargs}
        apart = ("token", "distributed_checkpoint")  # whose parts would lie in as many folders as there are processes
        written = {key: value for key, value in kwargs.items() if key not in apart} | {"state_dict": state_dict}
        folder = Path(save_directory)
        writes = self.should_save_on_this_rank(is_main_process)
        if self._is_adapter:
            self._write_adapter(folder, tokenizer if writes else None, is_main_process, state_dict, **kwargs)
        elif not writes or kwargs.get("distributed_checkpoint"):  # every rank has to come to the same folder
            self._write_model(folder, is_main_process, state_dict, **kwargs)
        else:
            self._save_whole(folder, state_dict, tokenizer, kwargs)
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if push_to_hub and (writes or together):  # parts of a sharded model are gathered from all processes
            name = hub.pop("repo_id", folder.resolve().name)
            self._push(name, written, tokenizer=tokenizer, token=kwargs.get("token"), **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: dict | None = None,
        tokenizer: Any = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo | None:
        """Put weights, configuration, code, card and tokenizer (if given) onto the Hub in one commit.

        A push that fails leaves the repository as it was. Shards and code files of an earlier push go; other files,
        and text of your own in README.md, stay. Of several processes the first one uploads; all must call this. A model
        with an adapter (`add_adapter`) pushes the adapter alone.

        Args:
            card, tokenizer: see `save_pretrained`.
            revision: branch to commit to, made if there is none.
            Others: those of transformers.

        Returns: what huggingface_hub says of the commit; None on other processes than the first.

        Raises:
            ValueError: private=True for a repository that is public, an adapter where a whole model is to go or the
                other way round, wrong notes or metadata.
            HfHubHTTPError: what the Hub refused, or a commit of somebody else's that came in between.
        """
        self._note(card)
        return self._push(
            repo_id,
            {"max_shard_size": max_shard_size},
            tokenizer=tokenizer,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
        )

    def _push(
        self,
        repo_id: str,
        written: dict,
        *,
        tokenizer: Any = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        tags: list[str] | None = None,
        token: bool | str | None = None,
        **target,
    ) -> CommitInfo | None:
        """See `push_to_hub`. written: arguments of what writes the files."""
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            write = self._write_adapter if self._is_adapter else self._write_model
            write(folder, **written)
            if not self.should_save_on_this_rank(True):
                return None
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            hub = _Repository(repo_id, token, **target)
            gone: list[str] = []
            if self._is_adapter:
                if CONFIG in hub.files:
                    raise ValueError(
                        f"{hub.name} holds a whole model, and this is an adapter. Name another repository, or push the "
                        "adapter merged. Nothing was uploaded."
                    )
                old = hub.card(made)
                card = create_and_tag_model_card(hub.name, token=token) if old is None else ModelCard(old)
                card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *(tags or ())]))
                card.save(folder / CARD)
            else:
                there = Place(
                    hub.name, hub.revision, tokenizer is not None or TOKENIZER in hub.files, tuple(tags or ())
                )
                old = hub.card(made)
                write_card(self, folder, old, there)
                gone = _leftovers(hub.files, _files(folder), old, written.get("variant"))
            message = commit_message or f"Upload {written_class(type(self)).__name__}"
            return hub.commit(folder, gone, commit_message=message, commit_description=commit_description)

    @property
    def _is_adapter(self):
        """Whether transformers writes an adapter alone."""
        return getattr(self, "_hf_peft_config_loaded", False)

    def _write_adapter(self, folder, tokenizer=None, is_main_process=True, state_dict=None, **kwargs):
        super().save_pretrained(folder, is_main_process, self._weights(state_dict), **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _note(self, changes):
        if changes is not None and self._is_adapter:
            raise ValueError(
                "card= is for whole models, and an adapter is saved alone. Edit its README.md, or merge it."
            )
        notes = Notes.of(self.config, changes).given()
        if notes or hasattr(self.config, "model_card"):
            self.config.model_card = notes

    def _save_whole(self, folder, state_dict, tokenizer, kwargs):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="_saving_", dir=folder) as made:
            new = Path(made)
            self._write_model(new, True, state_dict, **kwargs)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            held = [path.name for path in folder.iterdir() if path.is_file()]
            old = read_card(folder / CARD)
            write_card(self, new, old, Place(tokenizer=tokenizer is not None or TOKENIZER in held))
            gone = _leftovers(held, _files(new), old, kwargs.get("variant"))
            (folder / CONFIG).unlink(missing_ok=True)
            for name in gone:
                (folder / name).unlink(missing_ok=True)
            for name in sorted(_files(new), key=lambda name: (name == CONFIG, name)):  # it comes last
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(new / name, folder / name)

    def _weights(self, given):
        """What to write: all of a sharded model, or a copy of what was given: transformers empties what it writes."""
        if given is None and not is_sharded(self):
            return None
        if getattr(self, "hf_quantizer", None) is not None and not self._is_adapter:
            raise ValueError(
                "Of a quantized model transformers writes the weights that it has, and can neither gather them from "
                "processes nor take others. Save it before shard_model, or save an adapter alone (save_adapter)."
            )
        return whole_state(self) if given is None else dict(given)

    def _write_model(self, folder, is_main_process=True, state_dict=None, **kwargs):
        """What transformers writes, and the code."""
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = auto_map(type(self))
        super().save_pretrained(folder, is_main_process, self._weights(state_dict), **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            write_code(type(self), folder)


class _Repository:
    """A repository at a revision, made if it is not there; `files` and `head` are what it holds now."""

    def __init__(self, repo_id, token, private=None, revision=None, create_pr=False):
        self.api, self.revision = HfApi(token=token), revision
        self.name = self.api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        self.target = {"revision": revision, "create_pr": create_pr}
        if revision is not None and not revision.startswith("refs/"):
            try:
                self.api.create_branch(self.name, branch=revision, exist_ok=True)
            except HfHubHTTPError as error:
                if not (create_pr and error.response.status_code == 403):  # who may only propose makes no branch
                    raise
        about = self.api.model_info(self.name, revision=revision)
        if private and not about.private:
            raise ValueError(
                f"private=True was asked for, and {self.name} is public already. Make it private on the Hub first, or "
                "push to another name. Nothing was uploaded."
            )
        self.head, self.files = about.sha, [entry.rfilename for entry in about.siblings or ()]

    def card(self, folder):
        """Text of its README.md, None without one."""
        if CARD not in self.files:
            return None
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = self.api.hf_hub_download(self.name, CARD, revision=self.head, local_dir=place)
            return read_card(Path(path))

    def commit(self, folder, gone, **about):
        """All files of a folder, without the files `gone`, on what was there when this object was made."""
        new = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in sorted(_files(folder))]
        old = [CommitOperationDelete(path_in_repo=name) for name in gone]
        return self.api.create_commit(self.name, [*new, *old], parent_commit=self.head, **self.target, **about)


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _leftovers(held: Iterable[str], new: set[str], card: str | None, variant: str | None) -> list[str]:
    """Of the files held those of an earlier save that would be taken for a part of the new one."""
    if ADAPTER in held:
        raise ValueError(
            f"There is an {ADAPTER}, which from_pretrained would load on top of this model. Name another place, or "
            "remove the adapter. Nothing was written."
        )
    dot = f".{re.escape(variant)}" if variant else ""
    weights = re.compile(rf"model{dot}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{dot}\.json")
    code = pinned(card or "")
    tokenizer = TOKENIZER_FILES if TOKENIZER in new else ()
    return [name for name in held if name not in new and (weights.fullmatch(name) or name in code or name in tokenizer)]
