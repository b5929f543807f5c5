"""What every format refuses, on which disk it works, and what an interrupted export leaves."""

import dataclasses
import errno
import functools
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import export, writers
from glm_edge import params as boxes
from glm_edge.errors import ExportError, OutputError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format

NEEDED = {
    "tflite": ("tensorflow",),
    "onnx": ("onnx",),
    "mnn": ("MNN", "onnx"),
    "coreml": ("coremltools", "stablehlo_coreml"),
}
MATRIX, NORM = "decoder/layers/0/mlp/down_proj/weight", "decoder/norm/weight"
# Graphs, manifests and what a file system adds.
BESIDE_WEIGHTS = 1 << 20


@pytest.fixture(scope="module")
def model(small_config):
    """A text model of one layer, whose weights outweigh its graphs."""
    config = small_config(vocab_size=4096, hidden_size=256, intermediate_size=1024)
    return MultimodalGLM(
        dataclasses.replace(
            config, vision=None, speech=None, image_token_id=None, audio_token_id=None
        )
    )


@pytest.fixture(scope="module")
def params(model, random_params, quantize, mapped):
    def box(path, leaf):
        return quantize(leaf, Format("int8")) if boxes.is_matrix(path, leaf) else leaf

    return mapped(box, random_params(model))


@pytest.fixture(params=NEEDED)
def form(request):
    for module in NEEDED[request.param]:
        pytest.importorskip(module)
    return request.param


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def write(form, model, out):
    """Exports parameters to a place of the format's own kind in `out`."""
    path = out / ("a.mlpackage" if form == "coreml" else "a")
    return functools.partial(getattr(export, form), model, path=path, cache_slots=16)


def module_of(form):
    """The module that writes a format; the package has a function of its name."""
    return sys.modules[f"glm_edge.export.{'tflite.file' if form == 'tflite' else f'{form}.export'}"]


def replaced(params, path, leaf):
    return boxes.map_with_path(lambda p, old: leaf if p == path else old, params)


def with_value(array, index, value):
    changed = np.array(array)
    changed[index] = value
    return jax.device_put(changed)


def spoiled(params, quantize, where, value):
    """Parameters with one number that is not finite, and the path of it."""
    if where == "array":
        weight = dict(boxes.path_items(params))[NORM]
        return replaced(params, NORM, with_value(weight, 3, value)), NORM
    dense = boxes.dense(dict(boxes.path_items(params))[MATRIX])
    if where == "masked":
        leaf = boxes.mask(with_value(dense, (3, 5), value), np.ones(dense.shape, bool))
        return replaced(params, MATRIX, leaf), MATRIX
    grouped = Format("int4", 32, scale_dtype="bfloat16")
    box = quantize(dense, grouped if where == "scales of groups" else Format("int8"))
    return replaced(params, MATRIX, box.replace(scale=with_value(box.scale, (3, 0), value))), MATRIX


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("where", ["array", "masked", "scale", "scales of groups"])
def test_numbers_that_are_not_finite_are_refused(where, value, write, params, quantize, out):
    bad, path = spoiled(params, quantize, where, value)
    with pytest.raises(
        ExportError, match=f"{path}: contains NaN or infinity; export finite weights"
    ):
        write(bad, prefill_lengths=())
    assert not list(out.iterdir())


@pytest.mark.parametrize("length", [None, -1, 8.0, "T"], ids=str)
def test_lengths_that_are_not_fixed_are_refused(length, form, write, params, out):
    if length == "T":
        (length,) = jax.export.symbolic_shape("T")
    fields = {"prefill_lengths": [(8, length), (length,)]}
    if form != "coreml":
        fields["attended_slots"] = [(length, 8)]
    if length is not None:
        fields["cache_slots"] = [length]
    for name, values in fields.items():
        for value in values:
            with pytest.raises(
                ExportError, match=f"{name}: .* is not a fixed length; use an integer"
            ):
                write(params, **{"prefill_lengths": (), name: value})
    assert not list(out.iterdir())


def test_one_length_may_be_an_integer_of_numpy(model, params):
    from glm_edge.export.common.signatures import make_spec

    made = make_spec(model, params, np.array([8, 4]), np.int64(16), False, (np.int32(8),))
    assert (made.prefill_lengths, made.cache_slots, made.attended_slots) == ([4, 8], 16, [8])
    assert {type(n) for n in (*made.prefill_lengths, made.cache_slots)} == {int}


