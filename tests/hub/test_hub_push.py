"""From an author to a stranger over HTTP: huggingface_hub's client against a Hub on this machine.

Two processes do it, once for all tests: an author's (hub_push_child.py), and a stranger's that has an empty HF_HOME and
no scrubjay (hub_load_child.py). `pytest -k log -s` of this file prints the requests of a round trip.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from added_adapters import needs_add_adapter
from hub_server import HubServer

from scrubjay.modeling.hub.model_card import BEGIN, END, pinned
from scrubjay.modeling.hub.remote_code import code_files

HERE = Path(__file__).parent
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The server as both processes left it, and what they say."""
    out = tmp_path_factory.mktemp("hub")
    with HubServer() as hub:
        _run("hub_push_child.py", out, hub, HF_TOKEN=hub.token)
        author = len(hub.log)
        _run("hub_load_child.py", out, hub, hub.token)
    said = {name: json.loads((out / f"{name}.json").read_text()) for name in ("pushed", "loaded")}
    return SimpleNamespace(**said, repositories=hub.repositories, author=hub.log[:author], stranger=hub.log[author:])


def _run(script, out, hub, *arguments, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    root = HERE.parents[1]
    folders = (root / "examples", HERE.parent, root / "command")
    paths = [*map(str, folders), kept.get("PYTHONPATH", "")]
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(out / script), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), str(out), *arguments]
    done = subprocess.run(
        command, env=kept | own | {"PYTHONPATH": os.pathsep.join(paths)} | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


def commits(story, name):
    """The files of each commit of a repository, oldest first."""
    return list(story.repositories[name].commits.values())


def text(files, name):
    return files[name].content.decode()


def test_every_architecture_comes_back_bit_equal_and_generates(story, entry):
    found = story.loaded["architectures"][entry.name]
    assert found["difference"] == 0
    assert found["class"].startswith(f"transformers_modules.jay.{entry.name}.")
    assert found["class"].endswith(f".{entry.model.__name__}")
    assert found["headless"] == entry.model.model_class.__name__
    assert found["generated"] == [2, 17]
    assert found["pickled"] == 0
    assert not story.loaded["scrubjay"]


def test_without_trust_no_code_comes_and_none_runs(story, entry):
    found = story.loaded["architectures"][entry.name]
    assert "trust_remote_code=True" in found["refused"]
    assert found["code_before"] == 0 < found["code_after"]
    first = next(i for i, line in enumerate(story.stranger) if f"/jay/{entry.name}/" in line and ".py" in line)
    assert any(f"GET /jay/{entry.name}/resolve" in line and "config.json" in line for line in story.stranger[:first])
    marks = story.loaded["marks"]
    assert "trust_remote_code=True" in marks["refused"]
    assert (marks["before"], marks["after"]) == (False, True)  # the same code does run where it is trusted


def test_a_push_is_one_commit_with_all_that_belongs_to_the_model(story, entry):
    empty, files = commits(story, f"jay/{entry.name}")[:2]
    assert set(empty) == {".gitattributes"}
    code = code_files(entry.model)
    assert {name: text(files, name) for name in files if name.endswith(".py")} == code
    assert {"README.md", "config.json", "generation_config.json"} <= set(files)
    shards = [name for name in files if name.endswith(".safetensors")]
    sharded = entry.name in ("adore", "taipan")
    assert (len(shards) > 1, "model.safetensors.index.json" in files) == (sharded, sharded)
    assert all(files[name].large for name in shards)
    assert (set(files) >= TOKENIZER) == (entry.name in ("ssd", "rodimus_plus"))
    assert pinned(text(files, "README.md")).keys() == code.keys()


def test_blocks_of_a_card_run_where_there_is_no_scrubjay(story, entry):
    loading, check = story.loaded["architectures"][entry.name]["blocks"]
    assert loading.strip()
    assert sorted(check.split("\n")[:-1]) == sorted(f"same {name}" for name in code_files(entry.model))


def test_branch_tag_pull_request_and_commit_are_what_was_pushed_to_them(story):
    found = story.loaded["revisions"]
    assert {found[name] for name in ("v2", "refs/pr/1", "v1.0", "main", "commit")} == {0}
    assert "v3 is not a valid git identifier" in found["none"]
    assert 'revision="v2"' in text(story.repositories["jay/ssd"].commits[_branch(story, "v2")], "README.md")
    assert "ALTERED" not in found["blocks"][1]
    assert story.pushed["revisions"]["pull_request"].endswith("/jay/ssd/discussions/1")
    assert story.repositories["jay/ssd"].messages[_branch(story, "v2")] == "The second"
    assert "- proposed\n" in text(story.repositories["jay/ssd"].commits[_branch(story, "refs/pr/1")], "README.md")


def _branch(story, name):
    return story.repositories["jay/ssd"].branches[name]


def test_private_repositories_need_the_token(story):
    found = story.loaded["access"]
    assert story.repositories["jay/secret"].private
    assert "not a valid model identifier" in found["without"]
    assert "not a valid model identifier" in found["wrong"]
    assert found["with"] == 0
    assert "jay/ssd is public already" in story.pushed["revisions"]["private_over_public"]
    assert len(commits(story, "jay/ssd")) == 4  # nothing was uploaded: empty, first, branch, pull request


def test_what_another_model_left_goes_and_what_the_author_added_stays(story):
    first, last = commits(story, "jay/grown")[1], commits(story, "jay/grown")[-1]
    assert story.loaded["after"]["jay/grown"] == 0
    assert {"modeling_ssd.py", "model.safetensors"} <= set(first)
    assert not {"modeling_ssd.py", "configuration_ssd.py", "ssd.py", "model.safetensors"} & set(last)
    assert {"handler.py", "notes.txt", "modeling_rodimus.py"} | TOKENIZER <= set(last)
    card = text(last, "README.md")
    above, _, rest = card.partition(BEGIN)
    part, _, below = rest.partition(END)
    assert above.endswith("\n# My jay\n\nIt *sings*.\n")
    assert below == "\n\nPS: nuts.\n"
    assert ("RodimusForCausalLM" in part, "SSDForCausalLM" in part) == (True, False)
    assert "\nlicense: mit\nlanguage: en\n" in above
    assert "Weights: mit." in part


def test_a_push_that_breaks_off_leaves_what_was_there(story):
    assert "Error while uploading" in story.pushed["broken"]["jay/broken"]
    assert story.loaded["after"]["jay/broken"] == 0
    assert sum("PUT /uploads/" in line and line.endswith(" dropped") for line in story.author) > 2
    whole, theirs = commits(story, "jay/broken")[1:]
    assert theirs == whole | {"theirs.txt": theirs["theirs.txt"]}
    assert "Error while uploading" in story.pushed["broken"]["jay/never"]
    assert [set(files) for files in commits(story, "jay/never")] == [{".gitattributes"}]
    assert story.loaded["after"]["jay/never"] != "no error"
    assert story.pushed["broken"]["jay/once"] == "no error"  # the client tries again
    assert story.loaded["after"]["jay/once"] == 0


def test_a_push_that_was_overtaken_is_refused(story):
    assert "A commit has happened since" in story.pushed["overtaken"]


@pytest.mark.parametrize("fault", ["cut", "shrink"])
def test_a_truncated_file_is_an_error_and_no_model(story, fault):
    assert story.loaded["after"][fault] != "no error"
    assert story.loaded["after"][f"{fault}, then whole"] == 0


def test_a_tokenizer_travels_with_its_model(story):
    for found in story.loaded["tokenizers"].values():
        assert found == {"ids": [5, 7, 96], "text": "w5 w7 w96", "eos": "w1"}


def test_altered_code_is_seen_with_and_without_scrubjay(story):
    good, branch, bad = (story.pushed["commands"][name] for name in ("verify", "verify v2", "verify marked"))
    assert (good["code"], branch["code"], bad["code"]) == (0, 0, 1)
    assert "modeling_ssd.py: not as the card pins it\n" in bad["output"]
    assert "modeling_ssd.py: not this library's source" in bad["output"]
    assert [line for line in story.loaded["marks"]["check"].splitlines() if "same" not in line] == [
        "ALTERED modeling_ssd.py"
    ]


def test_what_came_from_the_hub_goes_there_again_whole(story):
    first, second = commits(story, "jay/rodimus_plus")[1], commits(story, "jay/second")[-1]
    assert story.loaded["again"]["difference"] == 0
    assert second.pop("README.md").content == first["README.md"].content.replace(b"jay/rodimus_plus", b"jay/second")
    held = json.loads(second.pop("tokenizer_config.json").content)
    loading = {"is_local", "local_files_only"}  # transformers notes how it came by the tokenizer
    assert {key: value for key, value in held.items() if key not in loading} == json.loads(
        first["tokenizer_config.json"].content
    )
    assert second == {name: file for name, file in first.items() if name not in ("README.md", "tokenizer_config.json")}
    assert commits(story, "jay/rodimus_plus")[-1] == first
    for said in ("license: cc-by-4.0", "eleven acorns", "scrubjay demo --text `acorns`", "| recall | all |"):
        assert said in text(first, "README.md")


def test_export_pushes_where_it_is_told_to(story):
    export = story.pushed["commands"]["export"]
    assert export["code"] == 0
    assert export["output"].endswith("pushed to jay/exported\n")
    repository = story.repositories["jay/exported"]
    assert repository.private
    assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"}
    assert {"modeling_adore.py", "model.safetensors"} | TOKENIZER <= set(
        repository.commits[repository.branches["next"]]
    )
    assert story.loaded["access"]["exported"] == 0


def test_a_branch_on_the_hub_is_converted(story):
    assert (story.pushed["converted"]["code"], story.pushed["converted"]["difference"]) == (0, 0)


def test_what_trainer_pushes_loads_and_the_models_own_push_gives_it_its_card(story):
    """Trainer writes a card of its own, which pins no code, over the model's."""
    assert "jay/trained has no README.md with sha256 of code files" in story.pushed["trained"]["unpinned"]
    assert story.pushed["trained"]["verify"]["code"] == 0
    trainers, models = commits(story, "jay/trained")[-2:]
    assert {"training_args.bin", "modeling_rodimus.py"} | TOKENIZER <= set(trainers)
    assert (BEGIN in text(trainers, "README.md"), BEGIN in text(models, "README.md")) == (False, True)
    assert story.loaded["after"]["jay/trained"] == 0


@needs_add_adapter
def test_an_adapter_is_pushed_alone_and_not_over_a_model(story):
    found = story.pushed["adapters"]
    assert "jay/ssd holds a whole model, and this is an adapter" in found["over a model"]
    assert "jay/public is public already" in found["private over public"]
    assert "card= is for whole models" in found["with notes"]
    assert [set(files) for files in commits(story, "jay/public")] == [{".gitattributes"}]
    for name in ("jay/adapter", "jay/saved_adapter"):
        first, files = commits(story, name)[:2]  # all of it in one
        assert set(first) == {".gitattributes"}
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} | TOKENIZER <= set(files)
        assert "config.json" not in files
    assert "- small\n" in text(commits(story, "jay/adapter")[1], "README.md")
    branch = text(commits(story, "jay/adapter")[-1], "README.md")
    assert branch.endswith("# My jay\n\nIt *sings*.\n")
    assert "language: en" in branch
    assert "- small\n" in branch


def test_what_is_pushed_is_what_was_saved(story):
    """Also where the weights are not the model's own."""
    assert story.loaded["after"]["jay/averaged"] == 0


def test_log_of_a_round_trip(story):
    """Every request of one model, from its making to its loading; -s prints them."""
    back = [line for line in story.stranger if "/jay/rodimus/" in line]
    last = next(i for i, line in enumerate(story.author) if "/jay/rodimus/commit/main" in line)
    first = max(i for i, line in enumerate(story.author[:last]) if "/repos/create" in line)
    pushed = story.author[first : last + 1]
    assert [sum(part in line for line in pushed) for part in ("/commit/", "PUT /uploads/")] == [1, 1]
    assert sum("/resolve/" in line and "GET" in line for line in back) > 20
    print("\n".join([*pushed, *back]))  # noqa: T201
