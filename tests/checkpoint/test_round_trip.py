"""Saving: every member returns byte for byte, and is what transformers opened when recorded."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import glm_edge as ge
from experiments.golden import make_round_trip
from experiments.golden.outputs import compute
from glm_edge import params as boxes
from glm_edge.checkpoint import hugging_face
from glm_edge.checkpoint.hugging_face import writing
from glm_edge.checkpoint.safetensors import SafetensorsFile
from glm_edge.errors import CheckpointError, ConfigError, OutputError

FOLDER = Path(__file__).parent
TINY = json.loads((FOLDER / "tiny_configs.json").read_text())
# Made by: python -m experiments.golden.make_round_trip --configs=tests/checkpoint/tiny_configs.json
#   --out_dir=tests/checkpoint/round_trip
RECORDS = {path.stem: path for path in (FOLDER / "round_trip").glob("*.json")}
TOLERANCE = 1e-4


def assert_same(first, right):
    """Same tree, types and bits."""
    assert jax.tree.structure(first) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def with_ties(fields, tied):
    return json.loads(json.dumps(fields)) | {"tie_word_embeddings": tied}


HEADS = [name for name in TINY if name.startswith("glm")]
VARIANTS = [(name, None, "float32") for name in TINY]
VARIANTS += [(name, tied, "bfloat16") for name in HEADS for tied in (True, False)]


@pytest.mark.parametrize(("name", "tied", "dtype"), VARIANTS)
def test_a_member_returns_byte_for_byte(tmp_path, name, tied, dtype):
    fields = TINY[name] if tied is None else with_ties(TINY[name], tied)
    model, params = make_round_trip.build(fields, dtype)
    if tied is not None:
        assert ("head" in params) == (not tied)
    ge.save(model, params, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    # What differs between GLM-4.1V and GLM-4.6V is in the processor only.
    assert written["model_type"] == {"glm46v": "glm4v"}.get(name, fields["model_type"])
    assert written["dtype"] == dtype
    read_model, read = ge.load(tmp_path / "out")
    assert type(read_model) is type(model)
    assert read_model.config == model.config
    assert_same(read, params)
    ge.save(read_model, read, tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_every_member_is_recorded():
    assert set(RECORDS) == set(TINY)


# A glm46v computes what a glm4v does.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "glm46v" else n for n in TINY]
)
def test_a_member_is_what_transformers_opened(tmp_path, name):
    record = json.loads(RECORDS[name].read_text())
    model, params = make_round_trip.build(TINY[name])
    directory = ge.save(model, params, tmp_path / "out", format="hugging_face")
    described = make_round_trip.describe(directory)
    assert described["config"] == record["config"]
    assert described["tensors"] == record["tensors"]
    inputs = make_round_trip.draw_inputs(model)
    for key, values in record["inputs"].items():
        np.testing.assert_array_equal(inputs[key], values)
    result = compute(*ge.load(directory), inputs, greedy_steps=0)
    for key, values in record["outputs"].items():
        assert np.abs(values).max() > 0.1
        np.testing.assert_allclose(result[key], values, atol=TOLERANCE, rtol=0)


def test_a_record_can_fail(tmp_path):
    record = json.loads(RECORDS["glm"].read_text())
    model, params = make_round_trip.build(TINY["glm"], seed=1)
    directory = ge.save(model, params, tmp_path / "out")
    assert make_round_trip.describe(directory)["tensors"] != record["tensors"]
    result = compute(model, params, make_round_trip.draw_inputs(model), greedy_steps=0)
    assert np.abs(result["logits"] - np.array(record["outputs"]["logits"])).max() > 0.1


@pytest.mark.parametrize("name", ["glm4v", "glmasr", "whisper"])
def test_shards_return(tmp_path, name):
    model, params = make_round_trip.build(TINY[name], "bfloat16")
    described = hugging_face.fields_of(model.config, params)
    directory = tmp_path / "out"
    directory.mkdir()
    hugging_face.write(directory, model.config, params, described, shard_bytes=3000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    stored = {key: file for file in files for key in SafetensorsFile(directory / file).tensors}
    assert index["weight_map"] == stored
    sizes = [leaf.size * 2 for leaf in jax.tree.leaves(params)]
    assert index["metadata"]["total_size"] == sum(sizes)
    for file in files:
        info = SafetensorsFile(directory / file).tensors
        assert len(info) == 1 or sum(t.end - t.begin for t in info.values()) <= 3000
    assert_same(ge.load(directory)[1], params)


# Orbax writes trees of any names; one per architecture.
@pytest.mark.parametrize(
    "name",
    [
        "glmasr",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("glm4v", "siglip_vision_model", "whisper", "bert")
        ),
    ],
)
def test_orbax_returns(tmp_path, name):
    model, params = make_round_trip.build(TINY[name], "bfloat16")
    ge.save(model, params, tmp_path / "out", format="orbax")
    read_model, read = ge.load(tmp_path / "out")
    assert read_model == model
    assert_same(read, params)


@pytest.fixture(scope="module")
def pruned():
    prune = ge.prune.structured(heads=0.5, neurons=0.3, score="magnitude", where="layers/1/")
    return prune(*make_round_trip.build(TINY["glm"]))[:2]


@pytest.mark.parametrize("format", [None, "safetensors", "orbax"])
def test_a_shrunk_model_returns_through_our_own_format(tmp_path, pruned, format):
    model, params = pruned
    assert isinstance(model.config.decoder.intermediate_size, tuple)
    ge.save(model, params, tmp_path / "out", format=format)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["format"] == "glm_edge"
    read_model, read = ge.load(tmp_path / "out")
    assert read_model == model
    assert_same(read, params)


def test_uniformly_shrunk_model_saves_as_hugging_face(tmp_path):
    """A model shrunk alike in all layers is a hugging face one."""
    prune = ge.prune.structured(heads=0.5, neurons=0.3, score="magnitude")
    model, params = prune(*make_round_trip.build(TINY["glm"]))[:2]
    ge.save(model, params, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["num_attention_heads"], fields["intermediate_size"]) == (2, 14)
    read_model, read = ge.load(tmp_path / "out")
    assert read_model == model
    assert_same(read, params)


def test_compressed_weights_return_through_our_own_format(tmp_path):
    model, params = make_round_trip.build(TINY["glm"])
    model, params = ge.quantize.rtn("int4-g4", where="embed")(model, params)[:2]
    ge.save(model, params, tmp_path / "out")
    assert any(boxes.is_box(leaf) for _, leaf in boxes.path_items(params))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["format"] == "glm_edge"
    assert_same(ge.load(tmp_path / "out")[1], params)


def unlike(model):
    """Models that no config.json of the hub can say."""
    decoder = model.config.decoder
    yield dataclasses.replace(decoder, sandwich_norm=True, rotary_interleaved=False)
    yield dataclasses.replace(decoder, num_heads=(4, 4))


def test_what_hugging_face_cannot_hold_is_refused(tmp_path, pruned):
    def refuse(model, params):
        with pytest.raises(CheckpointError, match="save it with format='safetensors'") as error:
            ge.save(model, params, tmp_path / "out", format="hugging_face")
        assert str(error.value).startswith(f"{tmp_path / 'out'}: ")
        assert not list(tmp_path.iterdir())

    refuse(*pruned)
    model, params = make_round_trip.build(TINY["glm"])
    refuse(*ge.quantize.rtn("int8", where="embed")(model, params)[:2])
    for decoder in unlike(model):
        other = model.clone(config=dataclasses.replace(model.config, decoder=decoder))
        assert hugging_face.fields_of(other.config, params) is None


def test_a_model_of_ours_falls_back_to_our_own_format(tmp_path):
    model, params = ge.load(ge.shipped())
    ge.save(model, params, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["format"] == "glm_edge"
    assert_same(ge.load(tmp_path / "out")[1], params)


@pytest.mark.parametrize("format", ["hugging_face", "safetensors", "orbax"])
def test_extras_are_written_too(tmp_path, format):
    model, params = make_round_trip.build(TINY["glm"])
    (tmp_path / "template").write_text("{{ messages }}")
    extras = {"tokenizer.json": b"{}", "chat_template.jinja": tmp_path / "template"}
    ge.save(model, params, tmp_path / "out", format=format, extras=extras)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert_same(ge.load(tmp_path / "out")[1], params)
    with pytest.raises(OutputError, match=r"'model\.safetensors' must be a plain name"):
        ge.save(model, params, tmp_path / "x", format=format, extras={"model.safetensors": b""})


def test_a_hugging_face_directory_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, params = make_round_trip.build(TINY["glm"])

    def fail(*_):
        raise OSError(28, "No space left on device")

    for step in ("write_safetensors", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(writing, step, fail)
            with pytest.raises(OutputError, match="No space left on device"):
                ge.save(model, params, tmp_path / "out", format="hugging_face")
        assert not list(tmp_path.iterdir())
    ge.save(model, params, tmp_path / "out", format="safetensors")
    ge.save(model, params, tmp_path / "out", format="hugging_face", overwrite=True)
    assert_same(ge.load(tmp_path / "out")[1], params)
    table = np.array(params["embed"]["weight"])
    table[0, 0] = np.nan
    spoiled = params | {"embed": {"weight": table}}
    with pytest.raises(CheckpointError, match="'embed/weight': is nan"):
        ge.save(model, spoiled, tmp_path / "x", format="hugging_face")


def test_read_only_members_save_as_transformers_do():
    """Members that are read only save as those of transformers."""
    for member in (hugging_face.members.MEMBERS[name] for name in ("chatglm", "glmasr_first")):
        with pytest.raises(ConfigError, match="cannot be written; write it as a glm"):
            member.write_config(None)
