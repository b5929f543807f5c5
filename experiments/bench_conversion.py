"""Exports decoders of published shapes with random integers, and runs what was written.

    python -m experiments.bench_conversion --shape=mobile --format=int4 --work_dir=DIR

Shapes are decoders without encoders: `mobile` (a tied vocabulary of 59,264, 0.27 billion
parameters), `glm_edge_1_5b` (1.5 billion) and `glm_4_9b` (9.4 billion, its own head). Every matrix
is of --format, as `Format.parse` reads it, its codes drawn at random and its scales such that
activations keep their size: no float copy ever exists, and the numbers mean nothing.

Two processes run in turn, so that each has a peak of its own: `convert` makes the parameters and
writes the file; `run` loads the file in LiteRT and decodes after contexts of --contexts tokens. A
step is timed as the runtime alone, the cache staying in its buffers, and again through the
signature runner of Python, which copies the cache in and out; --one_step, for files that fit
memory only once, decodes a single token. `of limit` is the time that reading
the stored weights takes at the bandwidth measured in the same process, as a fraction of the step.
"""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags

import glm_edge as ge
from experiments.bench_decode import text_only
from experiments.console import fail_in_one_line, print_table, refuse_arguments
from experiments.materials import versions
from experiments.quickstart import commit
from experiments.text.corpora import write_text
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import GLMConfig, preset
from glm_edge.errors import DataError, require
from glm_edge.kernels import packing
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format, Quantized
from glm_edge.params.tree import nested

FLAGS = flags.FLAGS
SHAPES = ("mobile", "glm_edge_1_5b", "glm_4_9b")
STEPS, BURSTS = 10, 5
BANDWIDTH_BYTES = 1 << 28


