"""Files of a checkpoint: safetensors in and out, damage of every kind, whole directories only."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from glm_edge import files
from glm_edge.checkpoint.safetensors import (
    DTYPES,
    SafetensorsFile,
    check_finite,
    to_device,
    write_safetensors,
)
from glm_edge.errors import CheckpointError, OutputError
from glm_edge.files import fill
from glm_edge.writers import new_directory

RNG = np.random.default_rng(0)
ARRAYS = {
    "b": RNG.normal(size=(3, 5)).astype(np.float32),
    "a.mask": np.array([True, False, True]),
    "packed": RNG.integers(0, 255, (2, 3)).astype(np.uint8),
    "signed": np.array([-128, 127], np.int8),
    "half": RNG.normal(size=7).astype(np.float16),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


def valid_file(path):
    write_safetensors(path, ARRAYS | {"bf": np.asarray(jnp.ones((2, 2), jnp.bfloat16) * 0.3)})
    return path.read_bytes()


def with_header(header, body=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def message(excinfo):
    text = str(excinfo.value)
    assert "\n" not in text
    return text


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    write_safetensors(tmp_path / "a", ARRAYS)
    read = safetensors.numpy.load_file(tmp_path / "a")
    assert set(read) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_the_safetensors_library_accepts_our_bfloat16(tmp_path):
    valid_file(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", framework="np") as file:
        assert file.get_slice("bf").get_dtype() == "BF16"


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "a", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.read(name), array)
        assert file.read(name).dtype == array.dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_round_trips_bit_for_bit(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    write_safetensors(tmp_path / "a", {"x": array})
    read = SafetensorsFile(tmp_path / "a").read("x")
    assert read.dtype == dtype
    assert read.tobytes() == array.tobytes()


def test_same_arrays_give_the_same_bytes_in_any_order(tmp_path):
    write_safetensors(tmp_path / "a", ARRAYS)
    write_safetensors(tmp_path / "b", dict(reversed(ARRAYS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_write_refuses_a_dtype_without_a_name(tmp_path):
    """A type without a name is refused before anything is written."""
    with pytest.raises(CheckpointError, match="'x': safetensors has no type complex64"):
        write_safetensors(tmp_path / "a", {"x": np.zeros(2, np.complex64)})
    assert not (tmp_path / "a").exists()


@given(st.data())
def test_every_truncation_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "a"
    content = valid_file(path)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError) as excinfo:
        SafetensorsFile(path)
    assert str(path) in message(excinfo)


@given(st.data())
def test_a_changed_byte_reads_or_is_refused_but_never_crashes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "a"
    content = bytearray(valid_file(path))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert file.read(name).tobytes() == bytes(content[info.begin : info.end])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "too few"),
        (b"PK\x03\x04 a pickle in a zip archive", "not a safetensors file"),
        (with_header(b"[1, 2]"), "must be a JSON object"),
        (with_header(b"{nonsense"), "not JSON"),
        (with_header(b"[" * 100000), "not JSON"),
        (with_header({"x": 3}), "must have dtype, shape"),
        (with_header({"x": entry(shape=(-2,))}), "must have dtype, shape"),
        (with_header({"x": entry(shape=(True,))}), "must have dtype, shape"),
        (with_header({"x": entry(offsets=(0, 8, 9))}), "must have dtype, shape"),
        (with_header({"x": entry(dtype="F7")}), "type 'F7' is unknown"),
        (with_header({"x": entry(dtype=["F32"])}), "is unknown"),
        (with_header({"x": entry(offsets=(0, 80))}), "truncated"),
        (with_header({"x": entry(shape=(3,))}), "needs 12"),
        (with_header({"x": entry(offsets=(8, 0))}), "span -8 bytes"),
        (with_header({"x": entry(offsets=(8, 16))}, b"\0" * 16), "gap or overlap"),
        (with_header({"x": entry(), "y": entry()}), "gap or overlap"),
        (with_header({"x": entry()}, b"\0" * 9), "nothing may follow"),
        (with_header(b'{"x": 1, "x": 2}'), "'x' appears twice"),
        (with_header(b"\xff{}"), "not JSON"),
        (with_header({"x": entry(offsets=(0.0, 8.0))}), "must have dtype, shape"),
        (with_header({"x": entry(offsets=(False, 8))}), "must have dtype, shape"),
        (with_header({"x": entry(offsets=(-8, 0))}), "must have dtype, shape"),
        (with_header({"x": entry(shape=(2**62, 2**62))}), "needs 85070591730234615865843651857942"),
        (with_header({"x": entry(shape=(2**63,))}), "must have dtype, shape"),
        (
            with_header({"x": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""),
            "exceeds the size of any",
        ),
        (with_header({"x": entry(shape=(1,) * 65 + (2,))}), "must have dtype, shape"),
        (with_header({"x" * 501: entry()}), "a tensor's name has 501 characters"),
        (with_header({"x": entry(dtype="BOOL", shape=(8,))}, b"\2" * 8), "byte 0 or 1, found 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_a_damaged_file_says_what_is_wrong(tmp_path, content, expected):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as excinfo:
        SafetensorsFile(path).read("x")
    assert str(path) in message(excinfo)


def test_a_tensor_is_read_into_aligned_memory_of_its_own(tmp_path):
    path = tmp_path / "a"
    content = valid_file(path)
    file = SafetensorsFile(path)
    for name, info in file.tensors.items():
        array = file.read(name)
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable
        assert array.nbytes == info.bytes
        array[...] = 0
    assert path.read_bytes() == content
    np.testing.assert_array_equal(file.read("b"), ARRAYS["b"])


def test_no_descriptor_stays_open(tmp_path):
    valid_file(tmp_path / "a")
    before = len(os.listdir("/dev/fd"))
    file = SafetensorsFile(tmp_path / "a")
    file.read("b")
    assert len(os.listdir("/dev/fd")) == before


@given(start=st.integers(0, 3), stop=st.integers(0, 3))
def test_rows_are_read_alone(tmp_path_factory, start, stop):
    path = tmp_path_factory.mktemp("rows") / "a"
    valid_file(path)
    file, read = SafetensorsFile(path), []
    if stop < start:
        with pytest.raises(CheckpointError, match="tensor 'b': rows"):
            file.read_rows("b", start, stop)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fill", lambda *args: read.append(args[1].size) or fill(*args))
        rows = file.read_rows("b", start, stop)
    np.testing.assert_array_equal(rows, ARRAYS["b"][start:stop])
    assert read == [rows.nbytes]


@pytest.mark.parametrize(("name", "stop"), [("b", 4), ("scalar", 1)])
def test_rows_that_do_not_exist_are_refused(tmp_path, name, stop):
    valid_file(tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"tensor '{name}': rows 0 to {stop} do not exist"):
        SafetensorsFile(tmp_path / "a").read_rows(name, 0, stop)


def test_read_refuses_a_file_changed_since_its_header(tmp_path):
    """A file that changed since its header was read is refused."""
    path = tmp_path / "a"
    valid_file(path)
    file = SafetensorsFile(path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="a: tensor 'b': the file changed"):
        file.read("b")


def test_a_file_truncated_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a"
    valid_file(path)
    file = SafetensorsFile(path)
    os.truncate(path, file.tensors["b"].end - 3)
    monkeypatch.setattr(files, "version_of", lambda opened: file._version)
    with pytest.raises(CheckpointError, match="a: tensor 'b': 3 of 60 bytes are missing"):
        file.read("b")


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, np.bool_], ids=str)
def test_to_device_takes_over_the_memory(tmp_path, dtype):
    write_safetensors(tmp_path / "a", {"x": np.ones((3, 5), dtype)})
    array = SafetensorsFile(tmp_path / "a").read("x")
    placed = to_device(array)
    assert placed.unsafe_buffer_pointer() == array.ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    del array
    assert bool((placed == 1).all())


def test_donated_buffer_leaves_the_host_array(tmp_path):
    """Donating what to device took over leaves the array alone."""
    array = np.ones((300, 500), np.float32)
    jax.jit(lambda x: -x, donate_argnums=0)(to_device(array)).block_until_ready()
    assert (array == 1).all()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: cannot be read: No such file"):
        SafetensorsFile(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_where_it_is(dtype, value):
    array = np.ones((2300, 2000), np.float32)
    array[2200, 7] = value
    with pytest.raises(CheckpointError, match=r"tensor 'x': is .* at \[2200, 7\]"):
        check_finite(array.astype(dtype), "tensor 'x'")


def test_finite_arrays_and_integers_pass():
    for array in ARRAYS.values():
        check_finite(array, "x")


@pytest.mark.parametrize("bits", [16, 32])
def test_every_pattern_of_the_exponent_is_judged_as_numpy_does(bits):
    dtypes = (jnp.bfloat16, np.float16) if bits == 16 else (np.float32,)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for dtype in dtypes:
        # The upper half of a float32 holds its sign and exponent.
        values = (patterns.astype(np.uint32) << (bits - 16)).astype(f"u{bits // 8}").view(dtype)
        finite = np.isfinite(values)
        check_finite(values[finite], "x")
        for value in values[~finite][::97]:
            with pytest.raises(CheckpointError, match=r"is (nan|-?inf) at \[1\]"):
                check_finite(np.array([1, value], dtype), "x")


def test_a_directory_appears_with_all_its_files(tmp_path):
    target = tmp_path / "new" / "out"
    with new_directory(target, overwrite=False) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_an_empty_directory_may_exist(tmp_path):
    with new_directory(tmp_path, overwrite=False) as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "a").read_text() == "1"


def write_half(target, overwrite=False):
    with new_directory(target, overwrite) as temporary:
        (temporary / "config.json").write_text("new")
        raise KeyError


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        write_half(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_old_checkpoint(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(KeyError):
        write_half(target, overwrite=True)
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_a_checkpoint_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    for name in ("config.json", "stale"):
        (target / name).write_text("old")
    with new_directory(target, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def enter(target, overwrite=False):
    with new_directory(target, overwrite):
        pass


def test_a_full_directory_is_not_replaced_unasked(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="not empty; choose another directory or pass overwrite"):
        enter(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is not a checkpoint"):
        enter(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a directory"):
        enter(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        enter(tmp_path / "file" / "below")


def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path):
    program = f"""
        import os
        from pathlib import Path
        from glm_edge.writers import new_directory
        with new_directory(Path({str(tmp_path / "out")!r}), overwrite=False) as temporary:
            (temporary / "model.safetensors").write_bytes(b"half")
            os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == 9
    assert not (tmp_path / "out").exists()
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    assert not list(tmp_path.rglob("config.json"))
    enter(tmp_path / "out")
