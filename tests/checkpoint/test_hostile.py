"""Checkpoint directories with one thing wrong, each refused in one line that says what."""

import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import files
from glm_edge.checkpoint.hugging_face.reading import INDEX
from glm_edge.errors import GlmEdgeError
from glm_edge.files import CONFIG

SECONDS = 10
# JSON at its limits takes the most: text of four bytes a character, twice, and its lists.
CONSTANT_BYTES = 96 << 20


@pytest.fixture(autouse=True)
def in_time():
    """Ends a test that hangs."""

    def give_up(signal_number, frame):
        raise KeyboardInterrupt(f"{SECONDS} s are over")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def directory(tmp_path, fields, tensors, write_hugging_face):
    """A valid directory of three shards."""
    stored = {k: v.astype(jnp.bfloat16) if v.ndim == 2 else v for k, v in tensors.items()}
    return write_hugging_face(fields, stored, shards=3)


def peak_of(function, *args) -> int:
    """Bytes that a call allocates at most at one time."""
    tracemalloc.start()
    try:
        function(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(directory: Path) -> str:
    with pytest.raises(GlmEdgeError) as excinfo:
        ge.load(directory)
    assert str(excinfo.value).isprintable()
    assert len(str(excinfo.value)) < 5000
    return str(excinfo.value)


def assert_loads_like(directory: Path, expected) -> None:
    params = ge.load(directory)[1]
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for first, right in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(first, right)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def with_header(path: Path, change) -> None:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = change(json.loads(raw[8:start]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def point_index_at(directory: Path, name: str) -> None:
    index = json.loads((directory / INDEX).read_bytes())
    index["weight_map"]["model.norm.weight"] = name
    (directory / INDEX).write_text(json.dumps(index))


def edit_matrix(directory: Path, **fields) -> None:
    """Sets fields of the header entry of a matrix."""

    def change(header):
        entry = next(entry for entry in header.values() if len(set(entry["shape"])) == 2)
        turned = entry["shape"][::-1]
        entry.update({key: turned if value == "turned" else value for key, value in fields.items()})
        return header

    with_header(shards(directory)[0], change)


def overlap(header):
    """Puts the second tensor where the first one is."""
    first, second = sorted(header.values(), key=lambda entry: entry["data_offsets"])[:2]
    begin, end = second["data_offsets"]
    second["data_offsets"] = [first["data_offsets"][0], end - begin + first["data_offsets"][0]]
    return header


def repeat_first_entry(header) -> bytes:
    entries = [f"{json.dumps(key)}:{json.dumps(value)}" for key, value in header.items()]
    return f"{{{','.join([*entries, entries[0]])}}}".encode()


def put_value(directory: Path, value: float) -> None:
    path = shards(directory)[0]
    raw = path.read_bytes()
    path.write_bytes(raw[:-2] + np.asarray(value, jnp.bfloat16).tobytes())


def put_junk(path: Path, length: int, size: int, junk: bytes = b"") -> None:
    """A file of `size` bytes whose header is said to hold `length`; what is not junk is a hole."""
    path.write_bytes(length.to_bytes(8, "little") + junk)
    os.truncate(path, size)


DAMAGE = {
    "a shard is truncated": (lambda d: cut(shards(d)[1]), "truncated"),
    "a shard is empty": (lambda d: shards(d)[1].write_bytes(b""), "too few"),
    "a shard is missing": (lambda d: shards(d)[1].unlink(), "No such file"),
    "the index names a missing file": (lambda d: point_index_at(d, "absent"), "No such file"),
    "the index leads up": (lambda d: point_index_at(d, "../outside"), "plain name"),
    "the index leads to the root": (lambda d: point_index_at(d, "/etc/passwd"), "plain name"),
    "the index names the directory": (lambda d: point_index_at(d, ".."), "plain name"),
    "the index names no file": (lambda d: point_index_at(d, "\0\n"), "plain name"),
    "a header is longer than its file": (
        lambda d: put_junk(shards(d)[0], 2**63, 10**4),
        "declare a header of 9223372036854775808",
    ),
    "a header of 90 MB": (
        lambda d: put_junk(shards(d)[0], 90 << 20, 91 << 20),
        "is JSON of 94371840 bytes",
    ),
    "a header of a million brackets": (
        lambda d: put_junk(shards(d)[0], 3 << 20, 3 << 20 | 8, b'{"":[' + b"[]," * 10**6),
        "more than 500000",
    ),
    "tensors overlap": (lambda d: with_header(shards(d)[0], overlap), "without gap or overlap"),
    "a type is wrong": (lambda d: edit_matrix(d, dtype="I16"), "has type I16"),
    "a shape is wrong": (lambda d: edit_matrix(d, shape="turned"), "has shape"),
    "a tensor appears twice in a header": (
        lambda d: with_header(shards(d)[0], repeat_first_entry),
        "appears twice in one JSON object",
    ),
    "a tensor stands in two shards": (
        lambda d: shutil.copy(shards(d)[0], shards(d)[1]),
        "is also in",
    ),
    "a weight is NaN": (lambda d: put_value(d, np.nan), "must be finite"),
    "a weight is infinite": (lambda d: put_value(d, -np.inf), "must be finite"),
    "a config of 100 MB": (lambda d: os.truncate(d / CONFIG, 10**8), "JSON of 100000000 bytes"),
    "an index of 100 MB": (lambda d: os.truncate(d / INDEX, 10**8), "JSON of 100000000 bytes"),
    "a config nested 10,000 deep": (
        lambda d: (d / CONFIG).write_text('{"a":' * 10**4 + "1" + "}" * 10**4),
        "nested too deep",
    ),
    "a config nested 300 deep": (
        lambda d: (d / CONFIG).write_text('{"a":' * 300 + "1" + "}" * 300),
        "nested deeper than 64",
    ),
    "an integer of 100,000 digits": (
        lambda d: (d / CONFIG).write_text(f'{{"vocab_size": {"9" * 10**5}}}'),
        "an integer of 100000 digits",
    ),
    "a config that is not UTF-8": (lambda d: (d / CONFIG).write_bytes(b'{"\xff":1}'), "not JSON"),
    "an empty config": (lambda d: (d / CONFIG).write_bytes(b""), "not JSON"),
    "a config that says all twice": (
        lambda d: (d / CONFIG).write_text('{"model_type": "glm", "model_type": "glm4"}'),
        "'model_type' appears twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(directory, damage):
    change, expected = DAMAGE[damage]
    change(directory)
    assert expected in refused(directory)


@pytest.mark.parametrize("damage", ["a header of 90 MB", "a header of a million brackets"])
def test_a_header_of_junk_costs_little_memory(directory, damage):
    DAMAGE[damage][0](directory)
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert peak_of(refused, directory) <= 2 * size + CONSTANT_BYTES


def test_json_at_its_limits_costs_bounded_memory(tmp_path):
    path = tmp_path / "a.json"
    lists = "[]," * (files.MAX_JSON_VALUES // 2 - 9)
    text = "\U0001f600" + "x" * (files.MAX_JSON_BYTES - len(lists) - 100)
    path.write_text(f'{{"a":[{lists}0],"b":"{text}"}}')
    assert peak_of(files.read_json, path) <= 2 * path.stat().st_size + CONSTANT_BYTES


IN_THE_WAY = {
    "a link out": lambda path: path.symlink_to(path.parent.parent / "outside"),
    "a link in a ring": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("absent"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
}


@pytest.mark.parametrize("name", [CONFIG, INDEX, "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("obstacle", IN_THE_WAY)
def test_what_is_not_a_file_of_the_directory_is_refused(tmp_path, directory, name, obstacle):
    (directory / name).rename(tmp_path / "outside")
    IN_THE_WAY[obstacle](directory / name)
    assert str(directory) in refused(directory)


def test_links_inside_the_directory_are_followed(directory):
    expected = ge.load(directory)[1]
    for path in list(directory.iterdir()):
        path.rename(directory / f".{path.name}")
        path.symlink_to(f".{path.name}")
    assert_loads_like(directory, expected)


@pytest.fixture
def cached(tmp_path, directory):
    """A snapshot of the hub's cache: links into the `blobs` of its repository."""
    repository = tmp_path / "models--zai-org--glm-edge"
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(directory.iterdir()):
        shutil.copy(path, repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path, directory, cached):
    (tmp_path / "short").symlink_to(cached)
    for path in (cached, tmp_path / "short"):
        assert_loads_like(path, ge.load(directory)[1])


def test_links_of_the_hub_cache_end_in_its_own_blobs(tmp_path, cached):
    blobs = cached.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert "leads out of the checkpoint" in refused(cached)
    blobs.unlink()
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "blobs")
    cached.rename(tmp_path / "a")
    assert "cannot be read" in refused(tmp_path / "a")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 500},
        {"num_hidden_layers": 10**6},
        {"head_dim": 2**31},
        {"vocab_size": 2**62},
        {"partial_rotary_factor": 2**31},
    ],
    ids=str,
)
def test_sizes_beyond_reason_are_refused_before_they_cost(directory, fields, change):
    (directory / CONFIG).write_text(json.dumps(fields | change))
    assert peak_of(refused, directory) <= CONSTANT_BYTES


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vision", {"image_size": [2**16, 2**16]}),
        ("vision", {"num_layers": 300}),
        ("speech", {"num_frames": 2**31 - 8}),
        ("decoder", {"head_dim": 2**31 - 8}),
    ],
    ids=str,
)
def test_our_own_sizes_beyond_reason_are_refused_too(tmp_path, model, params, part, change):
    path = ge.save(model, params, tmp_path / "out", format="safetensors") / CONFIG
    values = json.loads(path.read_text())
    values["config"][part] |= change
    path.write_text(json.dumps(values))
    assert peak_of(refused, path.parent) <= CONSTANT_BYTES
