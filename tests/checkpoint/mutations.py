"""Seeded changes of checkpoint directories, and loading within limits of time and memory."""

import contextlib
import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import numpy as np

import glm_edge as ge
from glm_edge.errors import GlmEdgeError

SECONDS = 10
# What tracing a model takes beside the files.
CONSTANT_BYTES = 16 << 20
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NESTED = json.loads("[" * 500 + "]" * 500)
HOSTILE = (
    None, True, False, -1, 0, 1, 3, 0.5, -0.0, 1e308, float("inf"), float("nan"), 2**31 - 1, 2**31,
    2**63, 10**30, 10**400, "", "x", "../x", "/dev/zero", "\ud800", "\0", "\n", "F16", "I64",
    [], {}, [0], [[0]], [1, 2, 3], {"a": 1}, {"": {}}, NESTED, "9" * 5000, "x" * 100_000,
)  # fmt: skip


class TooLong(BaseException):
    """Passes every `except Exception`."""


def give_up(signal_number, frame):
    raise TooLong


@contextlib.contextmanager
def limits(size: int):
    """Ten seconds, and twice the size and a constant of memory."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        taken = tracemalloc.get_traced_memory()[1] - before
        assert taken <= 2 * size + CONSTANT_BYTES


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def load(directory: Path):
    """Params, or the line that refuses them."""
    try:
        with limits(size_of(directory)):
            return ge.load(directory)[1]
    except GlmEdgeError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 5000
        return message


def make(directory: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def pick(rng, values):
    values = list(values)
    return values[rng.integers(len(values))]


def flip_bit(rng, raw: bytearray, limit: int) -> None:
    raw[rng.integers(limit)] ^= 1 << int(rng.integers(8))


def change_bytes(rng, directory: Path) -> None:
    """Flips, inserts, deletes, repeats or cuts bytes of any file."""
    path = pick(rng, directory.iterdir())
    raw = bytearray(path.read_bytes())
    at, count = int(rng.integers(len(raw))), int(rng.integers(1, 40))
    match rng.integers(8):
        case 0 | 1:
            flip_bit(rng, raw, len(raw))
        case 2 | 3:
            flip_bit(rng, raw, min(len(raw), 2000))
        case 4:
            raw[at:at] = rng.bytes(count)
        case 5:
            del raw[at : at + count]
        case 6:
            raw[at:at] = raw[max(0, at - count) : at]
        case 7:
            del raw[at:]
    path.write_bytes(raw)


def change_json(rng, value):
    """Replaces, deletes, adds, renames or swaps something in a JSON value, at a random depth."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys or rng.random() < 0.05:
        return pick(rng, HOSTILE)
    key = pick(rng, keys)
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
        value[key] = change_json(rng, value[key])
        return value
    match rng.integers(6):
        case 0 | 1 | 2:
            value[key] = pick(rng, HOSTILE)
        case 3:
            del value[key]
        case 4:
            if isinstance(value, dict):
                value[str(pick(rng, HOSTILE))[:2000]] = value[key]
            else:
                value.append(value[key])
        case 5:
            other = pick(rng, keys)
            value[key], value[other] = value[other], value[key]
    return value


def change_config(rng, directory: Path) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(change_json(rng, json.loads(path.read_bytes()))))


def change_index(rng, directory: Path) -> None:
    path = directory / INDEX
    if path.exists():
        path.write_text(json.dumps(change_json(rng, json.loads(path.read_bytes()))))
    else:
        path.write_text(json.dumps({"weight_map": {"x": pick(rng, HOSTILE)}}))


def with_header(path: Path, change) -> None:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = change(json.loads(raw[8:start]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


def change_header(rng, directory: Path) -> None:
    """Edits the header of a shard: types, shapes, offsets, names, its length."""

    def change(header):
        first, second = (pick(rng, header) for _ in range(2))
        match rng.integers(7):
            case 0:
                header[first]["dtype"] = pick(rng, ["F16", "BF16", "F32", "I16", "BOOL", "F8", ""])
            case 1:
                header[first]["shape"] = header[first]["shape"][::-1]
            case 2:
                one, other = header[first], header[second]
                one["data_offsets"], other["data_offsets"] = (
                    other["data_offsets"],
                    one["data_offsets"],
                )
            case 3:
                offsets = header[first]["data_offsets"]
                offsets[rng.integers(2)] += int(rng.integers(-9, 9)) * pick(rng, [1, 2, 2**40])
            case 4:
                entries = [f"{json.dumps(k)}:{json.dumps(v)}" for k, v in header.items()]
                return f"{{{','.join([*entries, entries[0]])}}}".encode()
            case _:
                return change_json(rng, header)
        return header

    path = pick(rng, shards(directory))
    if rng.random() < 0.1:
        raw = path.read_bytes()
        length = int(pick(rng, [0, 1, 7, 10**8, 2**63, 2**64 - 1, len(raw)]))
        path.write_bytes(length.to_bytes(8, "little") + raw[8:])
    else:
        with_header(path, change)


def change_files(rng, directory: Path) -> None:
    """Swaps, removes or replaces files by links, pipes, directories and devices."""
    path, other = (pick(rng, directory.iterdir()) for _ in range(2))
    content, outside = path.read_bytes(), directory.parent / "outside"
    match rng.integers(9):
        case 0:
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
            return
        case 1:
            (directory / pick(rng, [WEIGHTS, INDEX, "copy"])).write_bytes(content)
            return
        case 2:
            path.write_bytes(rng.bytes(int(rng.integers(200))))
            return
    path.unlink()
    match rng.integers(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(pick(rng, ["/dev/zero", "/dev/tty", path.name, "absent", "."]))
        case 3:
            outside.write_bytes(content)
            path.symlink_to(outside)
        case 4:
            (directory / "inside").write_bytes(content)
            path.symlink_to("inside")


CHANGES = (change_bytes, change_config, change_index, change_header, change_files)


def load_mutated(directory, files, seeds, check):
    """Load a changed copy of some files per seed, and check the parameters that load.

    Args:
      directory: directory of the copies.
      files: contents by name.
      seeds: seeds of the changes.
      check: function of the parameters; its failures are collected.

    Returns:
      Count of copies that loaded.
    """
    failures, loaded = [], 0
    for seed in seeds:
        make(directory, files)
        change = CHANGES[seed % len(CHANGES)]
        change(np.random.default_rng(seed), directory)
        try:
            result = load(directory)
            if not isinstance(result, str):
                loaded += 1
                check(result)
        except (Exception, TooLong) as error:
            failures.append(f"seed {seed} {change.__name__}: {type(error).__name__}: {error}"[:200])
    assert not failures, "\n".join(failures)
    return loaded
