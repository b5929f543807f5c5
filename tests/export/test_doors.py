"""Pipes, devices, holes and links out are refused at once, wherever an export is read."""

import json
import os
from importlib.util import find_spec

import pytest

from glm_edge import export
from glm_edge.configs import preset, to_dict
from glm_edge.errors import ExportError
from glm_edge.export.common.directory import DESCRIPTION, check_tree
from glm_edge.export.common.sizes import described_sizes
from glm_edge.export.coreml.reader import open_package
from glm_edge.export.mnn.reader import read_weights as mnn_weights
from glm_edge.export.onnx.reader import read_weights as onnx_weights
from glm_edge.export.verify.graph_directory import GraphDirectoryRunner

HOLE = 3 << 30


def questions():
    """What reads a single file."""
    asked = [export.read_metadata, export.read_constants, export.compatibility, export.LiteRTRunner]
    if find_spec("litert_lm_builder"):
        from glm_edge.export.litertlm.bundle import read_sections

        asked.append(read_sections)
    return asked


def made(kind, path, outside):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "hole":
        with open(path, "wb") as file:
            file.truncate(HOLE)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()
    elif kind == "link out":
        outside.write_text("{}")
        path.symlink_to(outside)
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "hole", "empty", "directory"])
@pytest.mark.parametrize("ask", questions(), ids=lambda ask: ask.__name__)
def test_single_files_are_regular_ones(ask, kind, tmp_path):
    path = tmp_path if kind == "directory" else made(kind, tmp_path / "a", tmp_path / "b")
    with pytest.raises(ExportError) as caught:
        ask(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "hole", "link out"])
def test_descriptions_are_regular_files_inside(kind, tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    made(kind, directory / DESCRIPTION, tmp_path / "outside")
    for ask in (export.read_metadata, GraphDirectoryRunner):
        with pytest.raises(ExportError, match=f"{DESCRIPTION}: (is|holds) ") as caught:
            ask(directory)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "hole", "link out"])
def test_graphs_are_regular_files_inside(kind, tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    described = {
        "config": to_dict(preset("nano")),
        "signatures": ["decode", "embed"],
        "prefill_lengths": [],
        "cache_slots": 32,
        "prefill_logits": False,
        "attended_slots": [],
        "parameters": {"w": [False, 0, 4, 4]},
    }
    (directory / DESCRIPTION).write_text(json.dumps(described))
    made(kind, directory / "decode.onnx", tmp_path / "outside")
    made(kind, directory / "weights.bin", tmp_path / "other")
    asked = [mnn_weights]
    if find_spec("onnx"):
        asked.append(onnx_weights)
    if kind != "hole":
        asked.append(GraphDirectoryRunner)
    for ask in asked:
        with pytest.raises(ExportError) as caught:
            ask(directory)
        assert str(directory) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_packages_hold_files_and_directories(tmp_path):
    package = tmp_path / "a.mlpackage"
    (package / "Data").mkdir(parents=True)
    check_tree(package)
    os.mkfifo(package / "Data" / "weight.bin")
    with pytest.raises(ExportError, match=r"weight\.bin: is a pipe"):
        check_tree(package)
    with pytest.raises(ExportError, match=r"weight\.bin: is a pipe"):
        open_package(package)
    os.remove(package / "Data" / "weight.bin")
    (package / "Data" / "link").symlink_to("/dev/zero")
    with pytest.raises(ExportError, match="link: is a link"):
        check_tree(package)
    with pytest.raises(ExportError, match="not a directory"):
        check_tree(tmp_path / "missing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attended_slots": [10**9] * 3}, r"attended_slots: \[1000000000\] must be 2 to 31"),
        ({"attended_slots": "x"}, "attended_slots: must be a list, not str"),
        ({"attended_slots": [-1]}, "attended_slots: -1 is not a fixed length"),
        (
            {"attended_slots": [8, 8]},
            r"attended_slots: \[8, 8\] must be ascending without duplicates",
        ),
        ({"attended_slots": [True, 8]}, "attended_slots: True is not a fixed length"),
        ({"attended_slots": [32]}, "must be 2 to 31, fewer than cache_slots"),
        ({"prefill_lengths": [16, 8]}, r"prefill_lengths: \[16, 8\] must be ascending"),
        ({"prefill_lengths": [64]}, "prefill_lengths: 64 must be 2 to 32"),
        ({"prefill_lengths": None}, "prefill_lengths: must be a list, not NoneType"),
        ({"forced_lengths": [4, 2]}, r"forced_lengths: \[4, 2\] must be ascending"),
        ({"forced_lengths": [64]}, "forced_lengths: 64 must be 2 to 32"),
        ({"forced_lengths": None}, "forced_lengths: must be a list, not NoneType"),
        ({"prefill_logits": 1}, "prefill_logits: must be true or false, not 1"),
        ({"cache_slots": None}, "cache_slots: must be an integer, not None"),
        ({"cache_slots": 1e9}, "cache_slots: 1000000000.0 is not a fixed length"),
        ({"cache_slots": 10**9}, "cache_slots=1000000000: must be 1 to"),
    ],
    ids=str,
)
def test_described_sizes_are_those_of_an_export(fields, message):
    right = {"prefill_lengths": [8], "cache_slots": 32, "prefill_logits": False}
    right |= {"attended_slots": [16], "forced_lengths": [4]}
    config = preset("nano")
    assert vars(described_sizes(right, config)) == right
    with pytest.raises(ExportError, match=message):
        described_sizes({**right, **fields}, config)
    with pytest.raises(ExportError, match="cache_slots is missing"):
        described_sizes({"prefill_lengths": [8]}, config)
