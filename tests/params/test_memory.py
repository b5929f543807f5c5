"""Compiled programs never hold two dense copies of a packed layer (rule 9)."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from glm_edge import params as boxes
from glm_edge.compress import quantize
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.models.multimodal import MultimodalGLM
from tests.tiny_models import init

CONFIG = GLMConfig(
    name="memory",
    decoder=DecoderConfig(
        vocab_size=256,
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=1024,
    ),
)
LARGEST_LAYER = 2 * 1024 * 256 * 4
FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def temporary_bytes() -> dict[str, int]:
    """Temporary memory of the compiled model for one row and for eight, and its dense size."""
    model, tokens = MultimodalGLM(CONFIG), jnp.zeros((1, 2), jnp.int32)
    params = init(model, tokens)["params"]
    model, params, _ = quantize.rtn("int4-g32")(model, params)
    run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
    results = {"dense": 4 * boxes.count(params)}
    for rows in (1, 8):
        compiled = run.lower(params, jnp.zeros((1, rows), jnp.int32)).compile()
        results[str(rows)] = compiled.memory_analysis().temp_size_in_bytes
    return results


# tests/kernels/test_matmul_kernel.py measures the products one by one.
@pytest.mark.slow
def test_temporary_memory_is_under_twice_the_largest_layer(optimized):
    # XLA reads the flag once, before jax is imported: hence a process of its own.
    environment = {**os.environ, "XLA_FLAGS": FLAG, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["dense"] > 10 * LARGEST_LAYER
    assert result["8"] < 2 * LARGEST_LAYER
    assert result["1"] < LARGEST_LAYER


if __name__ == "__main__":
    print(json.dumps(temporary_bytes()))
