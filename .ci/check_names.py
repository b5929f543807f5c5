"""Rejects vague names, which do not describe the content of a variable.

    python .ci/check_names.py FOLDER_OR_FILE ...

BUILD.md has the list under Style. Exit status: 0 without such a name, 1 with one.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

VAGUE = frozenset(
    [
        "found",
        "held",
        "met",
        "own",
        "here",
        "said",
        "meant",
        "kept",
        "whole",
        "left",
        "rest",
        "place",
        "given",
        "seen",
        "what",
        "ways",
    ]
)


def bound_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node binds."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.alias) and node.asname:
        yield node.asname
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name


def vague_names(source: str) -> list[tuple[int, str]]:
    """List line and name of each vague name that a source binds."""
    tree = ast.parse(source)
    bound = [
        (getattr(node, "lineno", 0), name) for node in ast.walk(tree) for name in bound_names(node)
    ]
    return sorted((line, name) for line, name in bound if name.strip("_").lower() in VAGUE)


def python_files(path: Path) -> list[Path]:
    """List a file itself, or the Python files under a folder."""
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def main(paths: list[str]) -> int:
    """Print each vague name in the files and folders, and return the exit status."""
    lines = [
        f"{path}:{line}: {name!r} names nothing; use a noun for its content"
        for argument in paths
        for path in python_files(Path(argument))
        for line, name in vague_names(path.read_text(encoding="utf-8"))
    ]
    print("\n".join(lines) or f"no vague names in {', '.join(paths)}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
