"""Both ways with transformers itself: what one writes, the other opens with the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import glm_edge as ge
from experiments.golden import make_round_trip
from experiments.golden.outputs import compute
from glm_edge.checkpoint import hugging_face
from glm_edge.checkpoint.hugging_face.members import read_config
from glm_edge.errors import ConfigError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

FOLDER = Path(__file__).parent
TINY = json.loads((FOLDER / "tiny_configs.json").read_text())
# transformers has no code for GLM-Edge-V, of which it opens the decoder alone.
NATIVE = [name for name in TINY if name != "glm_edge_v"]
HEADS = [name for name in NATIVE if name.startswith("glm")]
TOLERANCE = 1e-4


def assert_same(first, right):
    assert jax.tree.structure(first) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


def with_ties(fields, tied):
    return json.loads(json.dumps(fields)) | {"tie_word_embeddings": tied}


@pytest.mark.parametrize("name", TINY)
def test_transformers_opens_what_we_write_and_we_what_it_writes(tmp_path, name):
    model, params = make_round_trip.build(TINY[name])
    first = make_round_trip.open_with_transformers(ge.save(model, params, tmp_path / "ours"))
    outputs = make_round_trip.reference_outputs(first, make_round_trip.draw_inputs(model))
    # Our own outputs are compared with the record in test_round_trip.py.
    record = json.loads((FOLDER / "round_trip" / f"{name}.json").read_text())
    assert outputs.keys() == record["outputs"].keys()
    for key, values in record["outputs"].items():
        np.testing.assert_allclose(outputs[key], values, atol=TOLERANCE, rtol=0)
    if name not in NATIVE:
        return
    first.save_pretrained(tmp_path / "theirs")
    read_model, read = ge.load(tmp_path / "theirs")
    assert read_model.config.__class__ is model.config.__class__
    assert_same(read, params)
    second = make_round_trip.open_with_transformers(ge.save(read_model, read, tmp_path / "again"))
    state = first.state_dict()
    assert second.state_dict().keys() == state.keys()
    for key, tensor in second.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    # The name is that of the directory it was read from; all else is the same model.
    written = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "again")]
    assert {**written[0], "_name_or_path": ""} == {**written[1], "_name_or_path": ""}


# Its parts run in this process in the test above.
@pytest.mark.slow
def test_the_record_is_made_again(tmp_path):
    (tmp_path / "configs.json").write_text(json.dumps({"glm4": TINY["glm4"]}))
    flags = [f"--configs={tmp_path / 'configs.json'}", f"--out_dir={tmp_path / 'out'}"]
    program = [sys.executable, "-m", "experiments.golden.make_round_trip", *flags]
    subprocess.run(program, cwd=FOLDER.parents[1], check=True, capture_output=True)
    result = json.loads((tmp_path / "out" / "glm4.json").read_text())
    committed = json.loads((FOLDER / "round_trip" / "glm4.json").read_text())
    outputs = [record.pop("outputs")["logits"] for record in (result, committed)]
    assert result == committed
    np.testing.assert_allclose(*outputs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "name",
    ["glm", "glm4v", *(pytest.param(n, marks=pytest.mark.slow) for n in HEADS[1:] if n != "glm4v")],
)
def test_tied_and_untied_in_bfloat16(tmp_path, name, tied):
    model, params = make_round_trip.build(with_ties(TINY[name], tied), "bfloat16")
    reference = make_round_trip.open_with_transformers(ge.save(model, params, tmp_path / "ours"))
    assert reference.config.tie_word_embeddings == tied
    head, embedding = reference.get_output_embeddings(), reference.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    expected = np.asarray(params["embed" if tied else "head"]["weight"], np.float32)
    np.testing.assert_array_equal(head.weight.detach().numpy(), expected)
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    assert_same(ge.load(tmp_path / "theirs")[1], params)


@pytest.mark.parametrize("name", ["glm4v", "glmasr"])
def test_transformers_opens_our_shards_and_we_its(tmp_path, name):
    model, params = make_round_trip.build(TINY[name])
    directory = tmp_path / "ours"
    directory.mkdir()
    described = hugging_face.fields_of(model.config, params)
    hugging_face.write(directory, model.config, params, described, shard_bytes=4000)
    assert len(list(directory.glob("*.safetensors"))) > 2
    reference = make_round_trip.open_with_transformers(directory)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=4000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert_same(ge.load(tmp_path / "theirs")[1], params)


def test_a_stored_head_that_differs_is_used_as_transformers_does(tmp_path):
    model, params = make_round_trip.build(TINY["glm"])
    directory = ge.save(model, params, tmp_path / "ours")
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    reference = make_round_trip.open_with_transformers(directory)
    read_model, read = ge.load(directory)
    assert not read_model.config.decoder.tie_embeddings
    inputs = make_round_trip.draw_inputs(model)
    expected = make_round_trip.reference_outputs(reference, inputs)["logits"]
    actual = compute(read_model, read, inputs, greedy_steps=0)["logits"]
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


def fields_of_classes():
    glm4v_rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    glm4v_text = {"rope_parameters": {**glm4v_rope, "mrope_section": [8, 12, 12]}}
    ocr_rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    ocr_text = {"rope_parameters": ocr_rope, "head_dim": 128, "hidden_size": 1536}
    for name, options in (
        ("GlmConfig", {}),
        ("Glm4Config", {}),
        ("Glm4vConfig", {"text_config": glm4v_text}),
        ("Glm46VConfig", {"text_config": glm4v_text}),
        ("GlmOcrConfig", {"text_config": ocr_text}),
        ("GlmAsrConfig", {}),
        ("SiglipVisionConfig", {}),
        ("SiglipConfig", {}),
        ("WhisperConfig", {}),
        ("BertConfig", {"architectures": ["BertModel"]}),
        ("DistilBertConfig", {"architectures": ["DistilBertModel"]}),
    ):
        yield pytest.param(name, options, id=name)


@pytest.mark.parametrize(("name", "options"), list(fields_of_classes()))
def test_transformers_config_fields_are_known(name, options):
    """Every field of a class is known and an unknown one is named."""
    config = getattr(transformers, name)(**options)
    for fields in (config.to_dict(), config.to_diff_dict()):
        fields = json.loads(json.dumps(fields))
        _, read = read_config(fields, "config.json", "x")
        assert read is not None
        with pytest.raises(ConfigError, match=r"^config\.json: field 'residual_scale' \(0\.5\)"):
            read_config(fields | {"residual_scale": 0.5}, "config.json", "x")
