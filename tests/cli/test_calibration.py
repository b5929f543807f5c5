"""Calibration files that a stranger may have written."""

import io
import os
import zipfile

import numpy as np
import pytest

from glm_edge.cli import calibration
from glm_edge.errors import DataError

TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def claiming(shape, descr="<i4", body=b""):
    """An array whose header says what it likes."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def zipped(compression=zipfile.ZIP_STORED, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def declaring(size):
    """An archive whose directory declares a larger member than there is."""
    data = bytearray(zipped(tokens=npy(TOKENS)))
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = size.to_bytes(4, "little")
    return bytes(data)


def with_directory(size):
    """An archive that claims a directory of so many bytes, mostly holes."""
    end = b"PK\x05\x06" + bytes(4) + (1).to_bytes(2, "little") * 2
    return bytes(size) + end + size.to_bytes(4, "little") + bytes(6)


def read(path, batch=2):
    return calibration.from_file(str(path), None, 1, 4, batch)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_from_file_reads_what_numpy_writes(tmp_path, save):
    images = np.asfortranarray(np.random.default_rng(0).random((3, 2, 2, 3)))
    valid = np.array([True, False, True])
    save(tmp_path / "a.npz", tokens=TOKENS, images=images, valid=valid)
    result = read(tmp_path / "a.npz")
    assert [len(batch["tokens"]) for batch in result] == [2, 1]
    for name, array in (("tokens", TOKENS), ("images", images), ("valid", valid)):
        joined = np.concatenate([batch[name] for batch in result])
        assert joined.dtype == array.dtype
        np.testing.assert_array_equal(joined, array)


FAULTS = {
    "empty": (b"", "cannot be read as arrays"),
    "an array": (npy(TOKENS), "not a zip file"),
    "half": (zipped(tokens=npy(TOKENS))[:100], "not a zip file"),
    "no members": (zipped(), "contains no array"),
    "not arrays": (zipped(tokens=b"text"), "cannot be read as arrays"),
    "empty member": (zipped(tokens=b""), "cannot be read as arrays"),
    "damaged": (zipped(tokens=npy(TOKENS)).replace(npy(TOKENS)[-9:], b"x" * 9), "CRC-32"),
    "a number beside": (zipped(tokens=npy(TOKENS), x=npy(3)), "'x' is a scalar"),
    "a number": (zipped(x=npy(3)), "'x' is a scalar"),
    "other rows": (zipped(tokens=npy(TOKENS), x=npy(TOKENS[:2])), "same number of rows"),
    "no rows": (zipped(tokens=npy(TOKENS[:0])), r"shape \(0, 4\) is empty"),
    "no columns": (
        zipped(tokens=claiming("(10**9, 0)".replace("10**9", "1000000000"))),
        "is empty",
    ),
    "objects": (zipped(tokens=claiming("(3,)", "|O", bytes(24))), "must be numeric or boolean"),
    "words": (zipped(tokens=npy(np.array(["a", "b"]))), "must be numeric or boolean"),
    "of no size": (zipped(tokens=claiming("(1000000000,)", "|V0")), "must be numeric or boolean"),
    "a large claim": (zipped(tokens=claiming("(1000000000000,)")), "does not match its 0 bytes"),
    "below zero": (zipped(tokens=claiming("(-1, -3)", "<i4", bytes(12))), "does not match"),
    "declared": (declaring(0xF0000000), "does not match|cannot be read as arrays"),
    "deep": (zipped(tokens=claiming("(" * 3000 + ")" * 3000)), "cannot be read as arrays"),
    "bzip2": (zipped(zipfile.ZIP_BZIP2, tokens=npy(TOKENS)), "compressed in a way that numpy"),
    "directory": (with_directory(1 << 21), "its directory claims 2097152 bytes"),
    "rows": (
        zipped(zipfile.ZIP_DEFLATED, tokens=npy(np.zeros((1 << 20) + 1, np.int8))),
        "1048577 rows; the maximum is 1048576",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_from_file_refuses_what_is_no_calibration(tmp_path, fault):
    content, message = FAULTS[fault]
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.npz")
    assert len(str(caught.value).splitlines()) == 1
    assert "a.npz" in str(caught.value)


def test_from_file_refuses_a_name_that_stands_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("tokens.npy", npy(TOKENS))
        archive.writestr("tokens", npy(TOKENS))
    with pytest.raises(DataError, match="holds 'tokens' twice"):
        read(tmp_path / "a.npz")


def test_from_file_refuses_bombs_before_they_are_read(tmp_path, monkeypatch):
    content = zipped(zipfile.ZIP_DEFLATED, a=npy(np.zeros(9000)), b=npy(np.zeros(9000)))
    monkeypatch.setattr(calibration, "MAX_ARRAY_BYTES", 100_000)
    (tmp_path / "a.npz").write_bytes(content)
    assert len(content) < 1000
    with pytest.raises(DataError, match="its arrays have 144256 bytes; the maximum is 100000"):
        read(tmp_path / "a.npz")


def test_from_file_waits_for_no_pipe_and_reads_no_device(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    (tmp_path / "large.npz").touch()
    os.truncate(tmp_path / "large.npz", calibration.MAX_ARRAY_BYTES + 1)
    for name, message in (
        ("pipe.npz", "is a pipe, socket or device"),
        ("zero.npz", "is a pipe, socket or device"),
        ("large.npz", "the maximum is 4294967296"),
        ("a\0b.npz", "cannot be read"),
        ("missing.npz", "cannot be read: No such file"),
        ("n" * 5000 + ".npz", "cannot be read: File name too long"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / name)
        assert len(str(caught.value)) < 1000
