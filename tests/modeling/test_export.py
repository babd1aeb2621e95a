"""torch.export of the models, and masks of compiled ones. `test_kernels_exported.py` covers the arithmetic that is
exported, `test_compile.py` compiled prompts, steps and training."""

import sys
import textwrap

import pytest
import torch
from processes import run
from torch.export import Dim, export
from zoo import ZOO, relative, tokens

from scrubjay import DecodeStep, Prefill, export_decoding

BOUND = 3e-6  # five times the worst error against eager that was measured, 6.4e-7; the decoders of transformers: 0
GRADIENT = 2e-5  # the same of a gradient, 3.4e-6
ANY = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
STEPS = 12  # beyond the window of 9
# Reads programs, decodes greedily, writes logits and states: torch alone.
CHILD = textwrap.dedent("""
    import sys, torch

    for folder in sys.argv[1:]:
        prefill, step = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("prefill", "step"))
        found = []
        for prompt in torch.load(f"{folder}/prompts.pt"):
            logits, *state = prefill(*prompt)
            every = [logits]
            for _ in range(%d):
                kept = [tensor.clone() for tensor in state]
                logits, *new = step(logits.argmax(-1, keepdim=True), *state)
                assert all(map(torch.equal, kept, state)), "a step is not to change the state that it is given"
                every.append(logits)
                state = new
            found.append((torch.stack(every, 1), state))
        torch.save(found, f"{folder}/found.pt")
    assert not {"scrubjay", "transformers"} & set(sys.modules), "the programs are not to need them"
""")


def masks(length=20):
    """Padding on the left, on the right, inside, everywhere, nowhere."""
    left, right, inside, all_over, none = (torch.ones(2, length, dtype=torch.long) for _ in range(5))
    left[0, :7], right[1, -6:], inside[0, 5:9] = 0, 0, 0
    all_over[0, ::2], all_over[1, 1:-1:3], all_over[1, -2:] = 0, 0, 0
    return {"left": left, "right": right, "inside": inside, "all over": all_over, "none": none}


def assert_same(model, program, ids, mask=None):
    """Logits of real tokens are the model's own."""
    inputs = {"input_ids": ids, "use_cache": False} | ({} if mask is None else {"attention_mask": mask})
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    got, want = (call(**inputs).logits[real] for call in (program, model))
    assert relative(got, want) < BOUND


def shallow(entry):
    """A model of as few blocks as have every part: to trace a block takes seconds."""
    return entry.build(num_hidden_layers=2 if entry.name in ("taipan", "ssd_hybrid") else 1)


