"""Fails on a public function without a complete signature, or with `Any` as a type in it.

    python .ci/check_public_types.py

Public are the names in `__all__` of the facade and of the packages that it names, with the public
methods of public classes. Exit status: 0 if all are complete, 1 otherwise.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# `**options: Any` are passed on.
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def public_names(module: ModuleType) -> list[str]:
    """List `__all__` of a module, or else what it defines itself."""
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return getattr(module, "__all__", defined)


def public_modules() -> list[ModuleType]:
    """List the facade and the packages that it names, those of a package included."""
    modules = [importlib.import_module("glm_edge")]
    for module in modules:
        for name in public_names(module):
            value = getattr(module, name)
            if inspect.ismodule(value) and value not in modules:
                modules.append(value)
    return modules


def public_functions() -> Iterator[tuple[str, Any]]:
    """Yield name and function of each public function and method of the package."""
    listed = set()
    for module in public_modules():
        for name in public_names(module):
            value = getattr(module, name)
            if id(value) in listed or not str(getattr(value, "__module__", "")).startswith(
                "glm_edge"
            ):
                continue
            listed.add(id(value))
            if inspect.isclass(value):
                label = f"{value.__module__}.{value.__qualname__}"
                yield from ((f"{label}.{n}", member) for n, member in public_methods(value))
            elif hasattr(value, "__qualname__"):
                yield f"{value.__module__}.{value.__qualname__}", value


def public_methods(value: type) -> Iterator[tuple[str, Any]]:
    """Yield the methods, properties and operators that a class defines itself."""
    for name, member in vars(value).items():
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, staticmethod | classmethod):
            member = member.__func__
        # Dataclasses write `__init__`, and flax `replace`, from fields with types.
        if (
            inspect.isfunction(member)
            and member.__module__ == value.__module__
            and (Path(member.__code__.co_filename).is_relative_to(ROOT))
        ):
            yield name, member


def faults(function: Any, is_method: bool) -> Iterator[str]:
    """Yield what a signature lacks."""
    signature = inspect.signature(inspect.unwrap(function))
    parameters = list(signature.parameters.values())
    if is_method and parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    for parameter in parameters:
        if parameter.annotation is inspect.Parameter.empty:
            yield f"parameter {parameter.name!r} has no type"
        elif is_any(parameter.annotation) and parameter.kind not in VARIADIC:
            yield f"parameter {parameter.name!r} is Any"
    result = signature.return_annotation
    if result is inspect.Signature.empty and function.__name__ != "__init__":
        yield "its result has no type"
    elif is_any(result):
        yield "it returns Any"


def is_any(annotation: Any) -> bool:
    """Test for a bare `Any`; parts of containers, such as leaves of trees, may be `Any`."""
    return annotation is Any or annotation == "Any"


def main() -> int:
    """Print each fault and return the exit status."""
    functions = dict(public_functions())
    lines = [
        f"{name}: {fault}"
        for name, function in sorted(functions.items())
        for fault in faults(function, "." in function.__qualname__)
    ]
    print("\n".join(lines) or f"{len(functions)} public functions have complete types")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
