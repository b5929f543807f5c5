"""Table (m): bytes of an update against those of the complete file.

    python -m experiments.tables.update_sizes --preset=quick

The claim: JSON Patch deltas save 60 % of the network's load. The shipped model (or --checkpoint) is
rounded to int4 in groups of 32 (int8 where columns do not divide) and published. Three later
releases follow: `re-quantized` chooses its scales by HQQ; `healed` is distilled for --steps steps
from the unrounded model on random tokens and rounded again; `one layer` has the first layer of the
healed model and nothing else of it. Each later release is sent as the complete model (zstd), as a
delta of `glm_edge.update` with its plan, by bsdiff, as `zstd --patch-from` does (the old file as
dictionary, long window), and as a JSON Patch of base64 tensors under gzip. Savings refer to the
complete model. Every form is decoded again and compared byte for byte.
"""

import base64
import gzip
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax.linen import meta

import glm_edge as ge
from experiments.common import stage_eval
from experiments.tables import table
from experiments.tables.table import Row
from glm_edge import params as boxes
from glm_edge import update
from glm_edge.checkpoint.safetensors import WEIGHTS, SafetensorsFile
from glm_edge.cli.checkpoints import CHECKPOINT_HELP
from glm_edge.cli.console import bar, launch
from glm_edge.compress import quantize
from glm_edge.errors import DataError, MissingExtraError, require

FLAGS = flags.FLAGS
NAME = "update_sizes"
CLAIM = 60.0
FORMAT = "int4-g32"
STEPS = {"quick": 20, "full": 200}
LEVEL = 19
BATCH, LENGTH, LEARNING_RATE = 4, 64, 1e-4
DELTA, BSDIFF, PATCH_FROM, JSON_PATCH = (
    "glm_edge.update",
    "bsdiff",
    "zstd --patch-from",
    "JSON Patch",
)


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_integer("steps", None, "Steps of healing; default: 20, or 200 for full.", 1)


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    checkpoint, model, params = stage_eval.opened(FLAGS.checkpoint)
    steps = FLAGS.steps or STEPS[FLAGS.preset]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        releases = versions(model, params, steps, FLAGS.seed)
        for name, tree in releases.items():
            ge.save(model, tree, folder / name, source=checkpoint)
        sizes = {name: sizes_of(folder, name) for name in bar("releases")(list(releases)[1:])}
    table.publish(
        NAME,
        "Bytes of an update: claimed 60 % less by JSON Patch",
        rows_of(sizes),
        ("checkpoint", "steps"),
        {"bytes": sizes, "format": FORMAT, "level": LEVEL, "parameters": boxes.count(params)},
    )


def versions(model: Any, params: Any, steps: int, seed: int) -> dict[str, Any]:
    """Make the parameters of each release by name, the installed one first."""
    rounding = quantize.rtn(FORMAT, fallback_bits=8)
    installed = rounding(model, params)[1]
    healed = rounding(model, heal(model, params, meta.unbox(installed), steps, seed))[1]
    decoder = installed["decoder"]
    layers = {**decoder["layers"], "0": healed["decoder"]["layers"]["0"]}
    return {
        "installed": installed,
        "re-quantized": quantize.hqq(FORMAT, fallback_bits=8)(model, params)[1],
        "healed": healed,
        "one layer": {**installed, "decoder": {**decoder, "layers": layers}},
    }


