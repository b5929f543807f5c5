"""Records transformers' outputs for directories written by `glm_edge.save`.

    python -m experiments.golden.make_round_trip --configs=FILE --out_dir=DIR

For every config.json of FILE (a JSON object of them by name), the script saves a model with seeded
random weights and opens it with transformers. DIR/NAME.json then contains the written config.json,
type, shape and SHA-256 of every tensor, the inputs, and the outputs. Needs torch and transformers.
"""

import hashlib
import importlib
import importlib.util
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import glm_edge as ge
from glm_edge.checkpoint.hugging_face.members import read_config
from glm_edge.checkpoint.safetensors import SafetensorsFile
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.cli.console import launch, refuse_arguments
from glm_edge.errors import DataError
from glm_edge.files import CONFIG
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.vision import VisionEncoder
from glm_edge.params.tree import nested
from glm_edge.preprocess.patches import to_patches

Arrays = dict[str, np.ndarray]

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string(
        "configs", None, "JSON file with an object of config.json contents by name.", required=True
    )
    flags.DEFINE_string("out_dir", None, "Output folder of the records.", required=True)


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{package} is not installed; install it to compute outputs")
    out = Path(FLAGS.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name, fields in json.loads(Path(FLAGS.configs).read_text()).items():
        model, params = build(fields)
        with tempfile.TemporaryDirectory() as folder:
            directory = ge.save(model, params, Path(folder) / name, format="hugging_face")
            inputs = draw_inputs(model)
            outputs = reference_outputs(open_with_transformers(directory), inputs)
            record = {
                **describe(directory),
                "inputs": {key: array.tolist() for key, array in inputs.items()},
                "outputs": {key: _rounded(array) for key, array in outputs.items()},
            }
        (out / f"{name}.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")


def build(fields: dict[str, Any], dtype: str = "float32", seed: int = 0) -> tuple[nn.Module, Any]:
    """Make a model of a config.json with random weights.

    Args:
      fields: fields of config.json.
      dtype: type of the weights.
      seed: seed of the weights; each weight depends only on the seed and its path.

    Returns:
      `(model, params)`.
    """
    member, config = read_config(fields, CONFIG, "tiny")
    model = member.build(config)
    drawn = {
        path: jax.device_put(_draw(path, shape, seed).astype(jnp.dtype(dtype)))
        for path, shape in expected_shapes(model).items()
    }
    return model, nested(drawn)


def _draw(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw multiples of a power of two, which every type represents exactly."""
    rng = np.random.default_rng([seed, *path.encode()])
    if len(shape) > 1:
        scale = 2.0 ** round(1 - math.log2(shape[1]) / 2)
        return rng.integers(-96, 97, shape) / 64 * scale
    if "norm" in path and path.endswith("weight"):
        return rng.integers(32, 97, shape) / 64
    return rng.integers(-16, 17, shape) / 64


def draw_inputs(model: nn.Module, seed: int = 1) -> Arrays:
    """Return random inputs of a model, under transformers' argument names.

    Args:
      model: model with a small configuration.
      seed: seed of the inputs.

    Returns:
      Arrays by name; floats are multiples of 1/64.
    """
    rng, config = np.random.default_rng(seed), model.config

    def numbers(*shape: int) -> np.ndarray:
        return rng.integers(-96, 97, shape).astype(np.float32) / 64

    if isinstance(model, VisionEncoder):
        side = config.position_grid[0] * config.patch_size + 1
        return {"pixel_values": numbers(2, config.channels, side, side)}
    if isinstance(model, SpeechEncoder):
        return {"input_features": numbers(2, config.mel_bins, config.num_frames)}
    if not isinstance(model, MultimodalGLM):
        tokens = rng.integers(4, config.vocab_size, (2, 6))
        return {"input_ids": tokens, "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2])}
    text = rng.integers(4, 30, (2, 6))
    # A remote-code model opens as its decoder only.
    if config.speech is None and (config.vision is None or config.vision.norm == "layer"):
        return {"input_ids": text}
    if config.speech is not None:
        placeholders = np.full((2, config.speech.num_tokens), config.audio_token_id)
        inputs = {
            "input_features": numbers(2, config.speech.mel_bins, config.speech.num_frames),
            "input_features_mask": np.ones((2, config.speech.num_frames), np.int64),
        }
    else:
        vision = config.vision
        size = vision.patch_size * vision.merge_size
        images = [numbers(3 * size, 2 * size, vision.channels) for _ in range(2)]
        placeholders = np.full((2, 6), config.image_token_id)
        pixels, grids = to_patches(
            images, vision.patch_size, vision.temporal_patch_size, vision.merge_size
        )
        inputs = {"pixel_values": pixels, "image_grid_thw": grids}
    tokens = np.concatenate([text[:, :2], placeholders, text[:, 2:]], axis=1)
    if config.vision is not None:
        inputs["mm_token_type_ids"] = (tokens == config.image_token_id).astype(np.int64)
    return {"input_ids": tokens, **inputs}


def open_with_transformers(directory: Path) -> Any:
    """Open a directory in float32 with the class that its config.json names.

    Args:
      directory: directory of the checkpoint.

    Returns:
      The model.

    Raises:
      DataError: tensors are missing, unused (by a class that has code for them) or have wrong
        shapes.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    fields = json.loads((directory / CONFIG).read_text())
    name = fields["architectures"][0]
    whisper = importlib.import_module("transformers.models.whisper.modeling_whisper")
    kind = getattr(transformers, name, None) or getattr(whisper, name)
    model, loading = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    remote = "vision_config" in fields and fields["model_type"] == "glm"
    extra = [k for k in loading["unexpected_keys"] if not (remote and ".vision." in k)]
    for problem, keys in (
        ("missing", loading["missing_keys"]),
        ("unexpected", extra),
        ("misshapen", loading["mismatched_keys"]),
    ):
        if keys:
            raise DataError(f"{directory}: transformers finds {sorted(keys)[0]!r} {problem}")
    return model.eval()


def reference_outputs(model: Any, inputs: Arrays) -> Arrays:
    """Run a model of transformers.

    Args:
      model: model from `open_with_transformers`.
      inputs: inputs from `draw_inputs`.

    Returns:
      `logits`, or `hidden.final` and, if the model has it, `pooler_output`.
    """
    import torch

    with torch.no_grad():
        output = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    names = {"logits": "logits"}
    if getattr(output, "logits", None) is None:
        names = {"last_hidden_state": "hidden.final", "pooler_output": "pooler_output"}
    recorded = {ours: getattr(output, theirs, None) for theirs, ours in names.items()}
    return {name: value.numpy() for name, value in recorded.items() if value is not None}


def describe(directory: Path) -> dict[str, Any]:
    """Describe a Hugging Face directory with one file of weights.

    Args:
      directory: directory of the checkpoint.

    Returns:
      `config`, the content of config.json, and `tensors`: type, shape and SHA-256 by name.
    """
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {
        name: [info.dtype, list(info.shape), hashlib.sha256(file.read(name).tobytes()).hexdigest()]
        for name, info in sorted(file.tensors.items())
    }
    return {"config": json.loads((directory / CONFIG).read_text()), "tensors": tensors}


def _rounded(array: np.ndarray) -> list[Any]:
    return np.vectorize(lambda x: float(f"{x:.7g}"))(array).tolist()


if __name__ == "__main__":
    define_flags()
    launch(main)
