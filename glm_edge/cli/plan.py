"""Plans which 9-billion-parameter GLM fits a phone's 1.8 GB, from shapes alone.

    glm-edge plan
    glm-edge plan --preset=phone_9b --budget_gb=1.8 --tower_format=int4 --small_vocab=65536 \\
        --json=plan_phone.json

Prints three tables and a conclusion in seconds. The first table checks the published claim (int8 in
under 1.8 GB): the bytes of all matrices in one format, without and with the vision tower, and
whether they fit 1.8 GB (1.8e9 bytes) and 1.8 GiB (1.8 * 2^30). The second mixes formats and cuts
the vocabulary. The third lists the number of decoder layers that fit.

Every figure is a sum over the shapes of the preset's parameters; no weight is allocated. Packed
codes, scales and zero points count as stored; norms, biases and tables are bfloat16. The key/value
cache and the program need additional memory. Formats are written as in glm_edge.params.Format: int4
or int4-channel has one scale per row, int4-g32 one per 32 columns, ternary packs five weights per
byte, ternary34 four weights in five bits.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.cli.console import print_table, refuse_arguments
from glm_edge.cli.corpora import write_text
from glm_edge.cli.outputs import check_output
from glm_edge.compress.allocate.knapsack import bytes_with
from glm_edge.configs import GLMConfig, preset
from glm_edge.errors import BoxError, RecipeError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format
from glm_edge.params.tree import Params, nested

UNIFORM = (
    "bfloat16",
    "int8",
    "int4-g32",
    "int4",
    "int3-g32",
    "int3",
    "int2-g32",
    "int2",
    "ternary-g128",
    "ternary",
    "ternary34-g128",
    "ternary34",
)
BODIES = ("int3", "int2", "ternary-g128", "ternary", "ternary34-g128")
CLAIM = "int8"
ENDS = ("embed/", "head/")
TOWERS = ("vision/", "speech/")

FLAGS = flags.FLAGS

flags.disclaim_key_flags()


def define_flags() -> None:
    """Define the command's flags."""
    flags.DEFINE_string(
        "preset", "phone_9b", "Preset of the shapes, a name that ge.preset accepts."
    )
    flags.DEFINE_float(
        "budget_gb",
        1.8,
        "Memory budget, interpreted as GB (1e9 bytes) and as GiB (2^30 bytes).",
        0.001,
    )
    flags.DEFINE_string("tower_format", "int4", "Narrowest format of the vision tower.")
    flags.DEFINE_string("end_format", "int4", "Format of embedding and head in the mixed tables.")
    flags.DEFINE_integer("small_vocab", 65536, "Size in tokens of the cut vocabulary.", 1)
    flags.DEFINE_string("json", None, "JSON file for all figures.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --json file.")


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    refuse_arguments(argv)
    check_output(FLAGS.json, FLAGS.overwrite)
    config = preset(FLAGS.preset)
    budgets = {"GB": int(FLAGS.budget_gb * 1e9), "GiB": int(FLAGS.budget_gb * 2**30)}
    names = ("tower_format", "end_format")
    tower, ends = (read_format(str(FLAGS[name].value), name) for name in names)
    report: dict[str, Any] = {"preset": config.name, "budgets": budgets}
    report["parts"] = parts(config, tower)
    report["uniform"] = [
        sizes(config, name, read_format(name), read_format(name), tower) for name in UNIFORM
    ]
    report["claim"] = claim(report["uniform"], report["parts"], budgets)
    small = with_vocabulary(config, FLAGS.small_vocab)
    report["mixed"] = [
        sizes(member, f"{body} + {FLAGS.end_format} ends", read_format(body), ends, tower)
        for member in (config, small)
        for body in BODIES
    ]
    report["cut"] = [
        sizes(small, body, read_format(body), read_format(body), tower) for body in BODIES
    ]
    report["layers"] = [
        most_layers(member, read_format(body), end, tower, budgets) | {"format": label}
        for member in (config, small)
        for body in BODIES
        for label, end in ((body, read_format(body)), (f"{body} + {FLAGS.end_format} ends", ends))
    ]
    show(report)
    if FLAGS.json:
        write_text(FLAGS.json, json.dumps(report, indent=2) + "\n", overwrite=FLAGS.overwrite)


def read_format(name: str, flag: str | None = None) -> Format:
    """Return a format by its name.

    Args:
      name: name of a format, such as `int4-g32`.
      flag: flag with the name, for the message.

    Raises:
      RecipeError: no format has that name.
    """
    try:
        return Format.parse(name)
    except BoxError as error:
        raise RecipeError(f"{flag}: {error}" if flag else str(error)) from error


