"""What the processors give for the inputs of a case without a model."""

from experiments.golden.cases import Arrays, Case
from glm_edge.errors import DataError


def process(case: Case, subcase: str) -> Arrays:
    raise DataError(f"{case.folder}: unclear")
