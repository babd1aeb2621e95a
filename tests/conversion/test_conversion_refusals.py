"""What a conversion refuses: each error says what came and what was needed, and leaves nothing behind."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conversion_cases import SMALL, assert_same, codestral, fla, grouped, mamba_ssm, stored, transformers
from safetensors.torch import save_file

from scrubjay import SSDConfig, SSDForCausalLM
from scrubjay.conversion.convert import convert
from scrubjay.examples.benchmarks.published_layouts import mamba2_shapes, values, write_familiar, write_mamba_ssm


def refused(source, match, **arguments):
    """The error, after which the folder of the source holds what it held."""
    place = Path(source).parent
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(ValueError, match=match) as caught:
        convert(source, place / "new", progress=False, **arguments)
    assert sorted(path.name for path in place.iterdir()) == before
    return str(caught.value)


def rewrite(folder, change):
    """Change the tensors of a folder."""
    tensors = stored(folder)
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


def configure(folder, **changes):
    path = next(folder / name for name in ("config.json", "params.json") if (folder / name).is_file())
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_all_tensors_that_do_not_fit_are_listed_at_once(tmp_path):
    source = tmp_path / "source"
    mamba_ssm(source)

    def spoil(tensors):
        del tensors["backbone.layers.1.mixer.D"]
        del tensors["backbone.norm_f.weight"]
        tensors["backbone.layers.0.mixer.out_proj.weight"] = torch.zeros(32, 63)
        tensors["backbone.layers.0.mixer.gate.weight"] = torch.zeros(3)

    rewrite(source, spoil)
    error = refused(source, "4 tensors of the checkpoint do not fit. Nothing was written.")
    assert "missing: backbone.layers.1.mixer.D [4]" in error
    assert "missing: backbone.norm_f.weight [32]" in error
    assert "wrong shape: backbone.layers.0.mixer.out_proj.weight is [32, 63], needed [32, 64]" in error
    assert "unknown: backbone.layers.0.mixer.gate.weight [3]" in error


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2, 2), (0, 3)])
@pytest.mark.parametrize(
    "name", ["backbone.embedding.weight", "backbone.layers.0.mixer.conv1d.weight", "backbone.norm_f.weight"]
)
def test_a_tensor_of_other_dimensions_is_named(tmp_path, name, shape):
    mamba_ssm(tmp_path / "source")
    rewrite(tmp_path / "source", lambda tensors: tensors.update({name: torch.zeros(shape)}))
    ours = {"embedding": "model.embed_tokens", "norm_f": "backbone.norm_f"}.get(name.split(".")[1], "mixer.conv1d")
    assert f"{ours}.weight is {list(shape)}, needed" in refused(tmp_path / "source", "wrong shape: ")


def test_numbers_that_a_dtype_does_not_hold_are_refused_and_do_not_become_infinite(tmp_path):
    mamba_ssm(tmp_path / "source")
    name = "backbone.norm_f.weight"
    rewrite(tmp_path / "source", lambda tensors: tensors[name][3:4].fill_(-7e4))
    refused(tmp_path / "source", "model.norm.weight has numbers up to 7e.04, beyond the range", dtype=torch.float16)
    convert(tmp_path / "source", tmp_path / "new", dtype=torch.bfloat16, progress=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_tensors_that_hold_no_floating_point_numbers_or_those_of_8_bits_are_refused(tmp_path, dtype):
    mamba_ssm(tmp_path / "source")
    name = "backbone.layers.0.mixer.A_log"
    rewrite(tmp_path / "source", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    match = f"1 tensors .*\n  wrong dtype: {name} is {dtype}, needed a floating-point one of 16 bits or more"
    for cast in (None, torch.bfloat16):
        refused(tmp_path / "source", match, dtype=cast)


@pytest.mark.parametrize(
    "changes", [{"vocab_size": "many"}, {"pad_vocab_size_multiple": 0}, {"ssm_cfg": "Mamba2"}], ids=str
)
def test_a_value_of_the_wrong_kind_in_the_configuration_is_an_error_of_that_file(tmp_path, changes):
    mamba_ssm(tmp_path / "source")
    configure(tmp_path / "source", **changes)
    refused(tmp_path / "source", r"config.json has a value of the wrong kind: .*a published one of mamba_ssm")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"chunks": 16}, "chunks: no such field in SSDConfig"),
        ({"dtype": "float16"}, r"dtype is no setting: .* with dtype= \(--dtype\)"),
        ({"architectures": ["X"]}, "architectures is no setting: it is the class of the model"),
        ({"transformers_version": "4"}, "transformers_version is no setting: it is the version that writes"),
        ({"layer_norm_epsilon": 0}, r"layer_norm_epsilon must be positive; got 0\.0"),
        ({"chunk_size": 1.5}, "'chunk_size' expected int, got float"),
        ({"use_bias": 1}, "'use_bias' expected bool, got int"),
        ({"layer_norm_epsilon": True}, "'layer_norm_epsilon' expected float, got bool"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, match):
    mamba_ssm(tmp_path / "source")
    refused(tmp_path / "source", match, settings=settings)


def test_a_configuration_that_says_quantized_is_refused_whatever_the_tensors_are(tmp_path):
    mamba_ssm(tmp_path / "source")
    configure(tmp_path / "source", quantization_config={"quant_method": "gptq", "bits": 4})
    error = refused(tmp_path / "source", r"config.json says that the weights are quantized \(.*method gptq\)")
    assert "where they are plain already, say so: --set quantization_config=null" in error
    convert(tmp_path / "source", tmp_path / "plain", settings={"quantization_config": None})
    configure(tmp_path / "source", quantization_config={"load_in_4bit": False, "load_in_8bit": False})
    convert(tmp_path / "source", tmp_path / "off")
    for name in ("plain", "off"):
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        assert_same(stored(tmp_path / name), stored(tmp_path / "off"))


@pytest.mark.parametrize(
    ("write", "other", "said"),
    [
        (mamba_ssm, transformers, "The configuration is transformers, and the tensors are named as mamba_ssm names"),
        (mamba_ssm, fla, "The configuration is fla, and the tensors are named as mamba_ssm names"),
        (transformers, mamba_ssm, "The configuration is mamba_ssm, and the tensors are named as transformers names"),
    ],
    ids=["mamba_ssm, transformers", "mamba_ssm, fla", "transformers, mamba_ssm"],
)
def test_a_configuration_of_another_layout_is_refused(tmp_path, write, other, said):
    write(tmp_path / "source")
    config = (tmp_path / "source" / "config.json").read_text()
    other(tmp_path / "other")
    (tmp_path / "source" / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    assert "or none" in refused(tmp_path / "source", said)
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path / "source", "The configuration is no Mamba-2 one, and the tensors are named as")
    ours = SSDConfig(hidden_size=32, num_hidden_layers=2, vocab_size=48, head_dim=16, state_size=8)
    ours.save_pretrained(tmp_path / "source")  # leaves no doubt of the layout, and the names do not fit it
    refused(tmp_path / "source", "missing: no name is known for|missing: model.embed_tokens.weight", to="codestral")
    (tmp_path / "source" / "config.json").write_text(config)
    convert(tmp_path / "source", tmp_path / "new", progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.2.mixer.D",
        "backbone.layers.0.mixer.in_proj.bias",
        "backbone.layers.0.norm2.weight",
        "D",
        "model",
    ],
)
def test_a_tensor_more_is_an_error(tmp_path, name):
    mamba_ssm(tmp_path / "source")
    rewrite(tmp_path / "source", lambda tensors: tensors.update({name: torch.zeros(4)}))
    if name.endswith("in_proj.bias"):  # it says that there are biases, which the configuration denies
        refused(tmp_path / "source", r"bias False \(the default, as nothing is given\), the tensors say True")
    else:
        refused(tmp_path / "source", rf"1 tensors of the checkpoint do not fit.*\n  unknown: {name} \[4\]")


def test_a_head_that_is_no_copy_is_an_error_where_the_configuration_ties_it(tmp_path):
    mamba_ssm(tmp_path / "source")
    rewrite(tmp_path / "source", lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] * 1.01}))
    refused(tmp_path / "source", "lm_head.weight differs from backbone.embedding.weight")
    configure(tmp_path / "source", tie_embeddings=False)
    convert(tmp_path / "source", tmp_path / "new")
    assert torch.equal(stored(tmp_path / "new")["lm_head.weight"], stored(tmp_path / "source")["lm_head.weight"])


@pytest.mark.parametrize(
    ("write", "changes", "said", "found"),
    [
        (mamba_ssm, {"d_model": 4096}, "d_model 4096", "32"),
        (mamba_ssm, {"n_layer": 3}, "n_layer 3", "2"),
        (mamba_ssm, {"vocab_size": 50277}, "vocab_size 50277, padded to 50288", "48"),
        (mamba_ssm, {"vocab_size": 64}, "vocab_size 64", "48"),
        (
            mamba_ssm,
            {"ssm_cfg": {"layer": "Mamba2", "d_state": 8}},
            r"headdim 64 \(the default, as nothing is given\)",
            "16",
        ),
        (
            mamba_ssm,
            {"ssm_cfg": {"layer": "Mamba2", "headdim": 16}},
            "ngroups 1 and d_state 128",
            "8 for their product",
        ),
        (mamba_ssm, {"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8, "expand": 4}}, "expand 4", "2"),
        (mamba_ssm, {"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8, "d_conv": 3}}, "d_conv 3", "4"),
        (mamba_ssm, {"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8, "bias": True}}, "bias True", "False"),
        (mamba_ssm, {"d_intermediate": 64}, "d_intermediate 64, which makes MLPs of 128", "0"),
        (mamba_ssm, {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}}, r"attn_layer_idx \[1\]", r"\[\]"),
        (transformers, {"hidden_size": 4096}, "hidden_size 4096", "32"),
        (transformers, {"num_heads": 8}, "num_heads 8", "4"),
        (transformers, {"n_groups": 8}, "n_groups 8 and state_size 8", "16 for their product"),
        (transformers, {"use_conv_bias": False}, "use_conv_bias False", "True"),
        (fla, {"num_hidden_layers": 48}, "num_hidden_layers 48", "2"),
        (codestral, {"dim": 4096}, "dim 4096", "64"),
        (codestral, {"n_groups": 8}, "n_groups 8 and d_state 128", "256 for their product"),
    ],
    ids=lambda x: None if callable(x) else str(x),
)
def test_a_configuration_that_contradicts_the_tensors_is_said_with_both_values(tmp_path, write, changes, said, found):
    write(tmp_path / "source")
    configure(tmp_path / "source", **changes)
    refused(tmp_path / "source", f"contradicts the tensors: .*it says {said}, the tensors say {found}")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn_layer_idx": [1]}, "attn_cfg has no num_heads"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer is 'Mamba1'"),
        ({"ssm_cfg": {}}, "ssm_cfg.layer is 'Mamba1'"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim is True"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm is False"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate is True"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32}}, "ssm_cfg.d_ssm is 32"),
        ({"ssm_cfg": {"layer": "Mamba2", "swish": 1}}, "unknown meaning: swish"),
    ],
    ids=str,
)
def test_models_that_are_no_plain_mamba2_are_refused_by_name(tmp_path, changes, match):
    mamba_ssm(tmp_path / "source")
    configure(tmp_path / "source", **changes)
    refused(tmp_path / "source", match)
    with pytest.raises(ValueError, match=match):
        SSDForCausalLM.from_pretrained(tmp_path / "source")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"d_ssm": 32}, "d_ssm is 32: the mixer would have an MLP inside"),
        ({"D_has_hdim": True}, "D_has_hdim is True: D would be a number for each channel"),
        ({"rmsnorm": False}, "rmsnorm is False: the norm behind the gate would be left out"),
        ({"norm_before_gate": True}, "norm_before_gate is True: the norm would stand before the gate"),
    ],
    ids=str,
)
def test_what_the_authors_mixer_can_be_beside_is_refused_with_the_reason(given, said):
    with pytest.raises(ValueError, match=f"{said}.* The published checkpoints do without it"):
        SSDConfig(hidden_size=64, **given)
    SSDConfig(hidden_size=64, d_ssm=None, D_has_hdim=False, rmsnorm=True, norm_before_gate=False)  # what it is


@pytest.mark.parametrize("changes", [{"rmsnorm": False}, {"norm_before_gate": True}, {"D_has_hdim": True}], ids=str)
def test_fla_models_with_other_norms_are_refused(tmp_path, changes):
    fla(tmp_path / "source")
    configure(tmp_path / "source", **changes)
    refused(tmp_path / "source", f"{next(iter(changes))} is .* this model computes")


def test_fla_models_with_groups_are_refused(tmp_path):
    """fla's gated norm takes all channels together."""
    write_familiar(tmp_path / "source", SMALL | dict(G=2), fla=True)
    refused(tmp_path / "source", "n_groups is 2: fla normalises the channels of all groups together")


