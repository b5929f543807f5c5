"""A thousand mutations of checkpoint directories: refused in one line, or read as they are.

What a file says cannot be told from what it should say, so a changed number that stays finite
loads: then the arrays hold exactly what the files hold, read again here with nothing but the
standard library.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from tests.checkpoint.mutations import INDEX, WEIGHTS, load_mutated

TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def arrays_in_files(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    names = {WEIGHTS}
    if not (directory / WEIGHTS).is_file():
        names = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    results = {}
    for name in names:
        raw = (directory / name).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for key, entry in json.loads(raw[8:start]).items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                results[key] = (entry["dtype"], entry["shape"], raw[start + begin : start + end])
    return results


def hugging_face_name(path: str) -> str:
    for ours, theirs in (
        ("embed/", "model.embed_tokens/"),
        ("decoder/", "model/"),
        ("/attention/", "/self_attn/"),
        ("input_norm/", "input_layernorm/"),
        ("post_attention_norm/", "post_attention_layernorm/"),
    ):
        path = path.replace(ours, theirs)
    return path.replace("/", ".")


def assert_as_stored(params, directory: Path, name_of) -> None:
    stored = arrays_in_files(directory)
    for path, array in boxes.to_flat(params)[0].items():
        dtype, shape, raw = stored[name_of(path)]
        assert list(array.shape) == shape, path
        assert np.asarray(array).tobytes() == raw, path
        assert str(array.dtype) == TYPES.get(dtype, str(array.dtype)), path


@pytest.fixture
def hugging_face(fields, tensors, write_hugging_face):
    """Files of a valid directory of three shards, and the function from our names to theirs."""
    stored = {k: v.astype(jnp.bfloat16) if v.ndim == 2 else v for k, v in tensors.items()}
    directory = write_hugging_face(fields, stored, shards=3)
    return {path.name: path.read_bytes() for path in directory.iterdir()}, hugging_face_name


@pytest.fixture
def local(tmp_path, model, params):
    """Files of a valid directory of ours with boxes, and the identity of names."""
    rng = np.random.default_rng(3)

    def box(path, leaf):
        if leaf.ndim != 2 or rng.random() < 0.3:
            return leaf
        if rng.random() < 0.5:
            return boxes.mask(leaf, jnp.asarray(rng.random(leaf.shape) < 0.5))
        integers = jnp.asarray(rng.integers(-8, 8, leaf.shape), jnp.int8)
        scale = jnp.asarray(rng.uniform(0.01, 0.1, (len(leaf), leaf.shape[1] // 4)), jnp.float32)
        return boxes.quantized(
            integers, scale, None, boxes.Format(str(rng.choice(["int4", "int8"])), 4)
        )

    directory = ge.save(model, boxes.map_with_path(box, params), tmp_path / "saved")
    return {path.name: path.read_bytes() for path in directory.iterdir()}, str


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("hugging_face", 1000), ("local", 500)])
def test_mutations_load_as_stored_or_are_refused(tmp_path, request, watch, kind, count):
    files, name_of = request.getfixturevalue(kind)
    directory = tmp_path / "mutated"
    loaded = load_mutated(
        directory, files, range(count), lambda params: assert_as_stored(params, directory, name_of)
    )
    assert count / 20 < loaded < count / 2
