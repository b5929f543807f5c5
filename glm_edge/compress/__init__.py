"""Compression: parameter transforms, chains of them, recipes and reports."""

from glm_edge.compress import prune, quantize
from glm_edge.compress import recipes as recipes
from glm_edge.compress.calibration import Calibration
from glm_edge.compress.distill.distill import distill
from glm_edge.compress.distill.options import IntermediateLosses, OnPolicy
from glm_edge.compress.options import TrainOptions
from glm_edge.compress.progress import ProgressLine
from glm_edge.compress.quantize.options import SolverOptions
from glm_edge.compress.quantize.qat import Trainable
from glm_edge.compress.recipes import recipe_from_json, to_json
from glm_edge.compress.reparameterize import reparameterize
from glm_edge.compress.report import Point, Report, Row
from glm_edge.compress.transform import ARRAYS, Context, Transform, chain, register

__all__ = [
    "ARRAYS",
    "Calibration",
    "Context",
    "IntermediateLosses",
    "OnPolicy",
    "Point",
    "ProgressLine",
    "Report",
    "Row",
    "SolverOptions",
    "TrainOptions",
    "Trainable",
    "Transform",
    "chain",
    "distill",
    "prune",
    "quantize",
    "recipe_from_json",
    "recipes",
    "register",
    "reparameterize",
    "to_json",
]


def __dir__() -> list[str]:
    return __all__
