"""Exports any checkpoint that the library loads to an on-device file, or to a served directory.

    glm-edge export --checkpoint=DIR --format=tflite --out=phone.tflite --verify

--format is `tflite` (LiteRT), `litertlm` (a bundle with tokenizer and chat template, for
LiteRT-LM's apps), `onnx`, `mnn`, `coreml`, or `compressed_tensors` (a Hugging Face directory for
vLLM, SGLang and transformers, with the checkpoint's tokenizer and chat template; no extra). The
others have one extra each. The codes of a compressed
checkpoint (from `glm-edge compress`) are stored unchanged. If a format does not support a weight's
type, the command converts the weight and prints the rule, or fails and names a supported type. On
two cores, int4 models of 0.3 to 9.4 billion parameters take 26 to 131 s without --verify.

--verify runs the file in a separate process and compares it with JAX on the same codes. It fails
below --threshold. The text is the first --text_tokens tokens of --text. The default text is half of
CPython's help topics, or random tokens for litertlm and for a checkpoint without a tokenizer.

* tflite: every signature, in LiteRT.
* onnx, mnn: codes and scales bit for bit; then every graph, in onnxruntime or MNN, in float32.
* litertlm: codes and scales bit for bit; then the tokens of LiteRT-LM's answers to prompts of text,
  images and speech, with those of JAX and the processor. One conversation continues until the cache
  is full.
* coreml: the package is not run. The functions, codes and scales of its specification are compared
  with the model's; the package stays marked as unverified.
* compressed_tensors: no engine runs. The directory is read again, and all weights are compared.

The command prints the file's size, its conversions, the operators that accelerators accept
(tflite), and the verification. --report writes the same to report.json beside the file.
"""

import dataclasses
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import glm_edge as ge
from glm_edge.checkpoint.companions import has_tokenizer
from glm_edge.cli import corpora
from glm_edge.cli.checkpoints import CHECKPOINT_HELP, checkpoint_of
from glm_edge.cli.console import print_table, refuse_arguments
from glm_edge.cli.run import run_of
from glm_edge.errors import DataError, ExportError, OutputError
from glm_edge.export.verify.worker import require_runtime

FLAGS = flags.FLAGS
COMPRESSED_TENSORS = "compressed_tensors"
FORMATS = ("tflite", "litertlm", "onnx", "mnn", "coreml", COMPRESSED_TENSORS)
FLOAT32 = ("onnx", "mnn")
# Formats that --verify reads and does not run.
READ = ("coreml", COMPRESSED_TENSORS)
RUNTIMES = {"tflite": "litert", "litertlm": "litertlm", "onnx": "onnx", "mnn": "mnn"}
REPORT = "report.json"
# Tokens of --text per prompt of an engine.
PROMPT = 24

flags.disclaim_key_flags()