@pytest.mark.parametrize(
    ("write", "to", "match"),
    [
        (grouped, "codestral", "codestral cannot express this model: state_size is 6, it has 128; head_dim is 16"),
        (grouped, "fla", "fla cannot express this model: n_groups is 4, it has 1"),
        (lambda f: transformers(f, layer_norm_epsilon=1e-6), "mamba_ssm", "layer_norm_epsilon is 1e-06, it has 1e-05"),
        (mamba_ssm, "codefuse", "ssd model cannot be written as 'codefuse'. Choose one of scrubjay, transformers, fla"),
        (mamba_ssm, "mamba_ssm", "is of the layout mamba_ssm already"),
    ],
    ids=["codestral", "fla", "epsilon", "codefuse", "same"],
)
def test_what_a_target_cannot_express_is_refused(tmp_path, write, to, match):
    write(tmp_path / "source")
    refused(tmp_path / "source", match, to=to)


def test_a_mixer_with_an_mlp_inside_is_refused(tmp_path):
    mamba_ssm(tmp_path / "source")
    rewrite(tmp_path / "source", lambda t: t.update({"backbone.layers.0.mixer.in_proj.weight": torch.zeros(180, 32)}))
    refused(
        tmp_path / "source", "in_proj has 180 rows; of 64 channels, 80 convolved ones and 4 heads this model makes 148"
    )


