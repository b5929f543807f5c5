"""Our own checkpoints, safetensors and Orbax: exact round trips, damage, writes that fail."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.checkpoint import load_tokenizer, native, safetensors
from glm_edge.errors import CheckpointError, ConfigError, OutputError
from glm_edge.models.multimodal import MultimodalGLM

STORES = ("safetensors", "orbax")
QUERY = "decoder/layers/0/attention/q_proj/weight"


def random_box(kind: str, shape: tuple[int, ...], rng: np.random.Generator):
    if kind == "masked":
        value = jax.device_put(rng.normal(size=shape).astype(np.float32))
        return boxes.mask(value, jax.device_put(rng.random(shape) < 0.5))
    if kind == "masked_bf16":
        value = jax.device_put(rng.normal(size=shape).astype(jnp.bfloat16))
        return boxes.mask(value, jax.device_put(rng.random(shape) < 0.5))
    format = {
        "int8": boxes.Format("int8"),
        "int8_affine_bf16": boxes.Format("int8", 4, symmetric=False, scale_dtype="bfloat16"),
        "int4": boxes.Format("int4", 4),
        "int4_f16": boxes.Format("int4", None, scale_dtype="float16"),
        "int4_affine": boxes.Format("int4", 2, symmetric=False),
    }[kind]
    limit = 2 ** (format.bits - 1)
    groups = shape[1] // format.group_size if format.group_size else 1
    integers = rng.integers(-limit, limit, shape, np.int8)
    scale = rng.uniform(0.01, 0.1, (shape[0], groups)).astype(format.scale_dtype)
    zero = None
    if not format.symmetric:
        zero = jax.device_put(rng.integers(-8, 8, scale.shape, np.int8))
    scale = jax.device_put(scale)
    return boxes.quantized(integers, scale, zero, format)


def boxed(params, kinds: tuple[str, ...]):
    rng = np.random.default_rng(2)
    kinds_in_turn = iter(kinds * 100)

    def box(path, leaf):
        return random_box(next(kinds_in_turn), leaf.shape, rng) if leaf.ndim == 2 else leaf

    return boxes.map_with_path(box, params)


TREES = {
    "dense": lambda params: params,
    "bf16": lambda params: boxes.cast(params, jnp.bfloat16),
    "masked": lambda params: boxed(params, ("masked",)),
    "mixed": lambda params: boxed(
        params,
        ("int8", "int4", "int4_affine", "masked_bf16", "int8_affine_bf16", "int4_f16"),
    ),
}


def assert_same(lhs, right):
    """Same structure, static fields, types and bits."""
    assert jax.tree.structure(lhs) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(lhs), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("tree", "store"),
    [
        *((tree, "safetensors") for tree in TREES),
        ("mixed", "orbax"),
        *(pytest.param(t, "orbax", marks=pytest.mark.slow) for t in TREES if t != "mixed"),
    ],
)
def test_round_trip_is_exact(tmp_path, model, params, tree, store):
    written = TREES[tree](params)
    assert ge.save(model, written, tmp_path / "out", format=store) == tmp_path / "out"
    read_model, read = ge.load(tmp_path / "out", dtype=None)
    assert read_model.config == model.config
    assert_same(read, written)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    tokens = np.array([[1, 5, 5, 8, 8, 40]])
    images, audio = (
        np.full(s, v, np.float32) for s, v in (((1, 16, 8, 3), 0.5), ((1, 16, 4), -0.5))
    )
    return model.apply({"params": params}, tokens, images, audio)[0]


@pytest.mark.parametrize("store", ["safetensors", pytest.param("orbax", marks=pytest.mark.slow)])
def test_loaded_model_gives_the_same_logits(tmp_path, model, params, store):
    written = boxed(params, ("int8", "masked", "int4"))
    ge.save(model, written, tmp_path / "out", format=store)
    read_model, read = ge.load(tmp_path / "out")
    assert read_model == model
    np.testing.assert_array_equal(logits(model, read), logits(model, written))


def test_same_parameters_give_the_same_bytes(tmp_path, model, params):
    tree = TREES["mixed"](params)
    for name in ("a", "b"):
        ge.save(model, tree, tmp_path / name)
    for name in ("config.json", safetensors.WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_stored_bytes_are_the_bytes_of_the_file(tmp_path, model, params):
    tree = TREES["mixed"](params)
    ge.save(model, tree, tmp_path / "out")
    raw = (tmp_path / "out" / safetensors.WEIGHTS).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert len(raw) - 8 - header == boxes.stored_bytes(tree)


def test_weights_are_cast_and_scales_are_not(tmp_path, model, params):
    stored = TREES["mixed"](boxes.cast(params, jnp.bfloat16))
    ge.save(model, stored, tmp_path / "out")
    assert_same(ge.load(tmp_path / "out")[1], stored)
    _, read = ge.load(tmp_path / "out", dtype="float32")
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(boxes.partition(read)[0])}
    assert kinds == {"float32"}
    scales = {str(b.scale.dtype) for _, b in boxes.path_items(read) if hasattr(b, "scale")}
    assert scales == {"float32", "float16", "bfloat16"}
    with pytest.raises(CheckpointError, match="dtype 'int8' is unknown"):
        ge.load(tmp_path / "out", dtype="int8")


def test_extras_come_along(tmp_path, model, params):
    (tmp_path / "source.json").write_text("{}")
    extras = {"tokenizer.json": tmp_path / "source.json", "notes.txt": b"hello"}
    ge.save(model, params, tmp_path / "out", extras=extras)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "notes.txt").read_bytes() == b"hello"
    for name in ("../escape", "config.json", "arrays", ""):
        with pytest.raises(OutputError, match="plain name"):
            ge.save(model, params, tmp_path / "bad", extras={name: b""})
    with pytest.raises(CheckpointError, match=r"absent: cannot be read"):
        ge.save(model, params, tmp_path / "bad", extras={"x": tmp_path / "absent"})
    assert not (tmp_path / "bad").exists()


def test_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a readable tokenizer"):
        load_tokenizer(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).token_to_id("a") == 0


def test_shipped_names_what_there_is():
    with pytest.raises(CheckpointError, match="no checkpoint 'absent' comes with glm_edge; known:"):
        ge.shipped("absent")


@pytest.mark.parametrize("store", STORES)
def test_what_cannot_be_loaded_is_not_saved(tmp_path, model, params, store):
    def save(tree, **options):
        ge.save(model, tree, tmp_path / "out", **{"format": store} | options)

    flat = boxes.to_flat(params)[0]
    with pytest.raises(CheckpointError, match="is missing"):
        save(boxes.from_flat({k: v for k, v in flat.items() if k != QUERY}, {}))
    with pytest.raises(CheckpointError, match="has no place"):
        save(params | {"new": {"weight": jnp.ones(2)}})
    with pytest.raises(CheckpointError, match=r"has shape \(3,\), the model needs \(32,\)"):
        save(boxes.from_flat(flat | {"decoder/norm/weight": jnp.ones(3)}, {}))
    with pytest.raises(CheckpointError, match="'decoder/norm/weight': is nan"):
        save(boxes.from_flat(flat | {"decoder/norm/weight": jnp.full(32, jnp.nan)}, {}))
    with pytest.raises(CheckpointError, match="format 'zip' is unknown"):
        save(params, format="zip")
    assert not list(tmp_path.iterdir())


def test_a_model_without_our_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"stores one of MultimodalGLM, .*, not a dict"):
        ge.save({}, {}, tmp_path / "out")


@pytest.mark.parametrize("store", STORES)
def test_existing_checkpoints_are_kept_unless_asked(tmp_path, model, params, store):
    target = tmp_path / "out"
    ge.save(model, params, target, format=store)
    with pytest.raises(OutputError, match="overwrite=True"):
        ge.save(model, params, target, format=store)
    other = boxes.cast(params, jnp.bfloat16)
    ge.save(model, other, target, format="safetensors", overwrite=True)
    assert_same(ge.load(target, dtype=None)[1], other)
    assert not (target / "arrays").exists()


@pytest.mark.parametrize("store", STORES)
def test_an_interrupted_save_leaves_nothing(tmp_path, model, params, store, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        ge.save(model, params, tmp_path / "out", format=store)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, model, params, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "write_safetensors", fail)
    with pytest.raises(OutputError, match="out: cannot be written: No space left on device"):
        ge.save(model, params, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_killed_save_leaves_nothing_that_loads(tmp_path):
    program = """
        import os
        import sys
        import jax
        import numpy as np
        import glm_edge as ge
        from glm_edge import configs
        from glm_edge.checkpoint import native
        from glm_edge.checkpoint.hugging_face import writing
        ge.save, ge.MultimodalGLM
        for out in sys.argv[1:]:
            # One import for all; jax's threads start in the child only.
            if child := os.fork():
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
                continue
            config = configs.GLMConfig("small", configs.DecoderConfig(8, 4, 1, 1, 1, 4, 4))
            model = ge.MultimodalGLM(config)
            tokens = jax.ShapeDtypeStruct((1, 1), "int32")
            shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
            params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
            native.write_json = writing.write_json = lambda *_: os._exit(9)
            ge.save(model, params, out, format=os.path.basename(os.path.dirname(out)))
    """
    formats = (*STORES, "hugging_face")
    for format in formats:
        (tmp_path / format).mkdir()
    outputs = [str(tmp_path / format / "out") for format in formats]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *outputs], check=False, timeout=300
    )
    assert done.returncode == 0
    for format in formats:
        (partial,) = (tmp_path / format).iterdir()
        assert partial.name.endswith(".partial")
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            ge.load(partial)


@pytest.fixture
def saved(tmp_path, model, params):
    tree = boxed(params, ("int4_affine", "masked"))
    return ge.save(model, tree, tmp_path / "out")


def edit_config(directory, edit):
    fields = json.loads((directory / "config.json").read_text())
    edit(fields)
    (directory / "config.json").write_text(json.dumps(fields))


def edit_arrays(directory, edit):
    path = directory / safetensors.WEIGHTS
    file = safetensors.SafetensorsFile(path)
    arrays = {name: np.array(file.read(name)) for name in file.tensors}
    edit(arrays)
    safetensors.write_safetensors(path, arrays)


def refused(directory, kind, pattern):
    with pytest.raises(kind, match=pattern) as excinfo:
        ge.load(directory)
    assert "\n" not in str(excinfo.value)
    assert str(directory) in str(excinfo.value)


def test_paths_that_are_no_checkpoint(tmp_path, saved):
    refused(tmp_path / "absent", CheckpointError, "does not exist")
    refused(saved / safetensors.WEIGHTS, CheckpointError, "is a file; a checkpoint is a directory")
    refused(tmp_path, CheckpointError, r"has no config\.json")
    (saved / "config.json").write_text("{}")
    refused(saved, ConfigError, "neither a glm_edge checkpoint")


@pytest.mark.parametrize(
    ("edit", "kind", "pattern"),
    [
        (lambda f: f.update(version=2), CheckpointError, "version 2 is unknown"),
        (lambda f: f.update(store="zip"), CheckpointError, "store 'zip' is unknown"),
        (lambda f: f.pop("params"), CheckpointError, "must describe the boxes"),
        (lambda f: f.update(params={"x": 3}), CheckpointError, "must describe the boxes"),
        (lambda f: f.update(params={}), CheckpointError, "is missing"),
        (lambda f: f["params"].update(x={"box": "Masked"}), CheckpointError, r"'x\.value' is miss"),
        (lambda f: f["params"].update(x={"box": "Odd"}), CheckpointError, "unknown box 'Odd'"),
        (lambda f: f.pop("config"), ConfigError, "must be an object"),
        (lambda f: f["config"].update(size=3), ConfigError, "unknown field 'size'"),
        (lambda f: f["config"]["decoder"].pop("head_dim"), ConfigError, "'head_dim' is missing"),
        (lambda f: f["config"]["decoder"].update(num_layers="2"), ConfigError, "wrong type"),
        (lambda f: f["config"]["decoder"].update(vocab_size=49), CheckpointError, "needs"),
    ],
)
def test_a_damaged_config_says_what_is_wrong(saved, edit, kind, pattern):
    edit_config(saved, edit)
    refused(saved, kind, pattern)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"format": {"qtype": "int7"}}, "qtype 'int7' is unknown"),
        ({"format": {"color": 3}}, "color"),
        ({"format": {"qtype": "int8", "group_size": 2, "symmetric": False}}, "data must be int8"),
        ({"format": {"qtype": "int4", "group_size": 4, "symmetric": False}}, "scale"),
        ({"format": {"qtype": "int4", "group_size": 2}}, "only an affine format has zero points"),
        (
            {
                "format": {
                    "qtype": "int4",
                    "group_size": 2,
                    "symmetric": False,
                    "scale_dtype": "float16",
                }
            },
            "scale is float32",
        ),
        ({"columns": "many"}, "columns must be a positive integer, found 'many'"),
        ({"columns": True}, "columns must be a positive integer"),
        ({"format": {"qtype": "int4", "colour": 1}}, "format has the unknown key 'colour'; know"),
        ({"format": {"qtype": ["int4"]}}, "format: qtype .* is unknown"),
        ({"format": "int4"}, "format must be an object with a qtype, found 'int4'"),
        ({"format": None}, "format must be an object with a qtype, found None"),
        ({"formats": {}}, "description of a Quantized has the unknown key 'formats'; known: box"),
        ({"kernel_shape": 8}, "kernel_shape must be a list of integers, found 8"),
        ({"kernel_axes": ["a"]}, r"kernel_axes must be a list of integers, found \['a'\]"),
        ({"dtype": "banana"}, "banana"),
    ],
)
def test_a_damaged_box_says_what_is_wrong(saved, change, pattern):
    def edit(fields):
        box = next(box for box in fields["params"].values() if box["box"] == "Quantized")
        box.update(change)

    edit_config(saved, edit)
    refused(saved, CheckpointError, pattern)


def first(arrays, field):
    return next(name for name in arrays if name.endswith(field))


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (lambda a: a.update(new=np.ones(3)), "tensor|parameter 'new' has no place"),
        (lambda a: a.update({first(a, ".data") + "2": np.ones(3)}), "has no place"),
        (lambda a: a.pop(first(a, ".zero")), "only an affine format has zero points"),
        (lambda a: a.pop(first(a, ".scale")), r"\.scale' is missing"),
        (lambda a: a.pop(first(a, ".mask")), r"\.mask' is missing"),
        (lambda a: a.update({first(a, ".mask"): np.ones(3, bool)}), "mask must be bool of shape"),
        (lambda a: a.update({first(a, ".zero"): np.ones(3, np.int8)}), "zero points must be"),
        (lambda a: a.pop("decoder/norm/weight"), "'decoder/norm/weight' is missing"),
        (lambda a: a.update({"decoder/norm/weight": np.ones((32, 1), np.float32)}), r"\(32, 1\)"),
        (lambda a: a.update({first(a, ".scale"): a[first(a, ".scale")] * np.nan}), "is nan at"),
        (lambda a: a["decoder/norm/weight"].fill(np.inf), "is inf at"),
    ],
)
def test_damaged_arrays_say_what_is_wrong(saved, edit, pattern):
    edit_arrays(saved, edit)
    refused(saved, CheckpointError, pattern)


def test_truncated_and_missing_arrays(saved):
    os.truncate(saved / safetensors.WEIGHTS, 5000)
    refused(saved, CheckpointError, "truncated")
    (saved / safetensors.WEIGHTS).unlink()
    refused(saved, CheckpointError, "cannot be read: No such file")


@pytest.fixture
def saved_orbax(tmp_path, model, params):
    return ge.save(model, boxed(params, ("int4_affine", "masked")), tmp_path / "o", format="orbax")


def test_orbax_without_our_description_is_refused(saved_orbax):
    edit_config(saved_orbax, lambda fields: fields.pop("arrays"))
    refused(saved_orbax, CheckpointError, "must describe the arrays")
    (saved_orbax / "config.json").unlink()
    refused(saved_orbax, CheckpointError, r"has no config\.json")
    refused(saved_orbax / "arrays", CheckpointError, r"an Orbax directory without config\.json")


def test_a_foreign_orbax_directory_is_refused(tmp_path, params):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "raw", params)
    refused(tmp_path / "raw", CheckpointError, "so model and packing are unknown")


def test_orbax_descriptions_must_fit(saved_orbax):
    def change(value):
        return lambda fields: fields["arrays"].update({"decoder/norm/weight": value})

    edit_config(saved_orbax, change(["float32", [31]]))
    refused(saved_orbax, CheckpointError, r"has shape \(32,\)")
    edit_config(saved_orbax, change(["float16", [32]]))
    refused(saved_orbax, CheckpointError, r"is float32, config\.json says float16")
    edit_config(saved_orbax, change(3))
    refused(saved_orbax, CheckpointError, "must describe the arrays")


def test_damaged_orbax_arrays(saved_orbax):
    for part in (saved_orbax / "arrays").rglob("d/*"):
        os.truncate(part, part.stat().st_size // 2)
    refused(saved_orbax, CheckpointError, "Orbax cannot restore it")
    shutil.rmtree(saved_orbax / "arrays")
    refused(saved_orbax, CheckpointError, "Orbax directory is missing")


def leaves(fields, prefix=""):
    """Return the dotted names of all fields of a dataclass or of nested dictionaries."""
    if dataclasses.is_dataclass(fields):
        fields = {field.name: getattr(fields, field.name) for field in dataclasses.fields(fields)}
    if not isinstance(fields, dict):
        return {prefix}
    return {name for key, value in fields.items() for name in leaves(value, f"{prefix}.{key}")}


@pytest.mark.parametrize("name", sorted(ge.configs.PRESETS))
def test_config_json_names_every_field(name, tmp_path):
    config = ge.configs.preset(name)
    fields = json.loads(json.dumps(native.describe(MultimodalGLM(config), {})))
    assert leaves(fields["config"]) == leaves(config)
    assert isinstance(fields["config"]["decoder"]["rotary_interleaved"], bool)
    assert native.build(fields, tmp_path).config == config


def test_the_shipped_config_json_names_every_field():
    fields = json.loads((ge.shipped("nano") / "config.json").read_text())
    assert leaves(fields["config"]) == leaves(ge.build(ge.shipped("nano")).config)


def test_fields_that_an_older_config_json_lacks_have_their_defaults(tmp_path):
    config = ge.configs.preset("nano")
    fields = native.describe(MultimodalGLM(config), {})
    for part in ("decoder", "vision", "speech"):
        for field in dataclasses.fields(getattr(config, part)):
            if fields["config"][part][field.name] == field.default:
                del fields["config"][part][field.name]
    assert "rotary_interleaved" not in fields["config"]["decoder"]
    assert native.build(fields, tmp_path).config == config