def define_flags() -> None:
    """Define the command's flags."""
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_enum("format", "tflite", FORMATS, "Format to write.")
    flags.DEFINE_string(
        "out",
        None,
        "Output file; a directory for onnx, mnn and compressed_tensors.",
        required=True,
    )
    flags.DEFINE_enum(
        "activations",
        "float",
        ["float", "int8_dynamic"],
        "compressed_tensors: int8_dynamic declares activations of 8 bits, beside int8 weights.",
    )
    flags.DEFINE_list(
        "prefill_lengths",
        ["128"],
        "Token counts of the prefill signatures; litertlm also gets 2 and 16.",
    )
    flags.DEFINE_integer(
        "cache_slots",
        None,
        "Number of cache slots; default: the model's context length, at most 1024.",
        1,
    )
    flags.DEFINE_bool("verify", False, "Run the file and compare it with JAX.")
    flags.DEFINE_enum(
        "compute",
        None,
        ["int8_dynamic", "int8_static", "float32"],
        "Arithmetic of JAX in --verify: rounded activations, or float32; default: that of the "
        "file. onnx and mnn accept only float32, coreml and compressed_tensors none.",
    )
    flags.DEFINE_float(
        "threshold",
        None,
        "Minimum agreement; default: 0.99, or 0.97 for tflite and litertlm, which round "
        "activations, with --compute=float32.",
        0.0,
        1.0,
    )
    flags.DEFINE_string("text", None, "UTF-8 file for --verify; default: CPython's help topics.")
    flags.DEFINE_integer("text_tokens", 1024, "Maximum number of tokens of --text to compare.", 2)
    flags.DEFINE_integer("seed", 0, "Seed of random tokens.")
    flags.DEFINE_bool("report", False, "Write report.json beside the file.")
    flags.DEFINE_bool("overwrite", False, "Replace existing files of --out and --report.")


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    refuse_arguments(argv)
    started = time.monotonic()
    out = Path(FLAGS.out)
    source = checkpoint_of(FLAGS.checkpoint)
    check_flags(out)
    options: dict[str, Any] = {"overwrite": FLAGS.overwrite}
    if FLAGS.format == COMPRESSED_TENSORS:
        options |= {"source": source, "activations": FLAGS.activations}
    else:
        options["prefill_lengths"] = lengths()
        if FLAGS.cache_slots is not None:
            options["cache_slots"] = FLAGS.cache_slots
    write = getattr(ge.export, FLAGS.format)
    ids, named = text_ids(source)
    model, params = ge.load(source)
    arguments = (model, params, source) if FLAGS.format == "litertlm" else (model, params)
    result = write(*arguments, out, **options)
    summary = {
        "checkpoint": source.name,
        "format": FLAGS.format,
        "file": out.name,
        "file_bytes": result.file_bytes,
        "parameter_bytes": ge.params.stored_bytes(params),
        "conversions": [dataclasses.asdict(c) for c in result.conversions],
        "compatibility": accelerators(out) if FLAGS.format == "tflite" else None,
        "verification": verification(result, ids, source, named) if FLAGS.verify else None,
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "run": run_of(FLAGS.seed),
    }
    show(summary)
    if FLAGS.report:
        text = json.dumps(summary, indent=1) + "\n"
        corpora.write_text(out.parent / REPORT, text, overwrite=FLAGS.overwrite)
    verified = summary["verification"]
    if verified is not None and verified["ran"] and not verified["passed"]:
        raise ExportError(f"{out}: verification failed: {verified['reason']}")


def check_flags(out: Path) -> None:
    """Reject flags that would fail after the work is done.

    Raises:
      DataError: a flag does not apply to the format.
      MissingExtraError: the runtime of the format is not installed.
      OutputError: a file already exists, or its directory does not exist.
    """
    served = FLAGS.format == COMPRESSED_TENSORS
    for name in ("prefill_lengths", "cache_slots") if served else ("activations",):
        if FLAGS[name].present:
            raise DataError(f"--{name}: does not apply to {FLAGS.format}; omit the flag")
    if FLAGS.verify:
        check_verify_flags()
    for path in (out, out.parent / REPORT) if FLAGS.report else (out,):
        corpora.check_absent(path, FLAGS.overwrite)
    if not out.parent.is_dir():
        raise OutputError(f"{out}: its directory does not exist; create it first")


def check_verify_flags() -> None:
    """Reject flags of --verify without an effect, and a missing runtime.

    Raises:
      DataError: a flag does not apply to the format.
      MissingExtraError: the runtime of the format is not installed.
    """
    options = [name for name in ("compute", "threshold", "text") if FLAGS[name].value is not None]
    if FLAGS.format in READ:
        if options:
            raise DataError(
                f"--{options[0]}: does not apply to {FLAGS.format}, which is not run; omit the flag"
            )
        return
    if FLAGS.format in FLOAT32 and FLAGS.compute not in (None, "float32"):
        raise DataError(
            f"--compute: {FLAGS.format} graphs run in float32; omit the flag, or use float32"
        )
    require_runtime(RUNTIMES[FLAGS.format])


def lengths() -> list[int]:
    """Parse --prefill_lengths."""
    try:
        return [int(length) for length in FLAGS.prefill_lengths]
    except ValueError as error:
        raise DataError(f"--prefill_lengths: {error}; use integers such as 128,512") from error


def accelerators(out: Path) -> dict[str, Any]:
    """Count the operators that each delegate accepts, and list those on the CPU."""
    table = ge.export.compatibility(out)
    return {
        delegate: {
            **table.counts(delegate),
            "fallback": sorted({row.operator for row in table.fallback(delegate)}),
        }
        for delegate in table.delegates
    }


def text_ids(source: Path) -> tuple[np.ndarray | None, str]:
    """Return the tokens for the verification, None for random ones, and a description of them.

    Raises:
      CheckpointError: the checkpoint has no tokenizer for --text.
      DataError: the text cannot be read.
    """
    # A bundle's prompts include images and speech, and LiteRT-LM's engine answers each prompt.
    topics = FLAGS.format in ("tflite", *FLOAT32) and has_tokenizer(source)
    if FLAGS.text:
        text, named = corpora.read_text(FLAGS.text), f"the text of {Path(FLAGS.text).name}"
    elif FLAGS.verify and topics:
        text, named = corpora.pydoc_topics("evaluation"), "CPython's help topics"
    else:
        return None, "random tokens"
    ids = corpora.encode_text(ge.load_tokenizer(source), text)
    return np.asarray(ids[: FLAGS.text_tokens], np.int32), named


