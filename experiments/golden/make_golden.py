"""Makes reference cases for `check_golden`: outputs of small models in transformers.

    python -m experiments.golden.make_golden --out_dir=DIR

Every case is a folder with a Hugging Face directory of random weights, inputs, and transformers'
outputs: hidden states, features, logits and 16 greedy tokens without a stop token, each with a
margin of at least 0.02 over the second token. Hyperparameters, files (type of the weights, shards,
dialects of names) and config.json (versions 4 and 5, omitted fields) are drawn at random, once per
case. Needs torch and transformers.
"""

import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.golden.cases import Arrays
from experiments.golden.reference_decoders import DECODERS
from experiments.golden.reference_encoders import ENCODERS
from experiments.golden.reference_inputs import draw_inputs
from experiments.golden.reference_plans import EOS, Draw, Plan
from glm_edge.cli.console import bar, launch, refuse_arguments
from glm_edge.errors import DataError
from glm_edge.writers import new_directory

FLAGS = flags.FLAGS
TRIES = 200
MEMBERS = DECODERS | ENCODERS


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string("out_dir", None, "Output folder, with one folder per case.", required=True)
    flags.DEFINE_integer("seed", 0, "Seed of hyperparameters, weights and inputs.")
    flags.DEFINE_integer("cases", 1, "Number of cases per member.", 1)
    flags.DEFINE_list("members", list(MEMBERS), "Members of the family to make cases for.")
    flags.DEFINE_bool("tiny", False, "Make only the smallest case of each member.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    unknown = sorted(set(FLAGS.members) - set(MEMBERS))
    if unknown:
        raise DataError(f"--members: unknown member {unknown[0]!r}; known: {', '.join(MEMBERS)}")
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{package} is not installed; install it to compute reference cases")
    messages = importlib.import_module("transformers").utils.logging
    messages.disable_progress_bar()
    messages.set_verbosity_error()
    count = 1 if FLAGS.tiny else FLAGS.cases
    wanted = [(member, index) for member in FLAGS.members for index in range(count)]
    for member, index in bar("cases")(wanted):
        name = member if count == 1 else f"{member}_{index:02d}"
        rng = np.random.default_rng([FLAGS.seed, index, *member.encode()])
        with new_directory(Path(FLAGS.out_dir) / name, overwrite=False) as folder:
            make_case(MEMBERS[member](Draw(rng, FLAGS.tiny)), folder, rng)


def make_case(drawn: Plan, folder: Path, rng: np.random.Generator) -> None:
    """Write one case.

    Args:
      drawn: drawn model and subcases.
      folder: empty folder.
      rng: random generator of weights and inputs.

    Raises:
      DataError: no drawn inputs have greedy tokens with a clear margin.
    """
    # Imported late, since they need torch.
    import torch
    import transformers

    from experiments.golden import reference
    from experiments.golden.reference_files import write_checkpoint

    # Small models are slower on several threads.
    torch.set_num_threads(1)
    model = write_checkpoint(drawn, folder, rng)
    inputs, outputs, noise, margins = {}, {}, {}, []
    for subcase, rows in drawn.subcases.items():
        drawn_inputs = draw_inputs(drawn, subcase, rng)
        results = {}
        # Only rows of tokens can be continued by a decoder.
        if isinstance(rows, list):
            drawn_inputs, results, margin = _clear_inputs(model, drawn, subcase, rng)
            margins.append(margin)
        computed = reference.outputs_of(model, drawn_inputs)
        for name, value in reference.noise_of(model, drawn_inputs, computed).items():
            noise[name] = max(noise.get(name, 0.0), value)
        inputs |= {f"{subcase}.{name}": value for name, value in drawn_inputs.items()}
        outputs |= {f"{subcase}.{name}": value for name, value in (computed | results).items()}
    np.savez_compressed(folder / "inputs.npz", **inputs)
    np.savez_compressed(folder / "outputs.npz", **outputs)
    meta = {
        "class": drawn.architecture,
        "subcases": drawn.subcases,
        "weights_dtype": drawn.dtype,
        "config_style": f"v{drawn.style}",
        "num_params": sum(weight.numel() for weight in model.parameters()),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "fp32_vs_fp64_max_abs": noise,
    }
    if margins:
        meta |= {"eos": EOS, "min_greedy_margin": min(margins)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _clear_inputs(
    model: Any, drawn: Plan, subcase: str, rng: np.random.Generator
) -> tuple[Arrays, Arrays, float]:
    """Return inputs, greedy outputs and margin of a subcase with clear greedy tokens."""
    from experiments.golden.reference import greedy

    for _ in range(TRIES):
        drawn_inputs = draw_inputs(drawn, subcase, rng)
        made = greedy(model, drawn_inputs)
        if made is not None:
            return drawn_inputs, *made
    raise DataError(
        f"{subcase}: no inputs with clear greedy tokens in {TRIES} draws; try a different --seed"
    )


if __name__ == "__main__":
    define_flags()
    launch(main)
