"""glm_edge: compress a multimodal GLM in JAX, measure what that cost, and write the phone's file.

import glm_edge as ge

model, params = ge.load("path/to/checkpoint")
recipe = ge.chain(
    ge.prune.structured(heads=0.25, neurons=0.30),
    ge.quantize.rtn(bits=4, group_size=32, where=r"decoder/.*"),
)
model, params, report = recipe(model, params, calibration=batches, rng=key)
ge.export.tflite(model, params, "phone.tflite").verify()
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Calibration": "glm_edge.compress",
    "GLMConfig": "glm_edge.configs",
    "MultimodalGLM": "glm_edge.models.multimodal",
    "Processor": "glm_edge.preprocess",
    "build": "glm_edge.checkpoint",
    "chain": "glm_edge.compress",
    "compress_checkpoint": "glm_edge.compress.stream",
    "distill": "glm_edge.compress",
    "load": "glm_edge.checkpoint",
    "plan": "glm_edge.compress.plan",
    "preset": "glm_edge.configs",
    "load_tokenizer": "glm_edge.checkpoint",
    "recipe_from_json": "glm_edge.compress",
    "reparameterize": "glm_edge.compress",
    "save": "glm_edge.checkpoint",
    "shipped": "glm_edge.checkpoint",
    "to_json": "glm_edge.compress",
}
_MODULES = {
    "checkpoint": "glm_edge.checkpoint",
    "configs": "glm_edge.configs",
    "cost": "glm_edge.compress.cost",
    "errors": "glm_edge.errors",
    "export": "glm_edge.export",
    "generate": "glm_edge.generate",
    "params": "glm_edge.params",
    "preprocess": "glm_edge.preprocess",
    "prune": "glm_edge.compress.prune",
    "quantize": "glm_edge.compress.quantize",
    "recipes": "glm_edge.compress.recipe",
}

__all__ = sorted([*_WHERE, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
