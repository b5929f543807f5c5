"""Marks of parametrized tests."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(quick: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Mark cases as slow whose code a quick case runs too.

    Args:
      quick: function of a case that returns True for one of the default run.
      cases: the cases, a tuple for several arguments.
    """
    parameters = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        parameters.append(pytest.param(*values, marks=() if quick(case) else pytest.mark.slow))
    return parameters
