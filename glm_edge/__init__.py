"""glm_edge: compress a multimodal GLM in JAX, measure the loss, and export an on-device file.

import glm_edge as ge

model, params = ge.load("path/to/checkpoint")
recipe = ge.chain(
    ge.prune.structured(heads=0.25, neurons=0.30),
    ge.quantize.rtn("int4-g32", where=r"decoder/.*"),
)
model, params, report = recipe(model, params, calibration=batches, rng=key)
ge.export.tflite(model, params, "phone.tflite").verify()
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # The names of `__getattr__`, for type checkers and editors. A function that shares its
    # module's name is imported from that module, because type checkers resolve
    # `package.name` to the module.
    from glm_edge import checkpoint as checkpoint
    from glm_edge import compress as compress
    from glm_edge import configs as configs
    from glm_edge import device as device
    from glm_edge import errors as errors
    from glm_edge import export as export
    from glm_edge import generate as generate
    from glm_edge import params as params
    from glm_edge import preprocess as preprocess
    from glm_edge.checkpoint import build as build
    from glm_edge.checkpoint import load_tokenizer as load_tokenizer
    from glm_edge.checkpoint import save as save
    from glm_edge.checkpoint import shipped as shipped
    from glm_edge.checkpoint.load import load as load
    from glm_edge.compress import Calibration as Calibration
    from glm_edge.compress import ProgressLine as ProgressLine
    from glm_edge.compress import Report as Report
    from glm_edge.compress import TrainOptions as TrainOptions
    from glm_edge.compress import Transform as Transform
    from glm_edge.compress import chain as chain
    from glm_edge.compress import cost as cost
    from glm_edge.compress import prune as prune
    from glm_edge.compress import quantize as quantize
    from glm_edge.compress import recipe_from_json as recipe_from_json
    from glm_edge.compress import recipes as recipes
    from glm_edge.compress import to_json as to_json
    from glm_edge.compress.allocate.plan import plan as plan
    from glm_edge.compress.distill.distill import distill as distill
    from glm_edge.compress.layerwise.stream import compress_checkpoint as compress_checkpoint
    from glm_edge.compress.reparameterize import reparameterize as reparameterize
    from glm_edge.configs import GLMConfig as GLMConfig
    from glm_edge.configs import preset as preset
    from glm_edge.generate import chat as chat
    from glm_edge.models.multimodal import MultimodalGLM as MultimodalGLM
    from glm_edge.preprocess import Processor as Processor

__version__ = "0.1.0"
# Address of the published repository, empty until it is published. README.md, the notebooks and
# pyproject.toml contain the same address.
REPOSITORY_URL = ""

_WHERE = {
    "Calibration": "glm_edge.compress",
    "GLMConfig": "glm_edge.configs",
    "MultimodalGLM": "glm_edge.models.multimodal",
    "Processor": "glm_edge.preprocess",
    "ProgressLine": "glm_edge.compress",
    "Report": "glm_edge.compress",
    "TrainOptions": "glm_edge.compress",
    "Transform": "glm_edge.compress",
    "build": "glm_edge.checkpoint",
    "chat": "glm_edge.generate",
    "chain": "glm_edge.compress",
    "compress_checkpoint": "glm_edge.compress.layerwise.stream",
    "distill": "glm_edge.compress",
    "load": "glm_edge.checkpoint",
    "plan": "glm_edge.compress.allocate.plan",
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
    "compress": "glm_edge.compress",
    "configs": "glm_edge.configs",
    "cost": "glm_edge.compress.cost",
    "device": "glm_edge.device",
    "errors": "glm_edge.errors",
    "export": "glm_edge.export",
    "generate": "glm_edge.generate",
    "params": "glm_edge.params",
    "preprocess": "glm_edge.preprocess",
    "prune": "glm_edge.compress.prune",
    "quantize": "glm_edge.compress.quantize",
    "recipes": "glm_edge.compress.recipes",
}

__all__ = sorted([*_WHERE, *_MODULES, "REPOSITORY_URL", "__version__"])


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(_MODULES[name])
        if name in _WHERE:
            return getattr(importlib.import_module(_WHERE[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
