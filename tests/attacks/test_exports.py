"""Mutated exports end as one of our errors or as an answer, in bounded time and memory."""

import contextlib
import copy
import dataclasses
import json
import os
import resource
import shutil
import signal
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import GlmEdgeError
from glm_edge.export.common.directory import DESCRIPTION
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.flatbuffer import FlatModel
from glm_edge.export.verify.graph_directory import READERS
from glm_edge.kernels import quantization
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format
from glm_edge.params.tree import nested
from glm_edge.preprocess import Processor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("tensorflow") and find_spec("ai_edge_litert")),
        reason="the extra export is not installed",
    ),
]

SEED = 20_260_000
MODULES = {"onnx": ("onnx", "onnxruntime"), "mnn": ("MNN", "onnx")}
VOCABULARY, SLOTS = 48, 24
SECONDS, BYTES = 120, 3 << 30
WORDS = ("<end>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
# What a field of a description may be turned into.
VALUES = (
    None,
    True,
    -1,
    0,
    2.5,
    10**9,
    10**19,
    1e300,
    "",
    "x" * 300,
    "../../etc/passwd",
    [],
    {},
    [[]],
    [10**9] * 3,
    [-1],
    ["decode"] * 9,
    {"a": {"b": [1]}},
)


@pytest.fixture(scope="module")
def model():
    decoder = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=SLOTS,
    )
    return MultimodalGLM(GLMConfig(name="attacked", decoder=decoder, eos_token_ids=(0,)))


@pytest.fixture(scope="module")
def params(model):
    rng = np.random.default_rng(SEED)

    def leaf(path, shape):
        if len(shape) < 2:
            return jnp.ones(shape)
        weight = jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)
        scale = jnp.abs(weight).max(-1, keepdims=True) / 127
        codes = quantization.quantize(weight, scale, None, "int8")
        return boxes.quantized(codes, scale, None, Format("int8"))

    return nested({path: leaf(path, shape) for path, shape in expected_shapes(model).items()})


@pytest.fixture(scope="module")
def tflite(model, params, tmp_path_factory):
    return export.tflite(
        model,
        params,
        tmp_path_factory.mktemp("tflite") / "a.tflite",
        (4,),
        SLOTS,
        attended_slots=(8,),
    )


@pytest.fixture(scope="module", params=READERS)
def package(request, model, params, tmp_path_factory):
    for module in MODULES[request.param]:
        pytest.importorskip(module)
    path = tmp_path_factory.mktemp(request.param) / "a"
    write = getattr(export, request.param)
    return write(model, params, path, (4,), SLOTS, attended_slots=(8,))


@pytest.fixture(scope="module")
def bundle(model, params, tmp_path_factory):
    for module in ("litert_lm", "litert_lm_builder"):
        pytest.importorskip(module)
    import tokenizers

    words = [*WORDS, *(f"w{index:02d}" for index in range(len(WORDS), VOCABULARY))]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(WORDS))
    processor = Processor(tokenizer, TEMPLATE, stop_token_ids=(0,))
    path = tmp_path_factory.mktemp("litertlm") / "a.litertlm"
    return export.litertlm(model, params, processor, path, (4,), SLOTS)


