"""Measures and estimates the time from a screenshot and an instruction to an action.

    python -m experiments.bench.time_to_action --work_dir=DIR --mnn_python=PYTHON --out=FILE.json

Prints three tables, each compared with published claims, and one without a claim behind the first:

1. Measured: the file of --shape with random weights in LiteRT, at each of --forms. `Processor`, in
   Python on this machine, resizes and normalises a screenshot of --screen pixels, renders and
   tokenizes a conversation of at least --text_tokens tokens beside the image, and decodes the
   tokens of the action to text ("prepare"; with the tokenizer of `nano`, as a shape of random
   weights has none). An image is encoded, its features and --text_tokens tokens of text run through
   one prefill, and then --action_tokens tokens are decoded greedily, including embedding and
   selection. Pixels and tokens are random, since their values do not affect the time. Taking the
   screenshot and executing the action are not included.
   The table behind it compares an action of --forced_tokens tokens one by one with the same action
   in passes of --passes tokens, each a free token with the run that the grammar forces before it,
   after the same prompt and in alternating order (`forced_passes`).
2. Estimated: the same, without preparation, for --paper_shape on a device of --bandwidth_gbs and
   --tops. A part takes as long as reading its bytes or computing its operations, whichever is
   longer, at --share of the peaks. The sources of the defaults are printed with the table; the
   number of operations is an assumption.
3. Start-up, latency and size of the decoder of the `nano` preset at int8, in LiteRT and in MNN.
   Start-up is the time from opening the file, which is in the page cache, to the first logits, each
   in a new process; latency is one step at context 128. --mnn_python names an interpreter with
   glm_edge and its extra `mnn`; without it, MNN is skipped with the reason. MNN's interpreter
   cannot write the cache to the buffers that the next step reads; these copies are not timed.
"""

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import glm_edge as ge
from experiments.bench import forced_passes
from experiments.bench.export import TOY
from experiments.bench.runtimes import child as children
from experiments.bench.runtimes.compare import Quartiles, shown
from experiments.bench.runtimes.engine import timed
from experiments.common.child import ChildError
from experiments.common.provenance import peers_of, provenance_of
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.cli.console import launch, print_table, refuse_arguments
from glm_edge.cli.corpora import check_absent, write_text
from glm_edge.configs import GLMConfig, VisionConfig, preset
from glm_edge.errors import DataError
from glm_edge.export.common.sizes import FORCED_LENGTHS
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format
from glm_edge.preprocess import Processor