@pytest.mark.parametrize("extent", [None, -1, "T"], ids=str)
def test_functions_of_a_shape_that_is_not_fixed_are_refused(extent, out):
    if extent == "T":
        (extent,) = jax.export.symbolic_shape("T")
    inputs = {"x": jax.ShapeDtypeStruct((extent, 3), jnp.float32)}
    with pytest.raises(ExportError, match=r"shape of x: .* is not a fixed length; use an integer"):
        export.function(
            lambda _, original: {"y": 2.0 * original["x"]}, {}, inputs, out / "a.tflite"
        )
    assert not list(out.iterdir())


def test_a_full_disk_is_found_before_anything_is_done(write, params, out, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(OutputError, match=r"0\.0 GB are free; make room") as caught:
        write(params, prefill_lengths=())
    assert "\n" not in str(caught.value)
    assert not list(out.iterdir())


def exporters():
    """By format, what writes it, what it needs, and the arguments before its path."""
    formats = {**NEEDED, "litertlm": ("litert_lm_builder",)}
    results = {
        name: (getattr(export, name), needed, (None, {})) for name, needed in formats.items()
    }
    results["litertlm"] = (export.litertlm, formats["litertlm"], (None, {}, None))
    inputs = {"x": jax.ShapeDtypeStruct((1, 3), jnp.float32)}
    return {**results, "function": (export.function, (), (lambda _, x: x, {}, inputs))}


@pytest.mark.parametrize("to", ["nothing", "file", "directory"])
@pytest.mark.parametrize("name", exporters())
def test_exporters_do_not_replace_a_link(name, to, out):
    write, needed, arguments = exporters()[name]
    for module in needed:
        pytest.importorskip(module)
    real = out / "real"
    if to == "file":
        real.write_text("old")
    elif to == "directory":
        real.mkdir()
        for mark in ("glm_edge.json", "Manifest.json"):
            (real / mark).write_text("{}")
    before = sorted(out.rglob("*"))
    link = out / "a.mlpackage"
    link.symlink_to(real)
    # Neither a model nor parameters: the path is refused before anything is done.
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"is a link to .*real; pass that path"):
            write(*arguments, link, overwrite=overwrite)
    assert link.is_symlink()
    assert sorted(path for path in out.rglob("*") if path != link) == before


class Watch(threading.Thread):
    """Remembers the most bytes that a folder held."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.most, self.ended = folder, 0, threading.Event()
        self.start()

    def run(self):
        while not self.ended.wait(0.002):
            stored = 0
            for directory, _, names in os.walk(self.folder):
                for name in names:
                    try:
                        stored += os.stat(os.path.join(directory, name)).st_size
                    except FileNotFoundError:
                        continue
            self.most = max(self.most, stored)

    def end(self):
        self.ended.set()
        self.join()
        return self.most


def test_export_uses_its_own_disk_within_the_checked_space(
    form, write, params, out, tmp_path, monkeypatch
):
    """An export stays on its own disk in the room it asked for."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    for name in ("rename", "replace"):
        move = getattr(os, name)

        def within(source, target, move=move):
            if (elsewhere in Path(source).parents) != (elsewhere in Path(target).parents):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            move(source, target)

        monkeypatch.setattr(os, name, within)
    asked = []
    where = writers if form == "tflite" else module_of(form)
    monkeypatch.setattr(where, "require_space", lambda _, needed: asked.append(needed))
    current, there = Watch(out), Watch(elsewhere)
    written = write(params, prefill_lengths=())
    most, lost = current.end(), there.end()
    assert [path.name for path in out.iterdir()] == [written.path.name]
    assert lost < BESIDE_WEIGHTS
    assert most <= max(asked) + BESIDE_WEIGHTS
    # What is asked for is needed.
    assert max(asked) <= 1.3 * most
    assert tempfile.tempdir == str(elsewhere)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_export_leaves_nothing(error, form, write, params, out, monkeypatch):
    midway = {"tflite": "_write", "onnx": "store", "mnn": "_run", "coreml": "_function"}

    def stopped(*_):
        assert list(out.iterdir())
        raise error

    monkeypatch.setattr(module_of(form), midway[form], stopped)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write(params, prefill_lengths=())
    assert not list(out.iterdir())
