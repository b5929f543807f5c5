"""The exceptions of glm_edge: one line that says what was wrong, where, and what would be right."""

import importlib
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
    "require",
]
MAX_MESSAGE = 2000


def __dir__() -> list[str]:
    return __all__


class GlmEdgeError(Exception):
    """Base of every error that glm_edge raises on purpose; its message is one line, and short."""

    def __str__(self) -> str:
        # A hostile file's names and values stand in messages.
        text = super().__str__()
        if len(text) > MAX_MESSAGE:
            text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(GlmEdgeError, ValueError):
    """A model configuration is unknown, incomplete or contradicts itself."""


class CheckpointError(GlmEdgeError, ValueError):
    """A checkpoint is missing, truncated, of another format, or does not fit the model."""


class DataError(GlmEdgeError, ValueError):
    """An input file or array (text, image, recording, digits) is not what it should be."""


class RecipeError(GlmEdgeError, ValueError):
    """A recipe names an unknown transform, an unfit option, or a pattern that matches nothing."""


class TrainingError(RecipeError):
    """A loss or a gradient became NaN or infinite.

    Attributes:
      step: at which it did, counted from one.
      params: of the student as they were before that step.
    """

    def __init__(self, message: str, step: int, params: Any) -> None:
        """Keeps what the last good step left."""
        super().__init__(message)
        self.step, self.params = step, params


class BoxError(GlmEdgeError, ValueError):
    """A boxed parameter was built or combined in a way that has no meaning."""


class ExportError(GlmEdgeError, ValueError):
    """A model or a format cannot be written as the target file."""


class OutputError(GlmEdgeError, OSError):
    """An output directory exists already or cannot be written."""


class MissingExtraError(GlmEdgeError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency.

    Args:
      module: dotted name of the module, such as `"tensorflow"`.
      extra: the extra of glm_edge that installs it, such as `"export"`.

    Returns:
      The imported module.

    Raises:
      MissingExtraError: the module is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is not installed ({error}); it comes with the extra {extra!r}: "
            f'pip install "glm_edge[{extra}]"'
        ) from error
