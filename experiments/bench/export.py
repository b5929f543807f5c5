"""Compares the speed of exported files with other runtimes: one run, alternating bursts, medians.

    python -m experiments.bench.export --work_dir=DIR --llama_python=PYTHON --onnx_python=PYTHON \\
        --torch_python=PYTHON --profile --figure=speed.png --out=speed.json

Writes a decoder of --shape with random weights for every runtime (outputs have no meaning), loads
each in a separate process with --threads threads, and alternates between them. A turn is --steps
decoding steps at each context of --contexts, and a prompt of each length of --prefill. There are
--rounds rounds, every second one in reverse order. A step is timed from the token to its logits, a
prompt from its tokens to the logits of the last one.

Rows are glm_edge's files in LiteRT (int8, int4, int4-g32, int2, float16), llama.cpp (stock build,
through llama-cpp-python), onnxruntime on glm_edge's ONNX graphs, torch and torchao (eager) on
transformers' GLM, and compiled JAX. A peer's interpreter needs:

    --llama_python    llama-cpp-python, gguf
    --onnx_python     glm_edge with its extra `onnx`, onnxruntime
    --torch_python    torch, transformers, torchao

A missing peer is skipped with the reason. --engines='LiteRT|llama.cpp Q' selects rows by a regular
expression. As many engines are resident at a time as leave --reserve_gb of free memory. The others
run afterwards, together with llama.cpp again, so that ratios pair bursts of one round. Phases of
more than eight seconds run in the first four rounds only.

glm_edge, onnxruntime and JAX have a cache of --slots. A step attends to the smallest of
--attended_slots that fits its tokens. llama.cpp and torch attend to few more slots than the filled
ones.

`of limit` is the time of reading the weights at the bandwidth measured in the same round, as a
fraction of the step. For a missed goal, --profile lists the time of each operator in glm_edge's
file, for each timed signature except embedding lookups; --profile_all does so for all of glm_edge's
files. To repeat profiles alone, use --engines='LiteRT int4$' --rounds=1 --profile_all. "RSS" is the
peak of the process, after decoding alone and after prompts; "before" is that of the runtime's
imports. Files are in the page cache before loading; "load" ends with the first logits. glm_edge
stores the weights that XNNPACK packs in a file, which the first load writes; "load" times a later
one. With --noweight_cache, and in profiles, each signature keeps its packed weights in memory.
"""

import json
import re
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.bench.conversion import bandwidth
from experiments.bench.decode import text_only
from experiments.bench.runtimes import child as children
from experiments.bench.runtimes import compare
from experiments.bench.runtimes.child import PAUSE_S, EngineProcess, Spec
from experiments.bench.runtimes.compare import Burst, Bursts, shown
from experiments.bench.runtimes.litert import timed_signatures
from experiments.common.child import ChildError
from experiments.common.provenance import peers_of, provenance_of
from glm_edge.checkpoint import build
from glm_edge.cli.checkpoints import checkpoint_of
from glm_edge.cli.console import launch, print_table, refuse_arguments
from glm_edge.cli.corpora import check_absent, write_text
from glm_edge.configs import DecoderConfig, GLMConfig, preset
from glm_edge.errors import DataError