@functools.cache
def shapes(config: GLMConfig) -> Params:
    """Return abstract bfloat16 parameters of a model."""
    shapes = expected_shapes(MultimodalGLM(config))
    return nested({path: jax.ShapeDtypeStruct(shapes[path], jnp.bfloat16) for path in shapes})


def with_vocabulary(config: GLMConfig, size: int) -> GLMConfig:
    """Cut the vocabulary to its first `size` tokens; placeholders become the last ones."""
    names = ("image_token_id", "audio_token_id", "pad_token_id")
    last: dict[str, Any] = {
        name: size - 1 - offset
        for offset, name in enumerate(names)
        if (getattr(config, name) or 0) >= size
    }
    decoder = dataclasses.replace(config.decoder, vocab_size=size)
    return dataclasses.replace(config, decoder=decoder, **last)


def with_layers(config: GLMConfig, count: int) -> GLMConfig:
    """Set the number of decoder layers."""
    decoder = dataclasses.replace(config.decoder, num_layers=count)
    return dataclasses.replace(config, decoder=decoder)


def formats_of(params: Params, body: Format, ends: Format, tower: Format) -> dict[str, Format]:
    """Return the format of every matrix: `ends` of embedding and head, `body` of the layers.

    A matrix whose columns are not a multiple of the group size gets the type per channel. A matrix
    whose columns are not a multiple of four gets int4 instead of `ternary34`.
    """
    formats = {}
    for path, leaf in boxes.path_items(params):
        if boxes.is_matrix(path, leaf):
            wanted = tower if path.startswith(TOWERS) else ends if path.startswith(ENDS) else body
            formats[path] = _fitting(wanted, leaf.shape[-1])
    return formats


def _fitting(wanted: Format, columns: int) -> Format:
    for format in (wanted, Format(wanted.qtype), Format("int4")):
        try:
            format.num_groups(columns)
        except BoxError:
            continue
        return format
    raise RecipeError(f"{wanted}: cannot store {columns} columns")


def total(params: Params, body: Format, ends: Format, tower: Format) -> dict[str, int]:
    """Count the stored bytes of the decoder with embedding and head, and of each tower."""
    formats = formats_of(params, body, ends, tower)
    by_part = {"text": 0, "vision": 0, "speech": 0}
    for path, leaf in boxes.path_items(params):
        part = path.split("/")[0]
        part = part if part in by_part else "text"
        by_part[part] += bytes_with({path: leaf}, formats)
    return by_part


def sizes(
    config: GLMConfig, name: str, body: Format, ends: Format, tower: Format
) -> dict[str, Any]:
    """Return one table row: parameters and bytes without and with the vision tower."""
    params = shapes(config)
    # A body format wider than the tower's format also applies to the tower.
    tower = max(body, tower, key=lambda format: format.bits)
    stored = total(params, body, ends, tower)
    weights = counts(params)
    return {
        "format": name,
        "tower": str(tower),
        "vocabulary": config.decoder.vocab_size,
        "layers": config.decoder.num_layers,
        "text_parameters": weights["text"],
        "text_bytes": stored["text"],
        "vision_bytes": stored["vision"],
        "bits": 8 * stored["text"] / weights["text"],
    }


def counts(params: Params) -> dict[str, int]:
    """Count the parameters of the decoder with embedding and head, and of each tower."""
    by_part = {"text": 0, "vision": 0, "speech": 0}
    for path, leaf in boxes.path_items(params):
        part = path.split("/")[0]
        by_part[part if part in by_part else "text"] += leaf.size
    return by_part


def parts(config: GLMConfig, tower: Format) -> list[dict[str, Any]]:
    """List the parameters of each part, and bytes of a tower in its format."""
    params = shapes(config)
    stored, weights = total(params, tower, tower, tower), counts(params)
    plain = Format("bfloat16")
    wide = total(params, plain, plain, plain)
    return [
        {
            "part": part,
            "parameters": weights[part],
            "bfloat16": wide[part],
            str(tower): stored[part],
        }
        for part in weights
        if weights[part]
    ]


