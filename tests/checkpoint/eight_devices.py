"""Compares 8 simulated devices with one; run by test_sharded_load.py, prints JSON.

The argument is an empty directory for the checkpoints.
"""

import os

# Compiling takes most of the time, so the compiler optimises little.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import glm_edge as ge
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import DecoderConfig, GLMConfig, VisionConfig
from glm_edge.generate import generate
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import sharding
from glm_edge.params.tree import nested

IMAGE = 5
DECODER = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "intermediate_size": 256,
}
TOWER = VisionConfig(
    image_size=(16, 16),
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    intermediate_size=64,
    projector_size=128,
    patch_size=4,
    patch_stride=4,
    position_grid=(4, 4),
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(9, 64, (4, 16)).astype(np.int32)


def main(directory: Path) -> None:
    results = {"text": [], "images": [], "quantized": []}
    text = GLMConfig(name="text", decoder=DecoderConfig(**DECODER), eos_token_ids=(1,))
    compare(results["text"], write(text, directory / "text", "float32"), {})
    results["gradients"] = gradients(directory / "text")
    fields = DECODER | {
        "tie_embeddings": False,
        "sandwich_norm": True,
        "attention_bias": True,
        "mrope_section": (1, 1, 2),
    }
    images = GLMConfig(
        name="images", decoder=DecoderConfig(**fields), vision=TOWER, image_token_id=IMAGE
    )
    TOKENS[:, 2:6] = IMAGE
    sizes = ((16, 16), (16, 8), (8, 16), (16, 32))
    pixels = [RNG.normal(size=(*size, 3)).astype(np.float32) for size in sizes]
    bfloat16 = write(images, directory / "images", "bfloat16")
    compare(results["images"], bfloat16, {"images": pixels})
    low_bits = ge.chain(ge.quantize.rtn("int4-g32", where="mlp|o_proj"), ge.quantize.rtn("int8"))
    model, params, _ = low_bits(*ge.load(directory / "text"))
    ge.save(model, params, directory / "quantized")
    compare(results["quantized"], directory / "quantized", {})
    ge.save(model, params, directory / "orbax", format="orbax")
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    restored = ge.params.to_flat(ge.load(directory / "orbax", mesh=mesh)[1])[0]
    results["orbax"] = [
        bool((np.asarray(restored[name]) == np.asarray(array)).all())
        and len(restored[name].sharding.device_set) == 8
        for name, array in ge.params.to_flat(params)[0].items()
    ]
    print(json.dumps(results))


def write(config: GLMConfig, directory: Path, dtype: str) -> Path:
    """Writes a Hugging Face directory with random weights."""
    model, params = MultimodalGLM(config), {}
    for path, shape in expected_shapes(model).items():
        values = RNG.normal(size=shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        params[path] = jnp.asarray(values + path.endswith("norm/weight"), dtype)
    return ge.save(model, nested(params), directory, format="hugging_face")


def compare(actual: list, directory: Path, inputs: dict) -> None:
    """Logits and the share that one device holds of each matrix, and tokens on the first mesh."""
    model, params = ge.load(directory)
    expected, tokens = logits_of(model, params, inputs), generated(model, params, inputs)
    for shape in ((2, 4), (1, 8)):
        mesh = jax.make_mesh(shape, ("data", "model"))
        _, params = ge.load(directory, mesh=mesh)
        with sharding.on(mesh):
            logits = logits_of(model, params, inputs)
            same = None if actual else generated(model, params, inputs)
        arrays = ge.params.to_flat(params)[0]
        actual.append(
            {
                "mesh": shape,
                "error": error(logits, expected),
                "tokens": [tokens, same],
                "spec": str(logits.sharding.spec),
                "shares": {
                    name: array.addressable_shards[0].data.nbytes / array.nbytes
                    for name, array in arrays.items()
                    if array.ndim == 2
                },
            }
        )


def logits_of(model, params, inputs: dict) -> jax.Array:
    return jax.jit(model.apply)({"params": params}, TOKENS, **inputs)[0]


def generated(model, params, inputs: dict) -> list[list[int]]:
    return generate(model, params, {"tokens": TOKENS, **inputs}, max_new_tokens=4).tokens.tolist()


def gradients(directory: Path) -> dict:
    """Loss and gradients of one step with everything cut over both axes of the mesh."""
    model, params = ge.load(directory)

    @jax.jit
    def step(params, tokens):
        def loss(params):
            logits, _ = model.apply({"params": params}, tokens[:, :-1])
            scores = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
            return -scores.mean()

        return jax.value_and_grad(loss)(params)

    loss, expected = step(params, TOKENS)
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    _, params = ge.load(directory, mesh=mesh, rules=sharding.FULLY_SHARDED)
    with sharding.on(mesh, sharding.FULLY_SHARDED):
        sharded_loss, actual = step(params, TOKENS)
    errors = jax.tree.map(error, actual, expected)
    return {
        "loss": [float(loss), float(sharded_loss)],
        "error": max(jax.tree.leaves(errors)),
        "share": params["embed"]["weight"].addressable_shards[0].data.nbytes
        / params["embed"]["weight"].nbytes,
    }


def error(actual: jax.Array, expected: jax.Array) -> float:
    """Largest difference over the largest magnitude."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
