"""Sections of files, and deltas of sections."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_edge.checkpoint.safetensors import write_safetensors
from glm_edge.errors import UpdateError
from glm_edge.update.delta import compress, decode, encode
from glm_edge.update.plan import MAX_SECTION_BYTES
from glm_edge.update.sections import split


@given(st.binary(min_size=1, max_size=64), st.binary(min_size=1, max_size=64), st.data())
def test_every_method_restores_the_bytes(new, old, data):
    stride = data.draw(st.sampled_from([s for s in (1, 2, 4, 8) if len(new) % s == 0]))
    encoded = encode(new, old, stride, level=1)
    assert ("xor" in encoded) == (len(new) == len(old))
    for method, packed in encoded.items():
        assert decode(method, packed, old, len(new), stride, "x") == new


def test_the_best_method_depends_on_the_change():
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 256, 100_000, dtype=np.uint8)
    step = np.where(draw.random(codes.size) < 0.3, draw.choice([1, 255], codes.size), 0)
    moved = (codes + step.astype(np.uint8)).tobytes()
    flipped = np.where(draw.random(codes.size) < 0.3, codes ^ 0x11, codes).tobytes()
    floats = draw.standard_normal(25_000).astype(np.float32)
    healed = (floats * (1 + 1e-4)).astype(np.float32)
    cases = {
        "subtract": encode(moved, codes.tobytes(), 1),
        "xor": encode(flipped, codes.tobytes(), 1),
    }
    for best, encoded in cases.items():
        assert min(encoded, key=lambda method: len(encoded[method])) == best
    encoded = encode(healed.tobytes(), floats.tobytes(), 4)
    assert min(map(len, encoded.values())) < 0.75 * len(compress(healed.tobytes()))


def test_a_frame_of_another_size_is_refused():
    with pytest.raises(UpdateError, match="does not decompress to 9 bytes"):
        decode("plain", compress(b"12345678"), b"", 9, 1, "x")
    with pytest.raises(UpdateError, match=r"cannot be decompressed|does not decompress"):
        decode("plain", b"\x28\xb5\x2f\xfd\x20\x08" + b"?" * 9, b"", 8, 1, "x")


def check_cover(path, spans):
    ends = np.cumsum([0] + [span.size for span in spans])
    assert [span.begin for span in spans] == ends[:-1].tolist()
    assert ends[-1] == path.stat().st_size
    assert all(0 < span.size <= MAX_SECTION_BYTES for span in spans)


def test_tensors_are_sections(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {
        "a": np.zeros((3, 5), np.float32),
        "large": np.zeros(MAX_SECTION_BYTES + 3, np.uint8),
        "empty": np.zeros((0, 2), np.float16),
    }
    write_safetensors(path, arrays)
    spans = split(path)
    check_cover(path, spans)
    sizes = {span.name: (span.size, span.stride) for span in spans}
    assert sizes["tensor a 0"] == (60, 4)
    assert sizes["tensor large 0"] == (MAX_SECTION_BYTES, 1)
    assert sizes[f"tensor large {MAX_SECTION_BYTES}"] == (3, 1)
    assert len(sizes) == len(spans)


@pytest.mark.parametrize("size", [0, 1, 1000, 9_000_000])
def test_chunks_cover_a_file_without_tensors(tmp_path, size):
    path = tmp_path / "model.litertlm"
    path.write_bytes(bytes(size))
    check_cover(path, split(path)) if size else None
    assert bool(split(path)) == bool(size)


def test_boundaries_depend_on_content_only(tmp_path):
    """An insertion changes the chunks around it, also across the blocks of the reader."""
    data = np.random.default_rng(0).integers(0, 256, 20 << 20, dtype=np.uint8).tobytes()
    chunks = []
    for name, content in (("a", data), ("b", b"header" + data)):
        path = tmp_path / name
        path.write_bytes(content)
        spans = split(path)
        check_cover(path, spans)
        chunks.append({content[span.begin : span.begin + span.size] for span in spans})
    assert len(chunks[0] - chunks[1]) == 1