def heal(model: Any, teacher: Any, student: Any, steps: int, seed: int) -> Any:
    """Distil the logits of the unrounded model into rounded weights, on random tokens.

    Args:
      model: a GLM.
      teacher: unrounded parameters.
      student: rounded parameters, as dense arrays.
      steps: steps of Adam.
      seed: seed of the tokens.

    Returns:
      Dense parameters.
    """
    optimizer = optax.adam(LEARNING_RATE)
    vocabulary = model.config.decoder.vocab_size

    def loss(student: Any, tokens: jax.Array) -> jax.Array:
        logits, targets = (
            model.apply({"params": tree}, tokens)[0].astype(jnp.float32)
            for tree in (student, teacher)
        )
        return optax.softmax_cross_entropy(logits, jax.nn.softmax(targets)).mean()

    @jax.jit
    def step(student: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        tokens = jax.random.randint(key, (BATCH, LENGTH), 0, vocabulary)
        updates, state = optimizer.update(jax.grad(loss)(student, tokens), state)
        return optax.apply_updates(student, updates), state

    state = optimizer.init(student)
    for key in bar("healing")(jax.random.split(jax.random.key(seed), steps)):
        student, state = step(student, state, key)
    return student


def sizes_of(folder: Path, name: str) -> dict[str, int | None]:
    """Measure each form of an update from `installed` to another release.

    Args:
      folder: directory with both checkpoints.
      name: name of the later one.

    Returns:
      Bytes by form; None for a form whose package is not installed.
    """
    old, new = folder / "installed", folder / name
    repository = update.create_repository(folder / f"{name} repository", folder / f"{name} keys")
    signers = update.read_keys([folder / f"{name} keys"])
    device = update.Client(
        folder / f"{name} device", update.FolderTransport(repository.directory), repository.root
    )
    for release in (old, new):
        published = update.publish(repository, release, signers, level=LEVEL)
        device.fetch()
        installed = device.apply()
        check(files_of(installed) == files_of(release), DELTA)
    before, after = files_of(old), files_of(new)
    pairs = [(before.get(path, b""), content) for path, content in after.items()]
    sizes: dict[str, int | None] = {
        "files": published.bytes,
        "complete": published.complete,
        DELTA: published.deltas[1],
    }
    for form, encode in {BSDIFF: bsdiff, PATCH_FROM: patch_from}.items():
        try:
            sizes[form] = sum(len(encode(*pair)) for pair in pairs if pair[0] != pair[1])
        except MissingExtraError:
            sizes[form] = None
    sizes[JSON_PATCH] = len(json_patch(old / WEIGHTS, new / WEIGHTS))
    return sizes


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file by its relative path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def bsdiff(old: bytes, new: bytes) -> bytes:
    """Return a patch by bsdiff."""
    bsdiff4 = require("bsdiff4", extra="bench")
    patch = bsdiff4.diff(old, new)
    check(bsdiff4.patch(old, patch) == new, BSDIFF)
    return patch


def patch_from(old: bytes, new: bytes) -> bytes:
    """Return a zstd frame with the old file as dictionary, as `zstd --patch-from` writes it."""
    zstandard = require("zstandard", extra="update")
    window_log = min(31, max(10, (len(old) + len(new)).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=window_log, hash_log=min(window_log, 28), enable_ldm=True
    )
    base = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    writer = zstandard.ZstdCompressor(dict_data=base, compression_params=parameters)
    patch = writer.compress(new)
    reader = zstandard.ZstdDecompressor(dict_data=base, max_window_size=1 << 31)
    check(reader.decompress(patch) == new, PATCH_FROM)
    return patch


def json_patch(old: Path, new: Path) -> bytes:
    """Return a gzipped JSON Patch (RFC 6902) between two files as documents of base64 tensors."""
    before, after = (document(path) for path in (old, new))
    patch = [
        {"op": "replace" if name in before else "add", "path": pointer(name), "value": value}
        for name, value in after.items()
        if before.get(name) != value
    ]
    patch += [{"op": "remove", "path": pointer(name)} for name in before if name not in after]
    try:
        applied = require("jsonpatch", extra="bench").apply_patch(before, patch)
        check(applied == after, JSON_PATCH)
    except MissingExtraError:
        # The patch is plain enough to measure without a library that applies it.
        pass
    return gzip.compress(json.dumps(patch).encode(), mtime=0)


def document(path: Path) -> Mapping[str, str]:
    """Return the tensors of a file as base64 text."""
    file = SafetensorsFile(path)
    return {name: base64.b64encode(file.read(name).tobytes()).decode() for name in file.tensors}


def pointer(name: str) -> str:
    """Return the JSON Pointer of a tensor."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


def check(equal: bool, form: str) -> None:
    """Raise DataError if a form does not restore the file."""
    if not equal:
        raise DataError(f"{form}: does not restore the new file")


def rows_of(sizes: Mapping[str, Mapping[str, int | None]]) -> list[Row]:
    """Return the table's rows: bytes, and savings over the complete download."""
    rows = []
    for name, forms in sizes.items():
        complete = forms["complete"]
        assert complete is not None
        note = f"of files of {forms['files']:,} bytes"
        rows.append(Row(f"{name}, complete", "MB", None, complete / 1e6, note=note))
        for form in (DELTA, BSDIFF, PATCH_FROM, JSON_PATCH):
            size = forms[form]
            saved = None if size is None else 100.0 * (1.0 - size / complete)
            note = "package not installed" if size is None else f"{size:,} bytes"
            rows.append(Row(f"{name}, {form}", "% saved", CLAIM, saved, note=note))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
