"""Recipes: transforms from JSON, and named recipes."""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_edge.compress import prune, quantize
from glm_edge.compress.distill.distill import distill
from glm_edge.compress.options import TrainOptions
from glm_edge.compress.recipe_versions import upgraded
from glm_edge.compress.transform import (
    CHAIN,
    VERSION,
    Transform,
    chain,
    registered,
    to_json,
)
from glm_edge.errors import RecipeError
from glm_edge.files import parse_json, read_json

__all__ = ["NAMED", "find", "named", "recipe_from_json", "to_json"]
MAX_TRANSFORMS = 1000


def __dir__() -> list[str]:
    return __all__


def recipe_from_json(source: str | Path) -> Transform:
    """Read a transform from JSON.

    Args:
      source: JSON text, the path of a JSON file, or the name of a recipe, see `named`.

    Returns:
      The transform.

    Raises:
      RecipeError: the file does not exist, is not a regular file or not JSON, exceeds a limit, or
        contains an unknown name or an invalid option.

    Example:
      >>> recipe_from_json('{"version": 1, "name": "quantize.rtn", "options": {"format": "int8"}}')
      quantize.rtn('int8-channel')
    """
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(
            f"a recipe is JSON text, a path or a name, not a {type(source).__name__}; names: "
            f"{', '.join(NAMED)}"
        )
    text = source if isinstance(source, str) else ""
    if text in NAMED:
        return named(text)
    if text.lstrip()[:1] in tuple('{["'):
        return _from_file(parse_json(text, "recipe", RecipeError), "recipe")
    try:
        return _from_file(read_json(source, RecipeError), str(source))
    except RecipeError as error:
        if _exists(source):
            raise
        raise RecipeError(
            f"{str(source)[:200]}: cannot read a recipe (no such file); pass JSON text, a JSON "
            f"file or one of: {', '.join(NAMED)}"
        ) from error


def _exists(source: str | os.PathLike) -> bool:
    try:
        return os.path.lexists(source)
    # The text contains a null character, or characters that a file name cannot contain.
    except (OSError, ValueError):
        return False


def named(name: str) -> Transform:
    """Return a recipe by its name.

    - `phone`: int4 in groups of 32 for the decoder, int8 per channel for all others.
    - `small`: int4 for the encoders too, except the layers that read pixels and sound.
    - `quickstart`: removes a quarter of the heads and 30 % of the neurons, heals by distillation,
      then quantizes as `small`.
    - `rtn_4bit`: like `phone`, with scales from the largest magnitude.
    - `gptq_4bit`, `gptq_3bit`, `gptq_2bit`: GPTQ in groups of 32 for the decoder, which needs
      calibration, and int8 per channel for all others.
    - `int8_float16_embeddings`: float16 for embeddings and the head, int8 per channel for all
      others.

    Args:
      name: name of the recipe.

    Returns:
      The recipe.

    Raises:
      RecipeError: no recipe has this name.
    """
    if name not in NAMED:
        raise RecipeError(f"unknown recipe {name!r}; known: {', '.join(NAMED)}")
    return NAMED[name]()


def find(name_or_path: str) -> Transform:
    """Return a named recipe, or read a JSON file.

    Args:
      name_or_path: name of a recipe, or path of a JSON file.

    Returns:
      The recipe.

    Raises:
      RecipeError: the argument is neither.
    """
    return named(name_or_path) if name_or_path in NAMED else recipe_from_json(name_or_path)


def _phone() -> Transform:
    return chain(
        quantize.rtn("int4-g32", where=r"^decoder/", scale="mse", fallback_bits=8),
        quantize.rtn("int8"),
    )


def _small() -> Transform:
    int4_paths = r"^decoder/|^vision/(?!patch/)|^speech/(?!conv1/)"
    return chain(
        quantize.rtn("int4-g32", where=int4_paths, scale="mse", fallback_bits=8),
        quantize.rtn("int8"),
    )


def _quickstart() -> Transform:
    return chain(
        prune.structured(heads=0.25, neurons=0.30, max_batches=24),
        distill(train=TrainOptions(steps=400, compute="bfloat16"), where=r"^(decoder|embed|head)/"),
        _small(),
    )


def _rtn_4bit() -> Transform:
    return chain(
        quantize.rtn("int4-g32", where="^decoder/", fallback_bits=8),
        quantize.rtn("int8"),
    )


def _gptq(format: str) -> Transform:
    decoder = quantize.gptq(format, where="^decoder/", fallback_bits=8)
    return chain(decoder, quantize.rtn("int8"))


def _int8_float16_embeddings() -> Transform:
    return chain(
        quantize.rtn("float16", where=r"(^|/)(embed|position|token_type)/weight|^head/"),
        quantize.rtn("int8", where=r"^(decoder|vision|speech)/"),
    )


NAMED: dict[str, Callable[[], Transform]] = {
    "phone": _phone,
    "small": _small,
    "quickstart": _quickstart,
    "rtn_4bit": _rtn_4bit,
    "gptq_4bit": functools.partial(_gptq, "int4-g32"),
    "gptq_3bit": functools.partial(_gptq, "int3-g32"),
    "gptq_2bit": functools.partial(_gptq, "int2-g32"),
    "int8_float16_embeddings": _int8_float16_embeddings,
}


def _from_file(fields: Any, where: str) -> Transform:
    """Read the outermost object, the only one with a version."""
    version = 0
    if isinstance(fields, dict):
        version = fields.get("version", 0)
        fields = {name: value for name, value in fields.items() if name != "version"}
    if type(version) is not int or not 0 <= version <= VERSION:
        raise RecipeError(
            f"{where}: version {version!r:.60} of a recipe is unknown; known are versions up to "
            f"{VERSION}"
        )
    return _from_object(fields, where, version)


def _from_object(fields: Any, where: str, version: int) -> Transform:
    if not isinstance(fields, dict) or set(fields) - {"name", "options"} or "name" not in fields:
        raise RecipeError(f'{where}: expected {{"name": …, "options": {{…}}}}')
    name, options = fields["name"], fields.get("options", {})
    if not isinstance(name, str) or not isinstance(options, dict):
        raise RecipeError(f"{where}: name must be a string and options an object")
    kind = registered(name)
    if name == CHAIN:
        if set(options) != {"transforms"} or not isinstance(options["transforms"], list):
            raise RecipeError(f"{where}: chain takes one option, a list of transforms")
        if len(options["transforms"]) > MAX_TRANSFORMS:
            raise RecipeError(f"{where}: a chain has at most {MAX_TRANSFORMS} transforms")
        return chain(*(_from_object(inner, where, version) for inner in options["transforms"]))
    options = upgraded(name, options, version)
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise RecipeError(
                f"{where}: {name} has no option {option!r}; known: {', '.join(known)}"
            )
    try:
        return kind(**options)
    except RecipeError:
        raise
    # Exceptions of a transform for options of wrong types.
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RecipeError(f"{where}: {name}: {error}") from error
