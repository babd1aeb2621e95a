"""torch.compile of the recurrent models: one graph, for any length, of a prompt, of a step and of training.

Backends that write no code stand in for inductor, which needs a C++ compiler: what is traced is the same.
`test_kernels_operators.py` has the operators, `test_export.py` the wrapped decoders.
"""

import shutil
import sys
from itertools import pairwise

import pytest
import torch
from test_export import BOUND, GRADIENT, shallow
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from zoo import ZOO, relative, tokens

# torch's own compiler does
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
LENGTHS = (20, 23, 40, 70, 150)  # from the second on one program serves them all
ENTRIES = {entry.name: entry for entry in ZOO}


@pytest.fixture(autouse=True)
def _forgets():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def settled(turn, after=2):
    """Nothing is compiled any more from this turn on."""
    return torch.compiler.set_stance("fail_on_recompile" if turn >= after else "default")


def same_state(got, want):
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        assert mine.seen == theirs.seen
        for name, tensor in theirs.tensors().items():
            assert (mine.tensors()[name] - tensor).abs().max() <= BOUND * tensor.abs().max(), name


@torch.no_grad()
def test_a_prompt_of_any_length_is_one_program(recurrent):
    """With the cache that is made inside."""
    model = shallow(recurrent)
    program = torch.compile(model, backend="eager", fullgraph=True)
    for turn, length in enumerate(LENGTHS):
        with settled(turn):
            got, want = program(tokens(2, length)), model(tokens(2, length))
        assert relative(got.logits, want.logits) < BOUND
        same_state(got.cache, want.cache)


@torch.no_grad()
def test_a_given_cache_goes_on_with_padded_rows(recurrent):
    model = shallow(recurrent)
    program = torch.compile(model, backend="eager", fullgraph=True)
    for turn, length in enumerate((20, 23, 40, 70)):
        mine, theirs = model.cache_class(model), model.cache_class(model)
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, : turn + 3], mask[1, -2:] = 0, 0
        for part in range(2):
            ids = tokens(2, length, seed=part)
            with settled(turn):
                got = program(ids, attention_mask=mask, cache=mine)
            want = model(ids, attention_mask=mask, cache=theirs)
            assert relative(got.logits[mask.bool()], want.logits[mask.bool()]) < BOUND
            same_state(mine, theirs)


@torch.no_grad()
def test_no_step_of_a_text_is_compiled_anew(recurrent):
    """Across the border of the window of 9."""
    model = shallow(recurrent)
    program = torch.compile(model, backend="eager", fullgraph=True)
    mine, theirs = model.cache_class(model), model.cache_class(model)
    for cache in (mine, theirs):
        model(tokens(2, 3), cache=cache)
    for turn in range(64):
        ids = tokens(2, 1, seed=turn)
        with settled(turn):
            got = program(ids, cache=mine).logits
        assert relative(got, model(ids, cache=theirs).logits) < BOUND
    same_state(mine, theirs)


@torch.no_grad()
def test_a_state_made_in_inference_mode_goes_on_in_a_program(recurrent):
    model = shallow(recurrent)
    mine, theirs = model.cache_class(model), model.cache_class(model)
    for cache in (mine, theirs):
        with torch.inference_mode():
            model(tokens(2, 12), cache=cache)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens(2, 1), cache=mine).logits
    assert relative(got, model(tokens(2, 1), cache=theirs).logits) < BOUND


def gradients(model, forward, **inputs):
    torch.manual_seed(3)  # of Taipan's choices
    loss = forward(**inputs, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]


def assert_same_gradients(model, program, **inputs):
    for got, want in zip(gradients(model, program, **inputs), gradients(model, model, **inputs), strict=True):
        assert (got - want).abs().max() <= GRADIENT * want.abs().max()


def test_training_is_one_program_for_any_length(recurrent):
    model = shallow(recurrent).train()
    program = torch.compile(model, backend="aot_eager", fullgraph=True)
    for turn, length in enumerate(LENGTHS[:4]):
        ids = tokens(2, length)
        with settled(turn):
            assert_same_gradients(model, program, input_ids=ids, labels=ids)


def test_training_on_packed_documents_is_one_program(recurrent):
    """As DataCollatorWithFlattening writes them."""
    model = shallow(recurrent).train()
    program = torch.compile(model, backend="aot_eager", fullgraph=True)
    for turn, cuts in enumerate(([0, 5, 20], [0, 1, 9, 23], [0, 3, 9, 17, 40])):
        ids, offsets = tokens(1, cuts[-1]), torch.tensor(cuts, dtype=torch.int32)
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])[None]
        marks = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "position_ids": positions}
        with settled(turn):
            assert_same_gradients(model, program, input_ids=ids, labels=ids, **marks)