@contextlib.contextmanager
def bounded():
    """Fails what takes too long, or makes this process larger than it was by too much."""

    def late(*_):
        raise AssertionError(f"no end within {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < BYTES, f"{grown:,} bytes more"


def outcomes(*questions):
    """`refused` or `answered` for each question; anything else is a failure of the test."""
    result, errors = [], []
    for ask in questions:
        with bounded():
            try:
                ask()
                result.append("answered")
            except GlmEdgeError as error:
                errors.append(str(error))
                result.append("refused")
    assert not any("\n" in error or len(error) > 3000 for error in errors)
    return result


def windows():
    return [export.Window(np.arange(3, 11, dtype=np.int32))]


def mutated(content, rng, reach=None):
    """Bytes cut, flipped, overwritten, moved, doubled, or zeroed in the first `reach` bytes."""
    content = bytearray(content)
    reach = len(content) if reach is None else min(reach, len(content))
    at = int(rng.integers(0, reach))
    kind = rng.integers(6)
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        for position in rng.integers(0, reach, rng.integers(1, 12)):
            content[position] ^= int(rng.integers(1, 256))
    elif kind == 2:
        word = int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(content)]))
        content[at // 4 * 4 : at // 4 * 4 + 4] = word.to_bytes(4, "little")
    elif kind == 3:
        size, source = int(rng.integers(1, 200)), int(rng.integers(0, reach))
        content[at : at + size] = content[source : source + size]
    elif kind == 4:
        content[at:at] = content[at : at + int(rng.integers(1, 4096))]
    else:
        size = int(rng.integers(1, 2048))
        content[at : at + size] = bytes(size)
    return bytes(content)


def other(description, rng):
    """A description with one value, at any depth, turned into another."""
    changed = copy.deepcopy(description)
    node = changed
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[rng.integers(len(keys))]
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.4:
            break
        node = inner
    if rng.random() < 0.15 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = VALUES[rng.integers(len(VALUES))]
    return changed


def single_file(path, exported):
    return outcomes(
        lambda: export.read_metadata(path),
        lambda: export.read_constants(path),
        lambda: export.compatibility(path),
        lambda: export.verify(path, exported.model, exported.params, windows(), free_running=0),
    )


def test_mutated_tflite_files(tflite, tmp_path):
    path, observed = tmp_path / "a.tflite", set()
    content = tflite.path.read_bytes()
    for seed in range(40):
        path.write_bytes(mutated(content, np.random.default_rng(SEED + seed)))
        observed.update(single_file(path, tflite))
    assert observed == {"refused", "answered"}


def test_lying_tflite_descriptions(tflite, tmp_path):
    path, observed = tmp_path / "a.tflite", set()
    described = export.read_metadata(tflite.path)
    for seed in range(40):
        graph = FlatModel(tflite.path.read_bytes())
        graph.add_metadata(other(described, np.random.default_rng(SEED + seed)))
        tflite_file.write(graph.model, path, overwrite=True)
        observed.update(single_file(path, tflite))
    assert observed == {"refused", "answered"}


def test_mutated_bundles(bundle, tmp_path):
    from glm_edge.export.litertlm.bundle import read_sections

    path, observed = tmp_path / "a.litertlm", set()
    content = bundle.path.read_bytes()
    attacked = dataclasses.replace(bundle, path=path)
    # The header, the metadata, the tokenizer, and all of it.
    starts = [part.start + part.size for part in read_sections(bundle.path)]
    reaches = [2048, *starts[:2], None]
    for seed in range(48):
        rng = np.random.default_rng(SEED + seed)
        path.write_bytes(mutated(content, rng, reaches[seed % len(reaches)]))
        observed.update(
            outcomes(
                lambda: read_sections(path),
                lambda: attacked.verify(prompts=1, max_new_tokens=2, timeout=60.0),
            )
        )
    assert observed == {"refused", "answered"}


def directory(path, exported):
    kind = "onnx" if (exported.path / "decode.onnx").is_file() else "mnn"
    return outcomes(
        lambda: export.read_metadata(path),
        lambda: READERS[kind](path),
        lambda: export.verify(path, exported.model, exported.params, windows(), free_running=0),
    )


def copied(exported, tmp_path):
    path = tmp_path / "a"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(exported.path, path)
    return path


def test_mutated_directories(package, tmp_path):
    observed = set()
    names = sorted(file.name for file in package.path.iterdir())
    for seed in range(40):
        rng, path = np.random.default_rng(SEED + seed), copied(package, tmp_path)
        file = path / names[rng.integers(len(names))]
        file.write_bytes(mutated(file.read_bytes(), rng))
        observed.update(directory(path, package))
    assert observed == {"refused", "answered"}


def test_lying_descriptions_of_directories(package, tmp_path):
    described, observed = json.loads((package.path / DESCRIPTION).read_text()), set()
    for seed in range(40):
        path = copied(package, tmp_path)
        changed = other(described, np.random.default_rng(SEED + seed))
        (path / DESCRIPTION).write_text(json.dumps(changed))
        observed.update(directory(path, package))
    assert observed == {"refused", "answered"}


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/random", "/etc/passwd", "hole"])
def test_odd_files_in_directories(kind, package, tmp_path):
    for name in sorted(file.name for file in package.path.iterdir()):
        path = copied(package, tmp_path)
        os.remove(path / name)
        if kind == "pipe":
            os.mkfifo(path / name)
        elif kind == "hole":
            with open(path / name, "wb") as file:
                file.truncate(1 << 34)
        else:
            (path / name).symlink_to(kind)
        assert directory(path, package)[-1] == "refused"
