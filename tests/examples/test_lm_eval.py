"""lm-eval on exported folders, by their own code alone: its numbers are the models', and its tasks are sound."""

import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import ZOO

from scrubjay import RecycledConfig, RecycledForCausalLM
from scrubjay.examples.data.corpus import train_tokenizer
from scrubjay.examples.lm_eval_tasks import ruler_tasks
from scrubjay.examples.studies import real_tasks

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "lm_eval_tasks"
SAME = 1e-4  # float32 in a batch of another width: log-probabilities of some -50 differed by 1e-5 at most


@pytest.fixture(scope="module")
def recall_tasks():
    """The module as lm-eval loads it: from its file."""
    spec = importlib.util.spec_from_file_location("recall_tasks", TASKS / "recall_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Models, their tokenizer, and what lm-eval found of each exported folder in one process without scrubjay."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = train_tokenizer([inspect.getsource(random)], 400)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    models = {entry.name: entry.build(**ids) for entry in ZOO}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    script, out = Path(__file__).with_name("lm_eval_child.py"), folder / "found"
    command = [sys.executable, script, TASKS, out, *(folder / name for name in models)]
    paths = {"PYTHONPATH": str(ROOT / "examples"), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: written(out / name) for name in models}
    for name in models:
        found[name]["long"] = long_prompts(out / "long" / name)
    return models, tokenizer, found


def long_prompts(folder):
    """Texts of the documents, and the rows of ids that `generate` got."""
    (file,) = folder.rglob("samples_scrubjay_needle_*.jsonl")
    texts = [json.loads(line)["doc"]["context"] for line in file.read_text().splitlines()]
    return texts, json.loads((folder / "prompts.json").read_text())


def written(folder):
    """What lm-eval's --output_path and --log_samples left in a folder."""
    (results,) = folder.rglob("results_*.json")
    samples = {
        task: [
            json.loads(line)
            for file in folder.rglob(f"samples_{task}_*.jsonl")
            for line in file.read_text().splitlines()
        ]
        for task in ("scrubjay_mqar", "scrubjay_needle")
    }
    return {"results": json.loads(results.read_text())["results"], "samples": samples}


def log_likelihood(model, tokenizer, context, continuation):
    """Of the continuation's tokens, by one plain forward pass."""
    start = len(tokenizer(context).input_ids)
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    return float(scores[start - 1 : -1].gather(1, ids[0, start:, None]).sum())


@pytest.mark.parametrize("name", [entry.name for entry in ZOO])
def test_lm_eval_scores_choices_as_the_model_does(evaluated, name):
    models, tokenizer, found = evaluated
    samples = found[name]["samples"]["scrubjay_mqar"]
    assert len(samples) == 6
    right = []
    for sample in samples:
        doc = sample["doc"]
        want = [log_likelihood(models[name], tokenizer, doc["context"], f" {choice}") for choice in doc["choices"]]
        got = [float(score[0]) for score in sample["filtered_resps"]]
        assert got == pytest.approx(want, abs=SAME)
        right.append(max(range(len(want)), key=want.__getitem__) == doc["answer"])
    assert found[name]["results"]["scrubjay_mqar"]["acc,none"] == pytest.approx(sum(right) / 6)


@pytest.mark.parametrize("name", [entry.name for entry in ZOO])
def test_lm_eval_generates_what_the_model_does(evaluated, name):
    models, tokenizer, found = evaluated
    samples = found[name]["samples"]["scrubjay_needle"]
    assert len(samples) == 6
    hits = []
    for sample in samples:
        ids = tokenizer(sample["doc"]["context"], return_tensors="pt", return_token_type_ids=False)
        answer = models[name].generate(**ids, do_sample=False, max_new_tokens=16)
        text = tokenizer.decode(answer[0, ids.input_ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
        assert sample["resps"][0][0] == text
        number = re.search(r"\d+", text)
        hits.append(number is not None and number[0] == sample["doc"]["answer"])
    assert found[name]["results"]["scrubjay_needle"]["exact_match,first_number"] == pytest.approx(sum(hits) / 6)


@pytest.mark.parametrize("name", [entry.name for entry in ZOO])
def test_lm_eval_gives_long_prompts_whole_where_max_length_says_so(evaluated, name):
    """By itself it cuts them: a recurrent model's configuration names no longest text, and lm-eval takes 2048."""
    _, tokenizer, found = evaluated
    texts, given = found[name]["long"]
    wanted = [tokenizer(text).input_ids for text in texts]
    assert min(map(len, wanted)) > 2048
    unpadded = [list(itertools.dropwhile(tokenizer.pad_token_id.__eq__, ids)) for ids in given]
    assert sorted(unpadded) == sorted(wanted)


def test_the_list_answers_every_question(recall_tasks):
    docs = recall_tasks.mqar(pairs=7, questions=4, num_docs=40)["test"]
    assert len(docs) == 40
    for doc in docs:
        listed, recalled = doc["context"].removeprefix("Remember:\n").split("\n\nRecall:\n")
        pairs = dict(line.split(": ") for line in listed.splitlines())
        assert list(pairs.values()) == doc["choices"]
        assert len(pairs) == len(set(doc["choices"])) == 7
        *answered, asked = recalled.splitlines()
        assert [pairs[line.split(": ")[0]] for line in answered] == [line.split(": ")[1] for line in answered]
        assert len({line.split(":")[0] for line in [*answered, asked]}) == 4
        assert pairs[asked.removesuffix(":")] == doc["choices"][doc["answer"]]


def test_no_place_in_the_list_is_asked_more_often(recall_tasks):
    asked = Counter(recall_tasks.mqar(pairs=4, questions=2, num_docs=2000)["test"]["answer"])
    assert all(abs(asked[place] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for place in range(4))  # five deviations


def test_the_needle_stands_once_at_its_depth(recall_tasks):
    docs = recall_tasks.needle(sentences=10, num_docs=50)["test"]
    for doc in docs:
        text, question = doc["context"].split("\n\n")
        before, after = text.split(f"The code of {re.search(r'code of (.+)[?]', question)[1]} is {doc['answer']}.")
        assert before.count(".") == round(doc["depth"] * 10)
        assert before.count(".") + after.count(".") == 10
        assert doc["answer"] not in before + after + question
    depths = sorted(docs["depth"][:10])
    assert depths[0] < 0.1
    assert depths[-1] > 0.8
    assert max(b - a for a, b in itertools.pairwise(depths)) < 0.2  # the first few are spread as well


def test_tasks_are_decided_by_their_seed(recall_tasks):
    for make in (recall_tasks.mqar, recall_tasks.needle):
        assert make(num_docs=3)["test"].to_list() == make(num_docs=3, pretrained="x")["test"].to_list()
        assert make(num_docs=3)["test"].to_list() != make(num_docs=3, seed=1)["test"].to_list()


@pytest.mark.parametrize(
    "sizes", [{"pairs": 1}, {"pairs": 3, "questions": 4}, {"questions": 0}, {"pairs": 901}], ids=str
)
def test_sizes_that_do_not_fit_are_refused(recall_tasks, sizes):
    with pytest.raises(ValueError, match="mqar needs 2 <= pairs <= 900 and 1 <= questions <= pairs; got"):
        recall_tasks.mqar(**sizes)
    with pytest.raises(ValueError, match="at least one sentence"):
        recall_tasks.needle(sentences=0)


def test_each_task_file_names_a_function_that_exists(recall_tasks):
    files = [TASKS / "mqar.yaml", TASKS / "needle.yaml"]
    assert {file.stem for file in TASKS.glob("*.yaml")} == {"mqar", "needle", "_ruler", *real_tasks.RULER}
    for file in files:
        named = re.search(r"!function recall_tasks\.(\w+)", file.read_text())[1]
        assert named == file.stem
        assert callable(getattr(recall_tasks, named))
        settings = yaml.safe_load(file.read_text().replace("!function ", ""))
        assert settings["task"] == f"scrubjay_{named}"


@pytest.fixture(scope="module")
def few_keys(tmp_path_factory):
    """(folder, model, tokenizer) of a random Llama that reads 40 keys a step."""
    folder = tmp_path_factory.mktemp("few")
    tokenizer = train_tokenizer([" ".join(real_tasks.sentences())[:60_000]], 1500)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    base = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.3)
    torch.manual_seed(0)
    config = RecycledConfig(base_config=base, policy="snapkv", budget=40, eos_token_id=tokenizer.eos_token_id)
    model = RecycledForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.mark.parametrize("kind", real_tasks.RULER)
def test_rulers_kinds_are_the_studys_samples(few_keys, kind):
    folder, _, tokenizer = few_keys
    settings = yaml.safe_load((TASKS / f"{kind}.yaml").read_text().replace("!function ", ""))
    assert settings == {
        "include": "_ruler.yaml",
        "task": f"scrubjay_{kind}",
        "custom_dataset": f"ruler_tasks.{kind}",
    }
    made = getattr(ruler_tasks, kind)(length=800, num_docs=2, seed=5, pretrained=str(folder), version=1.0)["test"]
    for number, doc in enumerate(made):
        one = real_tasks.sample(kind, tokenizer, 800, 5 + number)
        assert doc["answers"] == one.answers
        assert doc["context"] == tokenizer.decode(one.prompt)
        assert ruler_tasks.found(doc, [" ".join(one.answers)]) == {"found": 1}
        assert ruler_tasks.found(doc, [one.answers[0]]) == {"found": 1 / len(one.answers)}


def test_rulers_kinds_run_through_a_cache_of_few_keys(few_keys):
    folder, model, tokenizer = few_keys
    given = {"length": 700, "num_docs": 3, "tokenizer": str(folder)}
    manager = TaskManager(include_path=str(TASKS), metadata=given)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    done = lm_eval.simple_evaluate(wrapped, tasks=["scrubjay_multikey"], task_manager=manager)
    assert done["results"]["scrubjay_multikey"]["found,none"] == 0  # a random model
    full = LlamaForCausalLM(model.config.base_config)
    full.load_state_dict({name.removeprefix("model.decoder."): x for name, x in model.state_dict().items()})
    texts = []
    for told in done["samples"]["scrubjay_multikey"]:
        ids = tokenizer(told["doc"]["context"], return_tensors="pt", return_token_type_ids=False)
        wrote = [one.generate(**ids, do_sample=False, max_new_tokens=64) for one in (model, full)]
        texts.append([tokenizer.decode(row[0, ids.input_ids.shape[1] :], skip_special_tokens=True) for row in wrote])
        assert told["resps"][0][0] == texts[-1][0]
    assert any(few != all_keys for few, all_keys in texts)


def test_rulers_kinds_need_a_tokenizer():
    with pytest.raises(ValueError, match="pass --model_args pretrained=FOLDER"):
        ruler_tasks.single()
