"""Headers of GGUF files, right ones and hostile ones, each refused in one line."""

import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest

from glm_edge import gguf_file
from glm_edge.errors import CheckpointError
from glm_edge.gguf_file import GGUFFile, find_gguf
from tests.gguf_writer import encode, random_tensor, text, write_gguf

VECTOR = ("F32", (8,), np.arange(8, dtype="<f4").tobytes())


@pytest.fixture
def write(tmp_path):
    def write(metadata=None, tensors=None, **wrong):
        fields = {"general.name": "a"} if metadata is None else metadata
        return write_gguf(tmp_path / "a.gguf", fields, tensors or {"x": VECTOR}, **wrong)

    return write


def refused(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_gguf_file_reads_every_type_of_value(write):
    values = {"a": "text", "b": True, "c": ("u64", 2**63), "d": ("i32", -5), "e": 1e-5}
    lists = {"f": ["x", "yy", ""], "g": [("i32", -1), ("i32", 3)], "h": [True, False], "i": []}
    file = GGUFFile(write(values | lists))
    plain = {"a": "text", "b": True, "c": 2**63, "d": -5, "e": 1e-5}
    assert file.metadata == plain | {
        "f": ["x", "yy", ""],
        "g": [-1, 3],
        "h": [True, False],
        "i": [],
    }


@pytest.mark.parametrize("alignment", [32, 64])
def test_read_rows_returns_the_stored_bytes(write, alignment):
    rng = np.random.default_rng(0)
    stored = {name: random_tensor("Q4_1", (5, 64), rng) for name in ("x", "y")}
    fields = {"general.alignment": alignment}
    file = GGUFFile(write(fields, {"v": VECTOR, **stored}, alignment=alignment))
    for name, (_, _, raw) in stored.items():
        assert file.tensors[name].shape == (5, 64)
        assert file.read_rows(name).tobytes() == raw
        assert file.read_rows(name, 1, 3).tobytes() == raw[40:120]
    assert file.read_rows("v").tobytes() == VECTOR[2]
    with pytest.raises(CheckpointError, match=r"rows 2 to 6 do not exist in shape \(5, 64\)"):
        file.read_rows("x", 2, 6)


def test_read_rows_refuses_a_file_that_changed(write):
    path = write()
    file = GGUFFile(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        file.read_rows("x")


@pytest.mark.parametrize("size", range(0, 160, 7))
def test_gguf_file_refuses_every_truncation(write, size):
    path = write({"general.name": "a name", "b": ["x", "y"]})
    assert path.stat().st_size > 160
    os.truncate(path, size)
    assert "truncated" in refused(path)


DAMAGE = {
    "magic": ({"magic": b"GGML"}, "begins with b'GGML'"),
    "version": ({"version": 1}, "has version 1"),
    "big-endian": ({"version": 3 << 24}, "is big-endian"),
    "tensors": ({"num_tensors": 2**63}, "declares 9223372036854775808 tensors"),
    "fields": ({"num_fields": 2**40}, "declares 1099511627776 fields"),
    "missing tensor": ({"num_tensors": 3}, "must have 1 to 4"),
    "unread tensor": ({"num_tensors": 0}, "nothing may follow"),
    "gap": ({"offset": 32}, "without gap or overlap"),
    "overlap": ({"offset": -32}, "without gap or overlap"),
    "unaligned": ({"offset": 4}, "without gap or overlap"),
    "far offset": ({"offset": 2**63}, "without gap or overlap"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_gguf_file_refuses_damaged_headers(write, damage):
    wrong, message = DAMAGE[damage]
    assert message in refused(write(tensors={"w": VECTOR, "x": VECTOR}, **wrong))


VALUES = {
    "long string": (struct.pack("<IQ", 8, 2**62), "has 4611686018427387904 bytes of text"),
    "long array": (struct.pack("<IIQ", 9, 4, 2**62), "the limit of all is 2097152"),
    "absent array": (struct.pack("<IIQ", 9, 4, 2**20), "the file has"),
    "nested array": (struct.pack("<IIQ", 9, 9, 1), "array of the unsupported type 9"),
    "unknown type": (struct.pack("<I", 77), "has the unknown type 77"),
    "boolean 2": (struct.pack("<IB", 7, 2), "is a boolean 2"),
    "not UTF-8": (struct.pack("<IQ", 8, 1) + b"\xff", "is not UTF-8"),
}


@pytest.mark.parametrize("value", VALUES)
def test_gguf_file_refuses_damaged_values(write, value):
    raw, message = VALUES[value]
    answer = refused(write({"a": raw}))
    assert "field 'a'" in answer
    assert message in answer


@pytest.mark.parametrize("alignment", [0, 4, 48, 1 << 20, "x", True])
def test_gguf_file_refuses_alignments(write, alignment):
    assert "power of two" in refused(write({"general.alignment": alignment}))


TENSORS = {
    "type": (("Q4_K", (1, 256), bytes(144)), "tensor 'x': type Q4_K is unsupported"),
    "unknown type": ((99, (1, 32), bytes(128)), "type of code 99"),
    "no dimension": (("F32", (), bytes(4)), "has 0 dimensions"),
    "five dimensions": (("F32", (1,) * 5, bytes(4)), "has 5 dimensions"),
    "empty": (("F32", (0, 4), b""), "is not that of an array"),
    "huge": (("F32", (2**40, 2**40), bytes(4)), "is not that of an array"),
    "part of a block": (("Q4_1", (2, 48), bytes(60)), "not a multiple of the 32"),
    "too short": (("F32", (4, 32), bytes(128)), "truncated"),
    "too long": (("F32", (1, 8), bytes(64)), "nothing may follow"),
}


@pytest.mark.parametrize("tensor", TENSORS)
def test_gguf_file_refuses_damaged_tensors(write, tensor):
    described, message = TENSORS[tensor]
    assert message in refused(write(tensors={"x": described}))


def test_gguf_file_refuses_duplicate_names(tmp_path):
    field = text("a") + encode("b")
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * field
    path = tmp_path / "a.gguf"
    path.write_bytes(header + bytes(-len(header) % 32))
    assert "field 'a' appears twice" in refused(path)
    tensor = text("x") + struct.pack("<IQIQ", 1, 8, 0, 0)
    other = text("x") + struct.pack("<IQIQ", 1, 8, 0, 32)
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + tensor + other
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(64))
    assert "tensor 'x': appears twice" in refused(path)


def test_gguf_file_costs_no_more_memory_than_its_header(tmp_path):
    # Lengths that are not in the file are refused before anything is allocated for them.
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a"))
    for raw in (struct.pack("<IQ", 8, 2**20), struct.pack("<IIQ", 9, 8, 2**21 - 1)):
        with open(path, "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(raw)
        os.truncate(path, 200)
        tracemalloc.start()
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_gguf_file_bounds_its_header(write, monkeypatch):
    monkeypatch.setattr(gguf_file, "MAX_HEADER_BYTES", 100)
    assert "header exceeds 100 bytes" in refused(write({"a": "x" * 90}))


def test_find_gguf_finds_the_only_file_of_a_directory(tmp_path, write):
    assert find_gguf(tmp_path) is None
    path = write()
    assert find_gguf(tmp_path) == find_gguf(path) == path
    assert find_gguf(tmp_path / "absent") is None
    (tmp_path / "0a1b").write_bytes(path.read_bytes())
    assert find_gguf(tmp_path / "0a1b") == tmp_path / "0a1b"
    (tmp_path / "notes.txt").write_text("GGML")
    assert find_gguf(tmp_path / "notes.txt") is None
    shutil.copy(path, tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF files, such as a\.gguf and b\.gguf"):
        find_gguf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None


def test_find_gguf_refuses_a_link_out_of_the_directory(tmp_path, write):
    path = write()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.gguf").symlink_to(path)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        find_gguf(tmp_path / "inner")


def test_gguf_file_matches_an_independent_reader(write):
    reference = pytest.importorskip("gguf", reason="needs the extra `models`")
    rng = np.random.default_rng(0)
    kinds = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")
    fields = {"a": "text", "b": 1e-5, "c": ["x", "y"], "d": ("u64", 2**40)}
    path = write(fields, {kind: random_tensor(kind, (3, 64), rng) for kind in kinds})
    file, expected = GGUFFile(path), reference.GGUFReader(path)
    contents = {name: expected.fields[name].contents() for name in fields}
    assert file.metadata | {"b": contents["b"]} == contents
    assert file.metadata["b"] == pytest.approx(contents["b"], rel=1e-7)
    for tensor in expected.tensors:
        info = file.tensors[tensor.name]
        assert info.kind == tensor.tensor_type.name
        assert info.shape == tuple(tensor.shape[::-1])
        assert info.begin == tensor.data_offset
        assert file.read_rows(tensor.name).tobytes() == tensor.data.tobytes()


def test_names_of_types_match_an_independent_table():
    reference = pytest.importorskip("gguf", reason="needs the extra `models`")
    for code, name in gguf_file.TYPES.items():
        assert reference.GGMLQuantizationType(code).name == name
    for name, (values, size) in gguf_file.BLOCKS.items():
        kind = reference.GGMLQuantizationType[name]
        assert reference.GGML_QUANT_SIZES[kind] == (values, size)