def verification(result: Any, ids: np.ndarray | None, source: Path, named: str) -> dict[str, Any]:
    """Return the comparison with JAX, or with the specification for a format that is not run."""
    if FLAGS.format in READ:
        outcome = result.verify()
        return {"ran": False, **dataclasses.asdict(outcome), "summary": str(outcome)}
    outcome = result.verify(
        compared(result, ids, source),
        threshold=FLAGS.threshold,
        compute=FLAGS.compute,
        seed=FLAGS.seed,
        check=False,
    )
    summary = {"passed": outcome.passed, "verified": outcome.verified, "reason": outcome.reason}
    return {"ran": True, "tokens_of": named, **dataclasses.asdict(outcome), **summary}


def compared(result: Any, ids: np.ndarray | None, source: Path) -> list[Any] | None:
    """Cut the text into windows of the cache's length, or into prompts for an engine."""
    if ids is None:
        return None
    if FLAGS.format == "litertlm":
        tokenizer = ge.load_tokenizer(source)
        pieces = (ids[at : at + PROMPT] for at in range(0, len(ids), PROMPT))
        texts = (tokenizer.decode(piece.tolist()).strip() for piece in pieces)
        return [text for text in texts if text]
    slots = ge.export.read_metadata(result.path)["cache_slots"]
    return [ge.export.Window(ids[at : at + slots]) for at in range(0, len(ids), slots)]


def show(summary: dict[str, Any]) -> None:
    """Print sizes, conversions, accelerators and the verification."""
    parameter_bytes = summary["parameter_bytes"]
    rows = [
        ["file", summary["file"]],
        ["bytes", f"{summary['file_bytes']:,} (parameters {parameter_bytes:,})"],
        ["seconds", f"{summary['seconds']:.1f}"],
        ["peak RSS", f"{summary['peak_rss_bytes'] / 1e9:.2f} GB"],
    ]
    for name, counts in (summary["compatibility"] or {}).items():
        total = counts["yes"] + counts["no"] + counts["unknown"]
        unknown = f", {counts['unknown']} unknown" if counts["unknown"] else ""
        rows.append([f"operators on {name}", f"{counts['yes']} of {total}{unknown}"])
    print_table(["quantity", "value"], rows + verification_rows(summary["verification"]))
    for line in grouped(summary["conversions"]):
        print(line)


def verification_rows(outcome: dict[str, Any] | None) -> list[list[str]]:
    """Return the rows of the verification."""
    if outcome is None:
        return [["verified", "no: the file was not run"]]
    if not outcome["ran"]:
        return [["verified", "no: it was not run"], ["specification", outcome["summary"]]]
    rows = [
        ["verified", "yes" if outcome["verified"] else f"no: {outcome['reason']}"],
        ["tokens of", outcome["tokens_of"]],
        ["top-1 agreement", f"{outcome['agreement']:.2%} of {outcome['tokens']} tokens"],
        ["threshold", f"{outcome['threshold']:.2%}"],
        ["compared with", f"JAX, {outcome['compute']}"],
    ]
    if outcome["max_abs_error"] is not None:
        rows.append(["largest error", f"{outcome['max_abs_error']:.3g}"])
        rows.append(["mean KL (nats)", f"{outcome['mean_kl']:.3g}"])
    if outcome["free_running_agreement"] is not None:
        free = f"{outcome['free_running_agreement']:.2%} of {outcome['free_running_tokens']} tokens"
        rows.append(["free-running agreement", free])
    if outcome["signatures"]:
        worst = max(outcome["signatures"].values())
        rows.append(["signatures", f"{len(outcome['signatures'])}, within {worst:.2g} of JAX's"])
    return rows


def grouped(conversions: Sequence[dict[str, Any]]) -> list[str]:
    """Format one line per rule: the number of converted parameters, and the first of them."""
    by_rule: dict[tuple[str, bool], list[str]] = {}
    for conversion in conversions:
        rule = (conversion["rule"], conversion["changes_values"])
        by_rule.setdefault(rule, []).append(conversion["path"])
    return [
        f"converted {len(paths)}: {rule} ({'changes values' if changed else 'same values'}), "
        f"such as {paths[0]}"
        for (rule, changed), paths in by_rule.items()
    ]
