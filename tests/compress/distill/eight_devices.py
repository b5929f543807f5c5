"""Trains on 8 simulated devices and on one; run by test_sharded_training.py, prints JSON."""

import os

# Compiling takes most of the time, so the compiler optimises little.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.compress import IntermediateLosses, OnPolicy, TrainOptions, distill
from glm_edge.compress.distill import loop as training
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import sharding

DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
}
OPTIONS = {
    "alpha": 1.0,
    "intermediates": IntermediateLosses(hidden=1.0, attention=1.0),
    "on_policy": OnPolicy(share=0.5, prompt=6),
}
TRAIN = TrainOptions(steps=4, learning_rate=3e-3, accumulate=2, save_every=2)


def main(directory: str) -> None:
    student = built(0, **DECODER)
    teacher = built(1, **DECODER | {"num_layers": 2, "hidden_size": 64})
    rng = np.random.default_rng(0)
    data = [{"tokens": rng.integers(0, 64, (4, 12)).astype(np.int32)} for _ in range(3)]
    call = {"calibration": data, "rng": jax.random.key(0)}
    expected = distill(teacher, train=TRAIN, **OPTIONS)(*student, **call)

    mesh = jax.make_mesh((2, 4), ("data", "model"))
    rules = sharding.FULLY_SHARDED

    def spread(model, params):
        return model, sharding.shard(params, mesh, rules, model.config)

    spread_student, spread_teacher = spread(*student), spread(*teacher)
    transform = distill(
        spread_teacher, train=dataclasses.replace(TRAIN, state_dir=directory), **OPTIONS
    )
    step, states = training.apply_gradient, []

    def watched(*arguments):
        actual = step(*arguments)
        states.append(shares(actual[1]))
        return actual

    training.apply_gradient = watched
    with sharding.on(mesh, rules):
        actual = transform(*spread_student, **call)
        # As if killed after the state of step 4 and before the end.
        again = transform(*spread_student, **call)
    print(
        json.dumps(
            {
                "losses": [losses(report) for _, _, report in (expected, actual, again)],
                "error": error(actual[1], expected[1]),
                "same": error(again[1], actual[1]),
                "moved": error(expected[1], student[1]),
                "shares": shares(actual[1]),
                "moments": states[-1],
            }
        )
    )


def shares(tree) -> list[float]:
    """The part of each matrix that one device holds."""
    return [
        leaf.addressable_shards[0].data.size / leaf.size
        for leaf in jax.tree.leaves(tree)
        if leaf.ndim == 2
    ]


def built(seed: int, **decoder):
    model = MultimodalGLM(GLMConfig(name="text", decoder=DecoderConfig(**decoder)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        drawn = rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5
        return jnp.asarray(drawn + (leaf.ndim == 1), jnp.float32)

    return model, jax.tree.map(draw, shapes)


def losses(report) -> list[list[float]]:
    return [
        [point.loss, point.soft, point.hard, point.hidden, point.attention]
        for point in report.curve
    ]


def error(actual, expected) -> float:
    """Norm of what all parameters differ by."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return (
        sum(float(np.square(np.asarray(one) - np.asarray(other)).sum()) for one, other in pairs)
        ** 0.5
    )


if __name__ == "__main__":
    main(sys.argv[1])