def test_an_unknown_layout_says_what_was_looked_for(tmp_path):
    (tmp_path / "source").mkdir()
    save_file({"weight": torch.zeros(3)}, tmp_path / "source" / "model.safetensors")
    error = refused(tmp_path / "source", "layout of .* is unknown, or no other has it. Looked for")
    assert all(name in error for name in ("backbone.embedding.weight", "model_type mamba2", "codefuse", "llama"))
    for family in ("ssd", "rodimus", "adore", "recycled"):
        assert f"scrubjay ({family}): model_type scrubjay_{family} in config.json" in error
    assert "taipan" not in error  # of which no other library has a layout


def test_a_checkpoint_without_configuration_is_read_by_its_shapes(tmp_path):
    tensors = mamba_ssm(tmp_path / "source")
    (tmp_path / "source" / "config.json").unlink()
    report = convert(tmp_path / "source" / "pytorch_model.bin", tmp_path / "new", check=True)  # a file will do
    config = SSDConfig.from_pretrained(tmp_path / "new")
    assert (config.hidden_size, config.num_heads, config.state_size, config.n_groups) == (32, 4, 8, 1)
    assert not config.tie_word_embeddings
    assert any("tie_word_embeddings False: the checkpoint has a head of its own" in note for note in report.notes)
    assert torch.equal(stored(tmp_path / "new")["lm_head.weight"], tensors["lm_head.weight"])