@torch.no_grad()
@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ({"cu_seq_lens_q": [0, 9, 19]}, "must rise from 0 to batch"),
        ({"cu_seq_lens_q": [0, 12, 9, 20]}, "must rise from 0 to batch"),
        ({"cu_seq_lens_q": [0, 9, 20], "cu_seq_lens_k": [0, 8, 20]}, "cu_seq_lens_k disagree"),
        ({"cu_seq_lens_q": [0, 9, 20], "position_ids": [[*range(8), *range(12)]]}, "position_ids disagree"),
    ],
)
def test_offsets_that_do_not_fit_are_refused_when_a_program_runs(marks, said):
    program = torch.compile(shallow(ENTRIES["ssd"]), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=said):
        program(tokens(1, 20), **{name: torch.tensor(value) for name, value in marks.items()}, use_cache=False)


@pytest.mark.parametrize(
    "changes",
    [{"kv_scope": "selected"}, {"kv_scope": "selected", "window_axis": "rank"}, {"train_attention": "dense"}],
    ids=lambda changes: " ".join(changes.values()),
)
def test_every_kind_of_selective_attention_is_one_program(changes):
    model, ids = ENTRIES["taipan"].build(num_hidden_layers=2, **changes), tokens(2, 40)
    program = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        mine, theirs = model.cache_class(model), model.cache_class(model)
        for piece in (ids, ids[:, :1], ids[:, 1:2], ids[:, :7]):
            assert relative(program(piece, cache=mine).logits, model(piece, cache=theirs).logits) < BOUND
    model.train()
    assert_same_gradients(model, program, input_ids=ids, labels=ids)


def test_a_graph_does_not_grow_with_the_length(recurrent):
    sizes = []

    def counting(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    model = shallow(recurrent)
    for length in (40, 400):
        torch.compiler.reset()
        torch.compile(model, backend=counting, fullgraph=True, dynamic=False)(tokens(1, length), use_cache=False)
    assert sizes[0] == sizes[1]


def test_generate_of_a_compiled_model_breaks_no_graph_and_compiles_no_step_anew(recurrent):
    model, ids = shallow(recurrent), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = dict(attention_mask=mask, do_sample=False)
    want = model.generate(ids, max_new_tokens=30, **options)
    model.compile(backend="eager", fullgraph=True)
    model.generate(ids, max_new_tokens=4, **options)  # a prompt, a step, a step of any place
    with settled(2):
        assert torch.equal(model.generate(ids, max_new_tokens=30, **options), want)
    assert not counters["graph_break"]


def test_trainer_compiles_a_model(recurrent, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 24)]
    losses = []
    for compiled in (False, True):
        options = dict(torch_compile=True, torch_compile_backend="aot_eager") if compiled else {}
        arguments = TrainingArguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            **options,
        )
        trainer = Trainer(shallow(recurrent), arguments, train_dataset=rows)
        losses.append(trainer.train().training_loss)
    assert not counters["graph_break"]
    assert losses[1] == pytest.approx(losses[0], rel=GRADIENT)


@torch.no_grad()
def test_a_folder_with_its_own_code_compiles_beside_the_library(tmp_path):
    """Each calls the operators of its own files."""
    model, ids = shallow(ENTRIES["ssd"]), tokens(1, 20)
    model.save_pretrained(tmp_path)
    loaded = get_class_from_dynamic_module("modeling_ssd.SSDForCausalLM", tmp_path).from_pretrained(tmp_path)
    own = sys.modules[type(loaded).__module__.rsplit(".", 1)[0] + ".operators"]
    namespaces = []

    def reading(graph, _):
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        namespaces.append({name.split(".")[0] for name in targets if name.startswith("scrubjay_")})
        return graph.forward

    for each in (model, loaded):
        program = torch.compile(each, backend=reading, fullgraph=True)
        assert torch.equal(program(ids, use_cache=False).logits, program(ids, use_cache=False).logits)
        assert relative(program(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < BOUND
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert namespaces[1] == {own._OWN.ns}
    assert len(namespaces[0] | namespaces[1]) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++: g++ is missing")
def test_inductor_gives_what_eager_gives():
    """Of one model: what it is given differs in the operators alone, which the other tests of this file run."""
    model, ids = shallow(ENTRIES["ssd"]), tokens(2, 40)
    program = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        got, want = program(ids), model(ids)
        assert relative(got.logits, want.logits) < BOUND
        got, want = (each(ids[:, :1], cache=out.cache) for each, out in ((program, got), (model, want)))
        assert relative(got.logits, want.logits) < BOUND
    assert_same_gradients(model, program, input_ids=ids, labels=ids)