FLAGS = flags.FLAGS
SHAPES = ("mobile", "tiny", "toy", "smollm2")
TOY = GLMConfig("toy", DecoderConfig(512, 256, 2, 4, 2, 64, 512))
# Family, module and label of a row, and the bits of each form.
ENGINES = (
    ("ours", "litert", "LiteRT", {"int8": 8, "int4": 4, "int4-g32": 4, "int2": 2, "float16": 16}),
    (
        "llama.cpp",
        "llama",
        "llama.cpp",
        {"F16": 16, "Q8_0": 8, "Q4_0": 4, "Q4_K_M": 4, "Q2_K": 2, "TQ2_0": 2},
    ),
    ("onnxruntime", "onnx_engine", "onnxruntime", {"int8": 8, "int4-g32": 4}),
    (
        "torch",
        "torch_engine",
        "torch",
        {"float32": 32, "bfloat16": 16, "int8-weight-only": 8, "int8-dynamic": 8},
    ),
    ("jax", "jax_engine", "JAX", {"float32": 32, "int8": 8}),
)
PEERS = {"llama.cpp": "llama", "onnxruntime": "onnx", "torch": "torch"}
SUFFIXES = {"ours": ".tflite", "llama.cpp": ".gguf", "onnxruntime": "_onnx"}
# Expected copies of the weights in an engine's memory, to decide whether it fits.
COPIES = {"ours": 4, "llama.cpp": 1.3, "onnxruntime": 5, "torch": 6, "jax": 3}
# Phases that take longer run in the first few rounds only.
SLOW_S, SLOW_ROUNDS = 8.0, 4


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_enum("shape", "mobile", SHAPES, "Shape of the decoder; toy has two small layers.")
    flags.DEFINE_string("work_dir", None, "Working directory for the models.", required=True)
    for family, peer in PEERS.items():
        flags.DEFINE_string(
            f"{peer}_python", None, f"Python interpreter with {family}; default: this one."
        )
    flags.DEFINE_string("engines", "", "Regular expression; runs the rows whose names match.")
    flags.DEFINE_list("contexts", ["128", "1024"], "Tokens in the cache before a timed step.")
    flags.DEFINE_list("prefill", ["128", "512"], "Prompt lengths in tokens.")
    flags.DEFINE_integer("slots", 1280, "Number of cache slots.", 2)
    flags.DEFINE_list(
        "attended_slots", ["256", "512"], "Slot counts of graphs that attend to fewer slots."
    )
    flags.DEFINE_integer(
        "threads", 2, "Number of threads of every runtime; JAX uses all available cores.", 1
    )
    flags.DEFINE_integer("rounds", 12, "Number of rounds.", 1)
    flags.DEFINE_integer("steps", 10, "Decoding steps per burst.", 1)
    flags.DEFINE_float("reserve_gb", 3.0, "Memory to leave free, in GB.", 0.0)
    flags.DEFINE_bool("weight_cache", True, "Store XNNPACK's packed weights in a file.")
    flags.DEFINE_bool("profile", False, "Time the operators of files that miss a goal.")
    flags.DEFINE_bool("profile_all", False, "Time the operators of all files of glm_edge.")
    flags.DEFINE_integer("profile_runs", 20, "Number of runs per profile.", 1)
    flags.DEFINE_bool("keep", False, "Keep the model files.")
    flags.DEFINE_string("figure", None, "PNG file for the figure; needs matplotlib.")
    flags.DEFINE_string("out", None, "JSON file for the results.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --out file.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    check_absent(FLAGS.out, FLAGS.overwrite)
    work = Path(FLAGS.work_dir).resolve()
    work.mkdir(parents=True, exist_ok=True)
    specs = chosen(specs_of(work), FLAGS.engines)
    bench = Bench(specs)
    try:
        bench.prepare()
        bench.run(phases())
        log = bench.report(phases())
        if FLAGS.profile or FLAGS.profile_all:
            log["profiles"] = profiles(specs, to_profile(log, FLAGS.profile_all))
    finally:
        bench.close()
        if not FLAGS.keep:
            remove(work, [spec.task.path for spec in specs])
    show(log)
    if FLAGS.figure:
        compare.figure(log["results"], FLAGS.figure)
    if FLAGS.out:
        text = json.dumps(log | provenance(), indent=1) + "\n"
        write_text(FLAGS.out, text, FLAGS.overwrite)


def phases() -> list[str]:
    """List the timed phases, such as `decode 128`."""
    return [f"decode {n}" for n in FLAGS.contexts] + [f"prefill {n}" for n in FLAGS.prefill]


def decoder_of(shape: str) -> GLMConfig:
    """Return a decoder without encoders, of a preset, `toy` or `smollm2`."""
    if shape == "smollm2":
        return text_only(build(checkpoint_of(shape)).config)
    return TOY if shape == "toy" else text_only(preset(shape))


def specs_of(work: Path) -> list[Spec]:
    """Return all rows of the comparison.

    Raises:
      DataError: a length is not an integer, or does not fit the cache.
    """
    try:
        contexts, lengths, attended = (
            tuple(map(int, FLAGS[n].value)) for n in ("contexts", "prefill", "attended_slots")
        )
    except ValueError as error:
        raise DataError(
            f"--contexts, --prefill, --attended_slots: {error}; use integers such as 128,1024"
        ) from error
    longest = max(*lengths, *(context + FLAGS.steps for context in contexts))
    if longest > FLAGS.slots or min(lengths) < 2 or min(contexts) < 1:
        raise DataError(
            "--contexts, --prefill: use contexts of at least 1 and prompts of at least 2 tokens "
            f"that fit --slots={FLAGS.slots} with --steps={FLAGS.steps}"
        )
    config = decoder_of(FLAGS.shape)
    fewer = {"attended_slots": [n for n in attended if n < FLAGS.slots]}
    packed = {"weight_cache": str(work / "packed")} if FLAGS.weight_cache else {}
    options = {"ours": fewer | packed, "onnxruntime": fewer, "jax": fewer}
    return [
        children.spec_of(
            f"{label} {form}",
            form,
            work / f"{FLAGS.shape}_{form}{SUFFIXES[family]}" if family in SUFFIXES else "",
            config,
            FLAGS.slots,
            contexts,
            lengths,
            FLAGS.threads,
            bits=bits,
            options=options.get(family, {}),
            family=family,
            module=module,
            python=FLAGS[f"{PEERS[family]}_python"].value if family in PEERS else None,
        )
        for family, module, label, forms in ENGINES
        for form, bits in forms.items()
    ]


def chosen(specs: Sequence[Spec], pattern: str) -> list[Spec]:
    """Return the rows whose names match.

    Raises:
      DataError: the pattern is not a regular expression, or matches nothing.
    """
    try:
        matching = [spec for spec in specs if re.search(pattern, spec.name)]
    except re.error as error:
        raise DataError(f"--engines: {pattern!r} is not a regular expression: {error}") from error
    if not matching:
        raise DataError(
            f"--engines: {pattern!r} matches none of {', '.join(s.name for s in specs)}"
        )
    return matching


class Bench:
    """The engines with their properties and bursts.

    Args:
      specs: specs of the engines.
    """

    def __init__(self, specs: Sequence[Spec]):
        self.specs = list(specs)
        self.prepared: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.samples: dict[str, Bursts] = {}
        self.bandwidth: dict[int, float] = {}
        self.resident: dict[str, EngineProcess] = {}
        self.groups: list[list[str]] = []

    def prepare(self) -> None:
        """Write every model; skip an engine that fails."""
        for spec in self.specs:
            started = time.monotonic()
            try:
                self.prepared[spec.name] = children.prepare(spec)
            except ChildError as error:
                self._leave_out(spec.name, str(error))
                continue
            print(f"{spec.name}: written in {time.monotonic() - started:.0f} s", flush=True)

    def run(self, phases: Sequence[str]) -> None:
        """Time all phases of all engines, in as few groups as fit memory."""
        waiting = [spec for spec in self.specs if spec.name in self.prepared]
        while waiting:
            waiting = self._start(waiting)
            if set(self.resident) - set(self.samples):
                self.groups.append(list(self.resident))
                self._rounds(phases)
            self.close()

    def report(self, phases: Sequence[str]) -> dict[str, Any]:
        """Collect the results for JSON."""
        data = (self.specs, self.samples, self.prepared, self.bandwidth)
        return {
            "engines": {
                name: facts for name, facts in self.prepared.items() if name not in self.left_out
            },
            "results": {
                phase: rows for phase in phases if (rows := compare.phase_rows(phase, *data))
            },
            "goals": compare.goals(self.specs, phases, *data[1:]),
            "left_out": self.left_out,
            "groups": self.groups,
            "bytes_per_second": self.bandwidth,
            "seconds": self.samples,
        }

    def close(self) -> None:
        """End all engines."""
        for engine in self.resident.values():
            engine.close()
        self.resident = {}

    def _start(self, waiting: Sequence[Spec]) -> list[Spec]:
        """Start the engines that fit, llama.cpp first, and return the others."""
        first = {spec.name for spec in waiting}
        anchors = [s for s in self.specs if s.family == "llama.cpp" and s.name in self.prepared]
        others, started = [], 0
        for spec in anchors + [s for s in waiting if s.family != "llama.cpp"]:
            if spec.name in self.left_out:
                continue
            need = COPIES[spec.family] * self.prepared[spec.name]["weight_bytes"]
            fits = children.available_bytes() - need > 1e9 * FLAGS.reserve_gb
            if started and spec.name in first and spec.family != "llama.cpp" and not fits:
                others.append(spec)
                continue
            try:
                engine, facts = children.start(spec)
            except ChildError as error:
                self._leave_out(spec.name, str(error))
                continue
            self.resident[spec.name] = engine
            started += spec.family != "llama.cpp"
            known = self.prepared[spec.name]
            known.update({name: value for name, value in facts.items() if name not in known})
        return others

    def _rounds(self, phases: Sequence[str]) -> None:
        begin, slow = len(self.bandwidth), set()
        for turn in range(begin, begin + FLAGS.rounds):
            self.bandwidth[turn] = bandwidth()
            names = list(self.resident)
            for name in names if turn % 2 else names[::-1]:
                for phase in phases:
                    if turn - begin >= SLOW_ROUNDS and (name, phase) in slow:
                        continue
                    kind, count = phase.split()
                    started = time.monotonic()
                    try:
                        seconds = self.resident[name].burst(kind, int(count), FLAGS.steps)
                    except ChildError as error:
                        self._leave_out(name, str(error))
                        self.resident.pop(name).close()
                        break
                    if time.monotonic() - started > PAUSE_S + SLOW_S:
                        slow.add((name, phase))
                    bursts = self.samples.setdefault(name, {}).setdefault(phase, [])
                    bursts.append(Burst(turn, seconds))
            print(f"round {turn - begin + 1} of {FLAGS.rounds}", flush=True)

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        print(f"{name}: left out: {reason}", flush=True)


def to_profile(log: dict[str, Any], everything: bool) -> list[tuple[str, str]]:
    """List engines and phases to profile: those of missed goals, or all timed ones."""
    if everything:
        return [(row["engine"], phase) for phase, rows in log["results"].items() for row in rows]
    return [(goal["engine"], goal["phase"]) for goal in log["goals"] if not goal["reached"]]


def profiles(specs: Sequence[Spec], phases: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Profile the operators of the signatures that ran in some phases, by `engine: signature`.

    Args:
      specs: specs of the engines.
      phases: pairs of an engine and a phase; those of other runtimes are skipped.
    """
    matching: dict[str, Any] = {}
    tasks = {spec.name: spec.task for spec in specs if spec.family == "ours"}
    for name, phase in phases:
        for signature in timed_signatures(tasks[name], phase, FLAGS.steps) if name in tasks else ():
            key = f"{name}: {signature}"
            if key in matching:
                continue
            try:
                matching[key] = children.profile(
                    tasks[name].path, signature, FLAGS.threads, FLAGS.profile_runs
                )
            except ChildError as error:
                matching[key] = {"error": str(error)}
    return matching


def remove(work: Path, paths: Sequence[str]) -> None:
    """Remove the files of a run from its directory."""
    for path in (
        *map(Path, filter(None, paths)),
        work / "packed",
        work / f"{FLAGS.shape}_F16.gguf",
    ):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def provenance() -> dict[str, Any]:
    """Describe the run."""
    names = ("shape", "engines", "contexts", "prefill", "slots", "attended_slots", "threads")
    names += ("rounds", "steps", "reserve_gb", "weight_cache", "profile", "profile_all")
    return provenance_of(
        "bench.export", names, ["--work_dir=DIR", *peers_of(tuple(PEERS.values()))], seed=0
    )


def show(log: dict[str, Any]) -> None:
    """Print the tables."""
    mega = 1e-6
    print_table(
        [
            "engine",
            "file MB",
            "weights per token MB",
            "load s",
            "RSS MB before/decode/all",
            "notes",
        ],
        [
            [
                name,
                shown(facts["file_bytes"] and mega * facts["file_bytes"]),
                shown(mega * facts["weight_bytes"]),
                shown(facts["load_seconds"]),
                "/".join(
                    shown(mega * facts[f"{kind}_rss_bytes"])
                    for kind in ("baseline", "decode", "peak")
                ),
                "; ".join(
                    [*facts["notes"], *([] if facts["batched"] else ["prompts fed token by token"])]
                ),
            ]
            for name, facts in log["engines"].items()
        ],
    )
    for phase, rows in log["results"].items():
        print()
        print_table(
            [phase, "ms", "tokens/s", "of limit", "x llama.cpp at the same bits"],
            [
                [
                    row["engine"],
                    _quartiles(row["ms"]),
                    shown(row["tokens_per_second"][1]),
                    _quartiles(row["of_limit"]) if "of_limit" in row else "-",
                    ", ".join(f"{shown(v[1])} {n}" for n, v in row["times_llama"].items()),
                ]
                for row in rows
            ],
        )
    if log["goals"]:
        print()
        print_table(
            ["goal", "ours", "beside", "wanted", "found", "verdict"],
            [
                [
                    goal["phase"],
                    goal["engine"],
                    goal["beside"],
                    shown(goal["wanted"]),
                    _quartiles(goal["found"]),
                    "reached" if goal["reached"] else "missed",
                ]
                for goal in log["goals"]
            ],
        )
    for key, profile in log.get("profiles", {}).items():
        show_profile(key, profile)
    for name, reason in log["left_out"].items():
        print(f"left out: {name}: {reason}")
    print(f"bandwidth, GB/s: {shown(1e-9 * statistics.median(log['bytes_per_second'].values()))}")


def show_profile(key: str, profile: dict[str, Any], most: int = 10) -> None:
    """Print operators and their fraction of a run, slowest first."""
    print()
    if "error" in profile:
        print(f"{key}: {profile['error']}")
        return
    total = profile["us"]
    rows = [
        [
            matching["operator"],
            matching["count"],
            shown(matching["us"]),
            f"{matching['us'] / total:.1%}",
        ]
        for matching in profile["operators"][:most]
    ]
    elsewhere = profile["elsewhere_us"]
    rows.append(["between operators", "", shown(elsewhere), f"{elsewhere / total:.1%}"])
    rows.append(["one run", "", shown(total), ""])
    print_table([key, "count", "us", "share"], rows)


def _quartiles(values: Sequence[float]) -> str:
    low, median, high = values
    return str(compare.Quartiles(median, low, high))


if __name__ == "__main__":
    define_flags()
    launch(main)