def test_settings_decide_what_shapes_leave_open_and_may_not_contradict_them(tmp_path):
    write_mamba_ssm(tmp_path / "source", SMALL | dict(G=2, N=4))
    (tmp_path / "source" / "config.json").unlink()
    convert(tmp_path / "source", tmp_path / "two", settings={"n_groups": 2, "state_size": 4})
    assert SSDConfig.from_pretrained(tmp_path / "two").n_groups == 2
    refused(tmp_path / "source", "wrong shape: .*in_proj.weight is .148, 32., needed", settings={"n_groups": 2})


def test_the_working_folder_is_filled_and_a_link_is_followed(tmp_path, monkeypatch):
    mamba_ssm(tmp_path / "source")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(tmp_path / "source", ".", progress=False)
    assert Path("config.json").is_file()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    convert(tmp_path / "source", tmp_path / "link", progress=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()


def test_the_destination_must_be_free(tmp_path):
    mamba_ssm(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for name, said in {"full": "already exists and is not an empty folder", "full/mine.txt": "is a file"}.items():
        with pytest.raises(ValueError, match=said):
            convert(tmp_path / "source", tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "source", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


class Bomb:
    """What a pickle does that is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["archive", "old", "plain"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, form):
    source, mark = tmp_path / "source", tmp_path / "executed"
    mamba_ssm(source)
    content = {"backbone.embedding.weight": torch.zeros(3), "x": Bomb(mark)}
    if form == "plain":
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, source / "pytorch_model.bin", _use_new_zipfile_serialization=form == "archive")
    refused(source, "no pickle of tensors alone")
    assert not mark.exists()
    Bomb(mark).__reduce__()[0](mark)  # the trap is set
    assert mark.exists()


def test_transformers_folders_with_another_epsilon_or_limit_keep_them(tmp_path):
    write_familiar(tmp_path / "source", SMALL, layer_norm_epsilon=1e-3, time_step_limit=[0.01, 0.2])
    convert(tmp_path / "source", tmp_path / "new", check=True)
    config = SSDConfig.from_pretrained(tmp_path / "new")
    assert (config.layer_norm_epsilon, config.time_step_limit) == (1e-3, [0.01, 0.2])
    convert(tmp_path / "new", tmp_path / "back", to="transformers", check=True)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["time_step_limit"] == [0.01, 0.2]


def test_values_of_the_hand_written_layouts_differ_from_each_other():
    """Or else an exchange of two tensors would go unseen."""
    tensors = values(mamba2_shapes("embedding", SMALL, head=True))
    seen = [tensor.flatten()[:4].tolist() for tensor in tensors.values()]
    assert len({tuple(numbers) for numbers in seen}) == len(seen)
