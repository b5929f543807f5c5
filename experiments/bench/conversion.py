"""Exports models of published shapes with random integers, and runs the exported files.

    python -m experiments.bench.conversion --shape=mobile --format=int4 --work_dir=DIR

Shapes are the complete presets `mobile` and `nano` with image and speech encoders (334 and 4.6 M
parameters), and two decoders without encoders: `glm_edge_1_5b` (1.5 billion) and `glm_4_9b` (9.4
billion, untied head). Every matrix has --format (see `experiments.bench.runtimes.random_model`). No
float copy of a matrix is made, and the outputs have no meaning. The export of `mobile` takes 26 s
on two cores, that of `glm_4_9b` 131 s.

Two processes run one after the other, so that each has its own memory peak. `convert` makes the
parameters and writes a file with all signatures of the model and --prefill lengths. `run` loads the
file in LiteRT, runs the encoders, and decodes after contexts of --contexts tokens. `seconds`
measures the export alone, memory the complete process. A step is timed twice: in the runtime alone,
with the cache in its buffers, and through Python's signature runner, which copies the cache in and
out. --one_step decodes a single token, for files that fit memory only once. `of limit` is the time
of reading the stored weights at the bandwidth measured in the same process, as a fraction of the
step. The last table compares the file size with its limit (1.02 times the stored bytes and a
megabyte), and the export with its limits of time and memory.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import glm_edge as ge
from experiments.bench.decode import text_only
from experiments.bench.runtimes.litert import weight_bytes
from experiments.bench.runtimes.random_model import random_model
from experiments.common.provenance import provenance_of
from glm_edge import params as boxes
from glm_edge.cli.console import launch, print_table, refuse_arguments
from glm_edge.cli.corpora import write_text
from glm_edge.configs import GLMConfig, preset, to_dict
from glm_edge.errors import DataError, require

FLAGS = flags.FLAGS
SHAPES = ("mobile", "glm_edge_1_5b", "glm_4_9b", "nano")
# Limits of a shape: seconds of the export, and peak bytes of its process.
LIMITS = {"mobile": (60, 3e9), "glm_edge_1_5b": (240, 4e9), "glm_4_9b": (1200, 8e9)}
PREFILL = {"mobile": ["128", "512"]}
STEPS, BURSTS = 10, 5
BANDWIDTH_BYTES = 1 << 28


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_enum("shape", "mobile", SHAPES, "Shape of the model.")
    flags.DEFINE_string(
        "format", "int8", "Format of every matrix, such as int8, int4, int4-g32, int2."
    )
    flags.DEFINE_string("work_dir", None, "Working directory for the exported file.", required=True)
    flags.DEFINE_list(
        "prefill", None, "Token counts of the prefill signatures; default: 128, and 512 for mobile."
    )
    flags.DEFINE_list("contexts", ["128"], "Tokens in the cache before a timed step.")
    flags.DEFINE_integer("slots", 1280, "Number of cache slots.", 2)
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads.", 1)
    flags.DEFINE_bool(
        "one_step",
        False,
        "Decode one token only, since every signature packs its own copy of the weights.",
    )
    flags.DEFINE_bool("keep", False, "Keep the exported file.")
    flags.DEFINE_enum(
        "step", "all", ["all", "convert", "run"], "Step that this process runs; for internal use."
    )
    flags.DEFINE_string("out", None, "JSON file for the results.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    FLAGS.prefill = FLAGS.prefill or PREFILL.get(FLAGS.shape, ["128"])
    path = Path(FLAGS.work_dir) / f"{FLAGS.shape}_{FLAGS.format}.tflite"
    if FLAGS.step != "all":
        print(json.dumps(convert(path) if FLAGS.step == "convert" else run(path)))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    steps_log = {step: process(step) for step in ("convert", "run")}
    if not FLAGS.keep:
        path.unlink()
    for step, numbers in steps_log.items():
        print_table([step, "value"], [[name, value] for name, value in numbers.items()])
    steps_log["goals"] = goals(FLAGS.shape, steps_log["convert"])
    print_table(
        ["goal", "at most", "found", "verdict"],
        [
            [
                goal["goal"],
                goal["at_most"],
                goal["found"],
                "reached" if goal["reached"] else "missed",
            ]
            for goal in steps_log["goals"]
        ],
    )
    names = ("shape", "format", "prefill", "contexts", "slots", "threads", "one_step", "keep")
    log = steps_log | provenance_of("bench.conversion", names, ["--work_dir=DIR"], seed=0)
    if FLAGS.out:
        write_text(FLAGS.out, json.dumps(log, indent=1) + "\n", overwrite=True)


def process(step: str) -> dict[str, Any]:
    """Run one step in a separate process and read the results from its last line.

    Raises:
      DataError: the process failed.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.bench.conversion",
        *sys.argv[1:],
        f"--step={step}",
    ]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DataError(f"{step}: the process ended with status {done.returncode}; see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def shape_of(name: str) -> GLMConfig:
    """Return the model of a shape."""
    if name in ("mobile", "nano"):
        return preset(name)
    config = text_only(preset({"glm_edge_1_5b": "large", "glm_4_9b": "phone_9b"}[name]))
    if name != "glm_4_9b":
        return config
    plain = dataclasses.replace(config.decoder, sandwich_norm=False, mrope_section=())
    return dataclasses.replace(config, name=name, decoder=plain)


def size_bound(stored_bytes: int) -> float:
    """Return the size limit of a file in bytes from the bytes of its parameters."""
    return 1.02 * stored_bytes + 1e6


def goals(shape: str, converted: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the measured values of `convert` with their limits.

    Args:
      shape: shape of the model.
      converted: results of `convert`.

    Returns:
      Rows with `goal`, `at_most`, `found`, `reached`.
    """
    limits = {"file_bytes": size_bound(converted["stored_bytes"])}
    limits |= dict(zip(("seconds", "peak_rss_bytes"), LIMITS.get(shape, ()), strict=False))
    return [
        {
            "goal": name,
            "at_most": limit,
            "found": converted[name],
            "reached": converted[name] <= limit,
        }
        for name, limit in limits.items()
    ]


def convert(path: Path) -> dict[str, Any]:
    """Write the file; memory includes the parameters, seconds exclude making them."""
    model, params = random_model(to_dict(shape_of(FLAGS.shape)), FLAGS.format)
    started = time.monotonic()
    exported = ge.export.tflite(
        model,
        params,
        path,
        prefill_lengths=map(int, FLAGS.prefill),
        cache_slots=FLAGS.slots,
        overwrite=True,
    )
    seconds = time.monotonic() - started
    return {
        "parameters": sum(boxes.count(leaf) for _, leaf in boxes.path_items(params)),
        "signatures": list(exported.signatures),
        "stored_bytes": exported.stored_bytes,
        "file_bytes": exported.file_bytes,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def run(path: Path) -> dict[str, Any]:
    """Load the file and time steps of decoding and prefill."""
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
    numbers |= encoders(phone, rng)
    resident = Resident(path, phone, FLAGS.threads)
    for length in map(int, FLAGS.prefill):
        rows = np.resize(embedded, (length, embedded.shape[1]))
        inputs = phone.step_inputs(rows, 0, length) | phone.empty_cache()
        seconds = median_seconds(
            lambda n=length, values=inputs: phone.run(f"prefill_{n}", **values)
        )
        numbers[f"prefill_{length}_tokens_per_second"] = length / seconds
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


def encoders(phone: Any, rng: np.random.Generator) -> dict[str, float]:
    """Measure the milliseconds of a file's encoders per image and per recording."""
    vision, speech, steps_log = phone.config.vision, phone.config.speech, {}
    if vision is not None:
        image = rng.random((*vision.image_size, vision.channels), np.float32)
        steps_log["vision_ms"] = 1e3 * median_seconds(lambda: phone.encode_images(image))
    if speech is not None:
        audio = rng.standard_normal((speech.num_frames, speech.mel_bins), np.float32)
        steps_log["speech_ms"] = 1e3 * median_seconds(lambda: phone.encode_audio(audio))
    return steps_log


def median_seconds(call: Callable[[], Any]) -> float:
    """Return the median seconds of a call, after one warm-up call."""
    times = []
    for _ in range(BURSTS + 1):
        started = time.monotonic()
        call()
        times.append(time.monotonic() - started)
    return float(np.median(times[1:]))


class Resident:
    """A decoder with one set of cache buffers, in which LiteRT writes new rows in place."""

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
        self.inputs = {n: self._input(n) for n in details["inputs"] if not n.startswith("kv_")}
        self.cache = {n: self._input(n) for n in details["inputs"] if n.startswith("kv_")}
        for name, array in phone.empty_cache().items():
            self.cache[name].write(array)
        self.logits = self.model.create_output_buffer_by_name("decode", "logits")
        self.weight_bytes = weight_bytes(str(path), phone.config)

    def _input(self, name: str) -> Any:
        return self.model.create_input_buffer_by_name("decode", name)

    def step(self, embedded: np.ndarray, slot: int) -> float:
        """Decode one token and return the seconds it took."""
        for name, array in self.phone.step_inputs(embedded, slot, 1).items():
            self.inputs[name].write(np.ascontiguousarray(array))
        started = time.monotonic()
        outputs = {"logits": self.logits, **self.cache}
        self.model.run_by_name("decode", self.inputs | self.cache, outputs)
        return time.monotonic() - started


def bandwidth() -> float:
    """Measure the bytes per second that two cores read from memory."""
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
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    define_flags()
    launch(main)