def test_an_exported_program_takes_any_mask_batch_and_length(entry):
    """From one token to several chunks of every recurrence."""
    model, shapes = shallow(entry), {"input_ids": ANY, "attention_mask": ANY, "use_cache": None}
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": tokens(2, 20, seed=7), "attention_mask": mask, "use_cache": False}
    program = export(model, (), inputs, dynamic_shapes=shapes).module()
    for mask in masks().values():
        assert_same(model, program, tokens(2, 20), mask)
    for batch, length in ((1, 7), (3, 1), (1, 1), (3, 32), (2, 64), (2, 65), (1, 150)):
        mask = torch.rand(batch, length) < 0.7
        mask[:, length // 2] = True
        assert_same(model, program, tokens(batch, length), mask.long())


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # transformers' own
def test_an_exported_program_of_one_shape_without_a_mask_gives_the_logits_of_eager(entry):
    """By `strict`, which reads the code where the default runs it."""
    model = shallow(entry)
    program = export(model, (), {"input_ids": tokens(2, 20, seed=7), "use_cache": False}, strict=True).module()
    assert_same(model, program, tokens(2, 20))


@torch.no_grad()
def test_a_compiled_model_takes_every_mask_with_one_graph(entry):
    model = shallow(entry)
    torch.compiler.reset()
    program = torch.compile(model, backend="eager", fullgraph=True)
    for number, mask in enumerate(masks().values()):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert_same(model, program, tokens(2, 20), mask)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does
def test_a_compiled_model_has_the_gradients_of_eager(recurrent):
    model, ids, mask = shallow(recurrent), tokens(2, 20), masks()["inside"]
    torch.compiler.reset()
    grads = []
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        logits = call(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        grads.append(torch.autograd.grad(logits.square().sum(), list(model.parameters()), materialize_grads=True))
    for eager, compiled in zip(*grads, strict=True):
        assert (compiled - eager).abs().max() <= GRADIENT * eager.abs().max()


def prompts():
    """Of one token, of two padded rows, of several chunks."""
    long = (torch.arange(70) % 3 > torch.tensor([[0], [-1], [1]])).long()
    return [
        (tokens(1, 1), torch.ones(1, 1, dtype=torch.long)),
        (tokens(2, 20), masks()["all over"]),
        (tokens(3, 70), long),
    ]


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """name -> (model, what a process of torch alone decoded with saved programs: logits and state of each prompt)."""
    models, folders = {}, {}
    for entry in ZOO:
        if entry.recurrent:
            folder, model = tmp_path_factory.mktemp(entry.name), shallow(entry)
            for name, program in zip(("prefill", "step"), export_decoding(model), strict=True):
                torch.export.save(program, folder / f"{name}.pt2")
            torch.save(prompts(), folder / "prompts.pt")
            models[entry.name], folders[entry.name] = model, folder
    run([sys.executable, "-c", CHILD % STEPS, *map(str, folders.values())], timeout=300)
    return {name: (models[name], torch.load(folder / "found.pt")) for name, folder in folders.items()}


@torch.no_grad()
def test_saved_programs_decode_as_the_model_does_where_torch_is_alone(recurrent, decoded):
    """Greedily, fed with the tokens that the programs chose; prompts and batches of other sizes than were traced."""
    model, found = decoded[recurrent.name]
    for (ids, mask), (got, state) in zip(prompts(), found, strict=True):
        out = model(ids, attention_mask=mask, use_cache=True)
        want, cache = [out.logits[torch.arange(len(ids)), (torch.arange(ids.shape[1]) * mask).amax(1)]], out.cache
        for step in range(STEPS):
            fed = got[:, step].argmax(-1, keepdim=True)
            want.append(model(fed, cache=cache, use_cache=True).logits[:, -1])
        assert got.shape == (len(ids), STEPS + 1, 97)
        assert relative(got, torch.stack(want, 1)) < BOUND
        held = [tensor for layer in cache.layers for tensor in layer.tensors().values()]
        for mine, eager in zip(state, held, strict=True):
            assert (mine.dtype, mine.shape) == (eager.dtype, eager.shape)
            assert (mine - eager).abs().max() <= BOUND * eager.abs().max()


@torch.no_grad()
def test_a_prompts_last_token_is_found_by_an_added_mask():
    model, ids = shallow(ZOO[0]), tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    prefill = Prefill(model)
    want = prefill(ids, mask)
    for got in (prefill(ids, torch.where(mask > 0, 0.0, -torch.inf)), prefill(ids, mask.float())):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@torch.no_grad()
def test_decoding_is_exported_of_one_size_on_request():
    model = shallow(ZOO[0])
    prefill, step = (program.module() for program in export_decoding(model, batch_size=2, length=5))
    logits, *state = prefill(tokens(2, 5), torch.ones(2, 5, dtype=torch.long))
    assert relative(logits, model(tokens(2, 5)).logits[:, -1]) < BOUND
    with pytest.raises(AssertionError, match=r"Guard failed|to be equal to"):
        prefill(tokens(2, 6), torch.ones(2, 6, dtype=torch.long))
    with pytest.raises(AssertionError, match=r"Guard failed|to be equal to"):
        step(tokens(3, 1), *state)


def test_what_a_program_gives_has_no_graph_that_a_loop_would_make_longer():
    model = ZOO[0].build()
    assert model.lm_head.weight.requires_grad
    outputs = Prefill(model)(tokens(2, 5), torch.ones(2, 5))
    outputs += DecodeStep(model)(tokens(2, 1), *outputs[1:])
    assert not any(tensor.requires_grad for tensor in outputs)


def test_an_exported_program_refuses_positions_that_restart():
    model, ids, mask = shallow(ZOO[0]), tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    rising, restarting = torch.arange(8).expand(2, 8).clone(), torch.arange(8).expand(2, 8).clone()
    restarting[1, 5:] = torch.arange(3)
    inputs = {"input_ids": ids, "use_cache": False}
    program = export(model, (), inputs | {"position_ids": rising}).module()
    assert relative(program(**inputs, position_ids=rising).logits, model(**inputs).logits) < BOUND
    with pytest.raises(RuntimeError, match="position_ids restart"):
        program(**inputs, position_ids=restarting)

    program = export(model, (), inputs | {"attention_mask": mask, "position_ids": rising}).module()
    mask[0, :2], mask[1, 4] = 0, 0
    padded = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate() counts
    want = model(**inputs, attention_mask=mask).logits[mask.bool()]
    got = program(**inputs, attention_mask=mask, position_ids=padded).logits[mask.bool()]
    assert relative(got, want) < BOUND
    padded[1, 5:] = torch.arange(3)  # a document after padding
    with pytest.raises(RuntimeError, match="position_ids restart"):
        program(**inputs, attention_mask=mask, position_ids=padded)


@pytest.mark.parametrize(
    "packing", [{"cu_seq_lens_q": torch.tensor([0, 3, 8])}, {"seq_idx": torch.tensor([[0, 1] * 4])}]
)
def test_packed_documents_are_refused_by_name_when_a_model_is_exported(entry, packing):
    with pytest.raises(ValueError, match=r"torch\.export cannot write down packed documents"):
        export(entry.build(), (), {"input_ids": tokens(1, 8), "use_cache": False} | packing)


def test_export_decoding_says_what_it_cannot_export(entry):
    model = entry.build()
    if not entry.recurrent:
        with pytest.raises(ValueError, match=f"whose cache is a state .*got {entry.model.__name__}"):
            export_decoding(model)
        return
    with pytest.raises(ValueError, match=r"call model\.eval"):
        export_decoding(model.train())
    with pytest.raises(ValueError, match=r"The state of this model has .* tensors; got 2"):
        DecodeStep(model.eval())(tokens(1, 1), torch.zeros(1), torch.zeros(1))


@torch.no_grad()
def test_a_prompt_of_padding_alone_has_no_last_token(recurrent):
    model, ids, mask = shallow(recurrent), tokens(2, 6), torch.ones(2, 6).long()
    mask[1] = 0
    with pytest.raises(ValueError, match="Row 1 of 2 has no token"):
        Prefill(model)(ids, mask)
    program = export(Prefill(model), (ids, torch.ones_like(mask))).module()
    assert program(ids, torch.ones_like(mask))[0].shape == (2, model.config.vocab_size)
    with pytest.raises(RuntimeError, match="no token in this call"):
        program(ids, mask)