FLAGS = flags.FLAGS
CLAIMS_S = (3.0, 0.45)
CLAIMED = {"LiteRT": (15.0, 28.0, 4.2), "MNN": (12.0, 22.0, 3.8)}
PARTS = ("image", "prefill", "decode")
TOY_VISION = VisionConfig((56, 28), 64, 2, 2, 128, 128, position_grid=(4, 2))
STEP_CONTEXT, STEP_SLOTS, STEPS = 128, 256, 20
# Sources of the defaults of --device, --bandwidth_gbs and --tops.
SOURCES = (
    "76.8 GB/s: four channels of 16 bits of LPDDR5X at 4800 MHz, "
    "https://gist.github.com/EwoutH/754fa40ad9ddc93d55084fc46569c759; 45 TOPS: an assumption, "
    "Qualcomm publishes no value; https://runlocalai.co/hardware/snapdragon-8-gen-3 states this "
    "one without a source"
)
MNN_NOTE = "MNN: the latency excludes copies of its cache between steps"
INSTRUCTION = "open the settings and press the button below the picture "
# Bytes per value of the exported cache.
CACHE_BYTES = 4


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string("work_dir", None, "Working directory for the models.", required=True)
    flags.DEFINE_enum("shape", "mobile", ["mobile", "tiny", "nano", "toy"], "Measured model.")
    flags.DEFINE_list("forms", ["int8", "int4"], "Formats of the measured model.")
    flags.DEFINE_list("screen", ["2400", "1080"], "Height and width of the screenshot.")
    flags.DEFINE_integer("text_tokens", 96, "Number of tokens of template and instruction.", 1)
    flags.DEFINE_integer("action_tokens", 40, "Number of tokens of the action.", 1)
    flags.DEFINE_integer("forced_tokens", 18, "Number of tokens of the action in passes.", 1)
    flags.DEFINE_list("passes", ["4", "3", "4", "2"], "Tokens of each pass with forced runs.")
    flags.DEFINE_integer("rounds", 9, "Number of measurements of each, alternating.", 1)
    flags.DEFINE_integer("threads", 2, "Number of threads of the runtimes.", 1)
    flags.DEFINE_enum(
        "paper_shape", "phone_9b", ["phone_9b", "mobile"], "Preset of the estimated model."
    )
    flags.DEFINE_string("paper_form", "int4", "Format of the estimated model.")
    flags.DEFINE_float("bandwidth_gbs", 76.8, "Bandwidth of the device's memory in GB/s.", 0.01)
    flags.DEFINE_float("tops", 45.0, "Int8 operations per second of the device, in 10^12.", 0.01)
    flags.DEFINE_list("share", ["1.0", "0.5"], "Fractions of both peaks that are reached.")
    flags.DEFINE_string("device", "Snapdragon 8 Gen 3", "Name of the estimated device.")
    flags.DEFINE_string("sources", None, "Source of --bandwidth_gbs and --tops.")
    flags.DEFINE_string("mnn_python", None, "Python interpreter with MNN; default: this one.")
    flags.DEFINE_bool("keep", False, "Keep the model files.")
    flags.DEFINE_string("out", None, "JSON file for the results.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --out file.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    check_absent(FLAGS.out, FLAGS.overwrite)
    try:
        shares = [float(share) for share in FLAGS.share]
    except ValueError as error:
        raise DataError(f"--share: {error}; use numbers such as 1.0,0.5") from error
    plans = forced_passes.plans_of(FLAGS.forced_tokens, FLAGS.passes)
    work = Path(FLAGS.work_dir).resolve()
    work.mkdir(parents=True, exist_ok=True)
    log: dict[str, Any] = {"claims_s": CLAIMS_S}
    log["measured"] = measured(work, plans)
    show_measured(log["measured"])
    forms = log["measured"]["forms"]
    forced_passes.show({form: facts["passes"] for form, facts in forms.items()}, plans)
    tokens = FLAGS.text_tokens, FLAGS.action_tokens
    peaks = FLAGS.device, 1e9 * FLAGS.bandwidth_gbs, 1e12 * FLAGS.tops
    log["paper"] = [
        paper(preset(FLAGS.paper_shape), FLAGS.paper_form, *tokens, Device(*peaks, share))
        for share in shares
    ]
    for results in log["paper"]:
        show_paper(results)
    log["sources"] = sources()
    print(f"sources: {log['sources']}")
    log["runtimes"] = runtimes(work)
    show_runtimes(log["runtimes"])
    if FLAGS.out:
        names = ("shape", "forms", "screen", "text_tokens", "action_tokens", "rounds", "threads")
        names += ("forced_tokens", "passes")
        names += ("paper_shape", "paper_form", "bandwidth_gbs", "tops", "share", "device")
        placeholders = ["--work_dir=DIR", *peers_of(("mnn",))]
        log |= provenance_of("bench.time_to_action", names, placeholders, seed=0)
        write_text(FLAGS.out, json.dumps(log, indent=1) + "\n", FLAGS.overwrite)


def seeing(name: str) -> GLMConfig:
    """Return a shape with its vision encoder and without its speech encoder."""
    if name == "toy":
        return dataclasses.replace(TOY, vision=TOY_VISION, image_token_id=1)
    return dataclasses.replace(preset(name), speech=None, audio_token_id=None)


def features_of(vision: VisionConfig) -> tuple[int, int]:
    """Return the number of an image's patches, and of the features that the decoder reads."""
    rows, columns = (extent // vision.patch_stride for extent in vision.image_size)
    patches = rows * columns
    return patches, patches // vision.merge_size**2 + 2 * vision.boundary_embeddings


def measured(work: Path, plans: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Run every format in turn; return the seconds of each part and of `plans` by format."""
    config = seeing(FLAGS.shape)
    features = features_of(config.vision)[1]
    prompt = features + FLAGS.text_tokens
    slots = 64 * math.ceil((prompt + max(FLAGS.action_tokens, FLAGS.forced_tokens)) / 64)
    if slots > config.decoder.max_position_embeddings:
        raise DataError(
            f"--text_tokens, --action_tokens, --forced_tokens: {slots} tokens exceed the context "
            f"of {config.decoder.max_position_embeddings} of {FLAGS.shape}"
        )
    resident, results = {}, {}
    try:
        for form in FLAGS.forms:
            spec = children.spec_of(
                form,
                form,
                work / f"action_{FLAGS.shape}_{form}.tflite",
                config,
                slots,
                contexts=(prompt,),
                lengths=(prompt,),
                threads=FLAGS.threads,
                options={
                    "weight_cache": str(work / "packed"),
                    "prefix": FLAGS.text_tokens // 2,
                    "forced_lengths": list(FORCED_LENGTHS),
                },
            )
            written = children.prepare(spec)
            resident[form] = children.EngineProcess(spec)
            loaded = resident[form].load()
            resident[form].action(prompt, FLAGS.action_tokens)
            # The first calls of the short signatures allocate their memory.
            forced_passes.measure(resident[form], prompt, plans, 0, {})
            results[form] = {
                "file_bytes": written["file_bytes"],
                "load_seconds": loaded["seconds"],
                "runs": [],
                "passes": {},
            }
        for turn in range(FLAGS.rounds):
            for form in FLAGS.forms if turn % 2 else FLAGS.forms[::-1]:
                results[form]["runs"].append(resident[form].action(prompt, FLAGS.action_tokens))
                passes = results[form]["passes"]
                forced_passes.measure(resident[form], prompt, plans, turn, passes)
        for form, engine in resident.items():
            results[form]["peak_rss_bytes"] = engine.peak_bytes()
    except ChildError as error:
        raise DataError(f"LiteRT cannot run {FLAGS.shape}: {error}") from error
    finally:
        for engine in resident.values():
            engine.close()
        tidy(work)
    return {"features": features, "prompt_tokens": prompt, "forms": results} | prepared(config)


def prepared(config: GLMConfig) -> dict[str, Any]:
    """Time the steps before and after the model.

    Args:
      config: configuration of the measured model.

    Returns:
      `prepare_s`, seconds of each round, and `prepared_tokens`, features and text in total.

    Raises:
      DataError: --screen is not a height and a width.
    """
    try:
        height, width = map(int, FLAGS.screen)
    except ValueError as error:
        raise DataError(f"--screen: {error}; use height and width such as 2400,1080") from error
    processor, vision = Processor.from_checkpoint(ge.shipped("nano")), config.vision
    image = dataclasses.replace(
        processor.image,
        size=vision.image_size,
        patch_size=vision.patch_stride,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.merge_size,
        marker_tokens=2 * vision.boundary_embeddings,
    )
    processor = dataclasses.replace(processor, image=image)
    rng, features = np.random.default_rng(0), features_of(vision)[1]
    screen = rng.integers(0, 256, (height, width, vision.channels), np.uint8)
    action = rng.integers(0, processor.tokenizer.get_vocab_size(), FLAGS.action_tokens)

    def prepare(words: str) -> int:
        content = [{"type": "image", "image": screen}, {"type": "text", "text": words}]
        inputs = processor([{"role": "user", "content": content}])
        processor.decode(action)
        return inputs["tokens"].shape[1]

    words = INSTRUCTION
    # The first calls include compilation.
    while (tokens := prepare(words)) < features + FLAGS.text_tokens:
        words += INSTRUCTION
    seconds = [timed(lambda: prepare(words)) for _ in range(FLAGS.rounds)]
    return {"prepare_s": seconds, "prepared_tokens": tokens}


def sources() -> str:
    """Name the sources of the estimated device's values."""
    named = [name for name in ("device", "bandwidth_gbs", "tops") if FLAGS[name].present]
    return FLAGS.sources or (f"as set by --{', --'.join(named)}" if named else SOURCES)


@dataclasses.dataclass(frozen=True)
class Device:
    """Hardware of an estimate.

    Attributes:
      name: name of the device.
      bandwidth: peak bytes per second of its memory.
      operations: peak operations per second.
      share: fraction of both peaks that is reached.
    """

    name: str
    bandwidth: float
    operations: float
    share: float


def paper(
    config: GLMConfig, form: str, text_tokens: int, action_tokens: int, device: Device
) -> dict[str, Any]:
    """Estimate bytes and operations of each part, and their seconds on a device.

    Args:
      config: configuration of a model with a vision encoder.
      form: format of its matrices, for `Format.parse`.
      text_tokens: number of tokens of template and instruction.
      action_tokens: number of tokens of the action.
      device: device of the estimate.

    Returns:
      Estimates of each part and of the total.
    """
    parsed, decoder, vision = Format.parse(form), config.decoder, config.vision
    patches, features = features_of(vision)
    prompt = features + text_tokens
    weights = {
        path: shape
        for path, shape in expected_shapes(MultimodalGLM(config)).items()
        if len(shape) == 2 and path.endswith("weight")
    }

    def select(*prefixes: str) -> dict[str, tuple[int, ...]]:
        return {path: shape for path, shape in weights.items() if path.startswith(prefixes)}

    def size(results: dict[str, tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in results.values())

    def stored(results: dict[str, tuple[int, ...]]) -> int:
        return sum(parsed.stored_bytes(shape) for shape in results.values())

    tower, entire = select("vision/layers", "vision/patch"), select("vision")
    layers = select("decoder")
    head = select("embed" if decoder.tie_embeddings else "head")
    width = sum(decoder.heads(i) * decoder.head_dim for i in range(decoder.num_layers))
    cached = sum(2 * decoder.kv_heads(i) * decoder.head_dim for i in range(decoder.num_layers))
    per_feature = size(entire) - size(tower)
    parts = {
        "image": (
            stored(entire),
            2 * size(tower) * patches
            + 2 * per_feature * features
            + 4 * patches**2 * vision.hidden_size * vision.num_layers,
        ),
        # Causal attention computes half of the square; only the last token has logits.
        "prefill": (
            stored(layers) + stored(head),
            2 * size(layers) * prompt + 2 * size(head) + 2 * prompt**2 * width,
        ),
        "decode": (
            action_tokens * (stored(layers) + stored(head) + CACHE_BYTES * cached * prompt),
            action_tokens * (2 * size(layers) + 2 * size(head) + 4 * prompt * width),
        ),
    }
    bandwidth, operations = device.share * device.bandwidth, device.share * device.operations
    rows = {
        part: {
            "bytes": read,
            "operations": done,
            "memory_s": read / bandwidth,
            "arithmetic_s": done / operations,
            "seconds": max(read / bandwidth, done / operations),
        }
        for part, (read, done) in parts.items()
    }
    return {
        "shape": config.name,
        "form": form,
        "device": dataclasses.asdict(device),
        "prompt_tokens": prompt,
        "parts": rows,
        "seconds": sum(row["seconds"] for row in rows.values()),
    }


def runtimes(work: Path) -> dict[str, Any]:
    """Measure start-up, latency and size of nano in LiteRT and MNN."""
    config = dataclasses.replace(
        preset("nano"), vision=None, speech=None, image_token_id=None, audio_token_id=None
    )
    results: dict[str, Any] = {}
    resident = {}
    for name, module, suffix in (("LiteRT", "litert", ".tflite"), ("MNN", "mnn_engine", "_mnn")):
        spec = children.spec_of(
            name,
            "int8",
            work / f"action_nano_int8{suffix}",
            config,
            STEP_SLOTS,
            contexts=(STEP_CONTEXT,),
            lengths=(16,),
            threads=FLAGS.threads,
            bits=8,
            module=module,
            python=FLAGS.mnn_python if name == "MNN" else None,
        )
        try:
            written, starts = children.prepare(spec), []
            for _ in range(FLAGS.rounds):
                engine = children.EngineProcess(spec)
                try:
                    starts.append(engine.load()["seconds"])
                finally:
                    engine.close()
            resident[name] = children.EngineProcess(spec)
            resident[name].load()
        except ChildError as error:
            results[name] = {"left_out": str(error)}
            continue
        results[name] = {"size_bytes": written["file_bytes"], "start_s": starts, "step_s": []}
        if name == "MNN":
            results[name]["note"] = MNN_NOTE
    try:
        for turn in range(FLAGS.rounds):
            for name in list(resident) if turn % 2 else list(resident)[::-1]:
                results[name]["step_s"].append(resident[name].burst("decode", STEP_CONTEXT, STEPS))
    except ChildError as error:
        raise DataError(f"nano: {error}") from error
    finally:
        for engine in resident.values():
            engine.close()
        tidy(work)
    return results


def tidy(work: Path) -> None:
    """Remove the models unless --keep is set."""
    if FLAGS.keep:
        return
    for path in (*work.glob("action_*"), work / "packed"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def verdicts(seconds: float) -> list[str]:
    """Compare seconds with each claim."""
    return ["reached" if seconds <= claim else "missed" for claim in CLAIMS_S]


def show_measured(results: dict[str, Any]) -> None:
    """Print the measured table."""
    rows = []
    for form, facts in results["forms"].items():
        totals = [
            before + sum(run.values())
            for before, run in zip(results["prepare_s"], facts["runs"], strict=True)
        ]
        parts = [Quartiles.of([run[part] for run in facts["runs"]]) for part in PARTS]
        rows.append(
            [
                form,
                str(Quartiles.of(results["prepare_s"])),
                *map(str, parts),
                str(Quartiles.of(totals)),
                *verdicts(statistics.median(totals)),
                shown(1e-6 * facts["file_bytes"]),
                shown(1e-6 * facts["peak_rss_bytes"]),
            ]
        )
    title = f"measured, {FLAGS.shape}, {results['features']} features of {results['prompt_tokens']}"
    claims = [f"claimed {shown(claim)} s" for claim in CLAIMS_S]
    header = [
        title,
        "prepare s",
        "image s",
        "prefill s",
        f"{FLAGS.action_tokens} tokens s",
        "total s",
    ]
    print_table([*header, *claims, "file MB", "RSS MB"], rows)


def show_paper(results: dict[str, Any]) -> None:
    """Print the estimated table."""
    print()
    rows = [
        [
            part,
            shown(1e-9 * row["bytes"]),
            shown(1e-12 * row["operations"]),
            shown(row["memory_s"]),
            shown(row["arithmetic_s"]),
            shown(row["seconds"]),
            *[""] * len(CLAIMS_S),
        ]
        for part, row in results["parts"].items()
    ]
    rows.append(["total", "", "", "", "", shown(results["seconds"]), *verdicts(results["seconds"])])
    device = Device(**results["device"])
    title = (
        f"estimated, {results['shape']} {results['form']}, {device.name} at {device.share:.0%} of "
        f"{1e-9 * device.bandwidth:g} GB/s and {1e-12 * device.operations:g} TOPS"
    )
    header = [title, "GB", "10^12 operations", "memory s", "arithmetic s", "s"]
    print_table([*header, *(f"claimed {shown(claim)} s" for claim in CLAIMS_S)], rows)


def show_runtimes(results: dict[str, Any]) -> None:
    """Print the table of runtimes."""
    print()
    rows = []
    for name, facts in results.items():
        claimed = [shown(value) for value in CLAIMED[name]]
        if "left_out" in facts:
            rows.append([name, *(part for c in claimed for part in ("-", c))])
            continue
        values = [
            Quartiles.of([1e3 * s for s in facts["start_s"]]),
            Quartiles.of([1e3 * s for s in facts["step_s"]]),
            shown(1e-6 * facts["size_bytes"]),
        ]
        rows.append(
            [name, *(str(part) for pair in zip(values, claimed, strict=True) for part in pair)]
        )
    header = ["nano int8", "start-up ms", "claimed", "latency ms", "claimed", "size MB", "claimed"]
    print_table(header, rows)
    for name, facts in results.items():
        if "left_out" in facts:
            print(f"left out: {name}: {facts['left_out']}")
        elif "note" in facts:
            print(facts["note"])


if __name__ == "__main__":
    define_flags()
    launch(main)