def claim(
    uniform: Sequence[Mapping[str, Any]],
    part_rows: Sequence[Mapping[str, Any]],
    budgets: Mapping[str, int],
) -> dict[str, Any]:
    """Compare the published claim with the bytes that its format needs."""
    row = next(row for row in uniform if row["format"] == CLAIM)
    text = next(part["parameters"] for part in part_rows if part["part"] == "text")
    fitting = [
        {"format": row["format"], "budget": name, "vision": vision}
        for row in uniform
        for name, budget in budgets.items()
        for vision in (False, True)
        if row["text_bytes"] + vision * row["vision_bytes"] <= budget
    ]
    return {
        "parameters": text,
        "bytes_needed": row["text_bytes"],
        "possible": row["text_bytes"] <= max(budgets.values()),
        "times_budget": {name: row["text_bytes"] / budget for name, budget in budgets.items()},
        "bits_available": {name: 8 * budget / text for name, budget in budgets.items()},
        "uniform_formats_that_fit": fitting,
    }


def most_layers(
    config: GLMConfig, body: Format, ends: Format, tower: Format, budgets: Mapping[str, int]
) -> dict[str, Any]:
    """Find the largest number of decoder layers per budget, without and with the vision tower."""
    tower = max(body, tower, key=lambda format: format.bits)
    params = shapes(config)
    stored = total(params, body, ends, tower)
    formats = formats_of(params, body, ends, tower)
    layer = {p: leaf for p, leaf in boxes.path_items(params) if p.startswith("decoder/layers/0/")}
    each, num_layers = bytes_with(layer, formats), config.decoder.num_layers
    row: dict[str, Any] = {"vocabulary": config.decoder.vocab_size, "of": num_layers}
    for vision in (False, True):
        without_layers = stored["text"] - num_layers * each + vision * stored["vision"]
        for name, budget in budgets.items():
            label = f"{name}{' with vision' if vision else ''}"
            row[label] = max(0, min(num_layers, (budget - without_layers) // each))
    return row


def show(report: Mapping[str, Any]) -> None:
    """Print the tables."""
    budgets = report["budgets"]
    named = ", ".join(f"{value:,} bytes ({name})" for name, value in budgets.items())
    print(f"{report['preset']}; budget {named}\n")
    heads = list(report["parts"][0])
    print_table(heads, [[_shown(part[h]) for h in heads] for part in report["parts"]])
    print("\nOne format throughout (the tower no narrower than --tower_format):")
    _print_sizes(report["uniform"], budgets)
    print("\nMixed formats, the complete vocabulary and a part of it:")
    _print_sizes([*report["mixed"], *report["cut"]], budgets)
    print("\nDecoder layers that fit:")
    heads = list(report["layers"][0])
    heads = ["format", *(head for head in heads if head != "format")]
    print_table(heads, [[_shown(row[head]) for head in heads] for row in report["layers"]])
    # Last, since the tables are longer than a terminal.
    _print_claim(report["claim"], budgets)


def _print_sizes(rows: Sequence[Mapping[str, Any]], budgets: Mapping[str, int]) -> None:
    header = ["format", "vocabulary", "parameters", "bits/weight", "bytes"]
    header += ["with vision", *(f"fits {name}" for name in budgets)]
    header += [f"fits {name} with vision" for name in budgets]
    lines = []
    for row in rows:
        both = row["text_bytes"] + row["vision_bytes"]
        fits = [
            "yes" if size <= budget else f"no, {size / budget:.2f} x"
            for size in (row["text_bytes"], both)
            for budget in budgets.values()
        ]
        numbers = [row["vocabulary"], row["text_parameters"], f"{row['bits']:.3f}"]
        lines.append([row["format"], *map(_shown, [*numbers, row["text_bytes"], both]), *fits])
    print_table(header, lines)


def _print_claim(claim: Mapping[str, Any], budgets: Mapping[str, int]) -> None:
    verdict = "possible" if claim["possible"] else "arithmetically impossible"
    times = " and ".join(f"{ratio:.2f} x the {n}" for n, ratio in claim["times_budget"].items())
    bits = ", ".join(f"{value:.3f} ({name})" for name, value in claim["bits_available"].items())
    print(
        f"\nThe published claim, {CLAIM} below {next(iter(budgets.values())):,} bytes: {verdict}. "
        f"{claim['parameters']:,} parameters of text alone need {claim['bytes_needed']:,} bytes, "
        f"{times} budget.\nThe budget allows this many bits per weight: {bits}."
    )
    fitting = claim["uniform_formats_that_fit"]
    for name in budgets:
        for vision in (False, True):
            chosen = [
                row["format"] for row in fitting if (row["budget"], row["vision"]) == (name, vision)
            ]
            where = f"in the budget as {name}, {'with' if vision else 'without'} the vision tower"
            print(f"One format throughout fits {where}: {', '.join(chosen) or 'none'}.")


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