def define_flags() -> None:
    """Defines this script's flags."""
    flags.DEFINE_enum("shape", "mobile", SHAPES, "Shape of the decoder.")
    flags.DEFINE_string("format", "int8", "Of every matrix, such as int8, int4, int4-g32, int2.")
    flags.DEFINE_string("work_dir", None, "Directory for the exported file.", required=True)
    flags.DEFINE_list("prefill", ["128"], "Lengths of the prefill signatures.")
    flags.DEFINE_list("contexts", ["128"], "Tokens in the cache before a timed step.")
    flags.DEFINE_integer("slots", 1280, "Slots of the cache.", 2)
    flags.DEFINE_integer("threads", 2, "Threads of LiteRT.", 1)
    flags.DEFINE_bool("one_step", False, "Decode one token only: every signature packs a copy.")
    flags.DEFINE_bool("keep", False, "Keep the exported file.")
    flags.DEFINE_enum("step", "all", ["all", "convert", "run"], "Which process this is.")
    flags.DEFINE_string("out", None, "JSON file to write the numbers to.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    path = Path(FLAGS.work_dir) / f"{FLAGS.shape}_{FLAGS.format}.tflite"
    if FLAGS.step != "all":
        print(json.dumps(convert(path) if FLAGS.step == "convert" else run(path)))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {step: process(step) for step in ("convert", "run")}
    if not FLAGS.keep:
        path.unlink()
    for step, numbers in found.items():
        print_table([step, "value"], [[name, value] for name, value in numbers.items()])
    names = ("shape", "format", "prefill", "contexts", "slots", "threads")
    shown = (f"--{n}={','.join(v) if isinstance(v := FLAGS[n].value, list) else v}" for n in names)
    log = found | {
        "command": f"python -m experiments.bench_conversion {' '.join(shown)} --work_dir=DIR",
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }
    if FLAGS.out:
        write_text(FLAGS.out, json.dumps(log, indent=1) + "\n", overwrite=True)


def process(step: str) -> dict[str, Any]:
    """Runs one step in a process of its own and reads the numbers from its last line.

    Raises:
      DataError: the process failed.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.bench_conversion",
        *sys.argv[1:],
        f"--step={step}",
    ]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DataError(f"{step}: the process ended with status {done.returncode}; see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def shape_of(name: str) -> GLMConfig:
    """The decoder of a shape."""
    config = text_only(preset({"glm_edge_1_5b": "large", "glm_4_9b": "phone_9b"}.get(name, name)))
    if name != "glm_4_9b":
        return config
    plain = dataclasses.replace(config.decoder, sandwich_norm=False, mrope_section=())
    return dataclasses.replace(config, name=name, decoder=plain)


def random_params(model: MultimodalGLM, format: Format, seed: int = 0) -> Any:
    """Parameters of a model whose matrices are random codes; norms are one, biases zero."""
    rng, leaves = np.random.default_rng(seed), {}
    for path, shape in expected_shapes(model).items():
        if len(shape) == 2:
            leaves[path] = random_box(rng, shape, format)
        else:
            leaves[path] = jnp.full(shape, 0.0 if path.endswith("bias") else 1.0, jnp.float32)
    return nested(leaves)


def random_box(rng: np.random.Generator, shape: tuple[int, int], format: Format) -> Quantized:
    """A weight of random bytes, each of which is codes of integer types."""
    columns = packing.packed_columns(shape[1], format.qtype)
    data = np.frombuffer(rng.bytes(shape[0] * columns), np.uint8).reshape(shape[0], columns)
    spread = 2.0 ** (format.bits - 1) / 3**0.5
    scale = np.full(format.scale_shape(shape), 1.0 / (spread * shape[1] ** 0.5))
    return Quantized(
        data=jnp.asarray(data.view(np.int8) if format.qtype == "int8" else data),
        scale=jnp.asarray(scale, format.scale_dtype),
        zero=None,
        format=format,
        columns=shape[1],
    )


def convert(path: Path) -> dict[str, Any]:
    """Writes the file; seconds and memory are those of the export, parameters included."""
    model = MultimodalGLM(shape_of(FLAGS.shape))
    params = random_params(model, Format.parse(FLAGS.format))
    started = time.monotonic()
    exported = ge.export.tflite(
        model,
        params,
        path,
        prefill_lengths=map(int, FLAGS.prefill),
        cache_slots=FLAGS.slots,
        overwrite=True,
    )
    return {
        "parameters": sum(boxes.count(leaf) for _, leaf in boxes.path_items(params)),
        "stored_bytes": exported.stored_bytes,
        "file_bytes": exported.file_bytes,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def run(path: Path) -> dict[str, Any]:
    """Loads the file and times steps of decoding and prefill."""
    started = time.monotonic()
    phone = ge.export.LiteRTModel(path, num_threads=FLAGS.threads)
    rng, config = np.random.default_rng(0), phone.config
    embedded = phone.embed(rng.integers(0, config.decoder.vocab_size, 1))
    numbers: dict[str, Any] = {"load_seconds": time.monotonic() - started}
    started = time.monotonic()
    phone.extend(embedded[:1], 0, phone.empty_cache())
    numbers["first_step_seconds"] = time.monotonic() - started
    if FLAGS.one_step:
        return numbers | {"peak_rss_bytes": peak_rss_bytes()}
    resident = Resident(path, phone, FLAGS.threads)
    for length in map(int, FLAGS.prefill):
        rows = np.resize(embedded, (length, embedded.shape[1]))
        cache, times = phone.empty_cache(), []
        inputs = phone.step_inputs(rows, 0, length)
        for _ in range(BURSTS + 1):
            started = time.monotonic()
            phone.run(f"prefill_{length}", **inputs, **cache)
            times.append(time.monotonic() - started)
        numbers[f"prefill_{length}_tokens_per_second"] = length / float(np.median(times[1:]))
    for context in map(int, FLAGS.contexts):
        cache, times = phone.empty_cache(), []
        for burst in range(BURSTS):
            for step in range(STEPS):
                started = time.monotonic()
                _, cache = phone.extend(embedded[:1], context + burst * STEPS + step, cache)
                times.append(time.monotonic() - started)
        copied = float(np.median(times))
        alone = float(np.median([resident.step(embedded[:1], context + i) for i in range(50)]))
        numbers |= {
            f"decode_{context}_ms": 1e3 * alone,
            f"decode_{context}_copying_ms": 1e3 * copied,
            f"decode_{context}_of_limit": resident.weight_bytes / bandwidth() / alone,
        }
    return numbers | {"weight_bytes": resident.weight_bytes, "peak_rss_bytes": peak_rss_bytes()}


class Resident:
    """Decodes with the cache in one set of buffers, where LiteRT writes new rows in place."""

    def __init__(self, path: Path, phone: Any, threads: int):
        compiled = require("ai_edge_litert.compiled_model", extra="export")
        options = require("ai_edge_litert.options", extra="export")
        cpu = require("ai_edge_litert.cpu_options", extra="export")
        self.phone = phone
        self.model = compiled.CompiledModel.from_file(
            str(path), options=options.Options(cpu_options=cpu.CpuOptions(num_threads=threads))
        )
        index = self.model.get_signature_index("decode")
        details = self.model.get_signature_by_index(index)
        self.given = {n: self._input(n) for n in details["inputs"] if not n.startswith("kv_")}
        self.cache = {n: self._input(n) for n in details["inputs"] if n.startswith("kv_")}
        for name, array in phone.empty_cache().items():
            self.cache[name].write(array)
        self.logits = self.model.create_output_buffer_by_name("decode", "logits")
        constants = ge.export.read_constants(path)
        self.weight_bytes = sum(
            constant.data.nbytes + (0 if constant.scale is None else constant.scale.nbytes)
            for name, constant in constants.items()
            if name != "embed/weight" or phone.config.decoder.tie_embeddings
        )

    def _input(self, name: str) -> Any:
        return self.model.create_input_buffer_by_name("decode", name)

    def step(self, embedded: np.ndarray, slot: int) -> float:
        """Decodes one token and returns the seconds it took."""
        for name, array in self.phone.step_inputs(embedded, slot, 1).items():
            self.given[name].write(np.ascontiguousarray(array))
        started = time.monotonic()
        outputs = {"logits": self.logits, **self.cache}
        self.model.run_by_name("decode", self.given | self.cache, outputs)
        return time.monotonic() - started


def bandwidth() -> float:
    """Bytes a second that two cores read from memory."""
    array = np.ones(BANDWIDTH_BYTES // 8)
    halves = np.array_split(array, 2)
    with ThreadPoolExecutor(2) as pool:
        times = []
        for _ in range(7):
            started = time.monotonic()
            list(pool.map(np.add.reduce, halves))
            times.append(time.monotonic() - started)
    return array.nbytes / min(times)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    define_flags()
    app.run(fail_in_one_line(main))
