"""Fails on an import circle between files of `glm_edge`, and prints it.

Imports inside functions count; those of an `if TYPE_CHECKING:` block do not.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "glm_edge"


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports below a node that the running program executes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from import_statements(ast.Module([statement], []))
        else:
            yield from import_statements(child)


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of the package that a file imports."""
    imported = set()
    for statement in import_statements(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(statement, ast.Import):
            imported |= {alias.name for alias in statement.names}
        elif statement.module:
            for alias in statement.names:
                submodule = f"{statement.module}.{alias.name}"
                imported.add(submodule if submodule in modules else statement.module)
    return imported & modules - {module_name(path)}


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Yield one circle per strongly connected component of a graph (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in index:
                yield from visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            start = stack.index(module)
            component = stack[start:]
            del stack[start:]
            if len(component) > 1:
                yield circle_through(module, set(component), graph)

    for module in sorted(graph):
        if module not in index:
            yield from visit(module)


def circle_through(module: str, component: set[str], graph: dict[str, set[str]]) -> list[str]:
    """Return a shortest circle from a module back to it, within its component."""
    paths = [[module]]
    while True:
        path = paths.pop(0)
        for target in sorted(graph[path[-1]] & component):
            if target == module:
                return [*path, module]
            if target not in path:
                paths.append([*path, target])


def main() -> None:
    """Print the circles and fail if there are any."""
    files = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    modules = set(files)
    graph = {name: imported_modules(path, modules) for name, path in files.items()}
    refused = list(circles(graph))
    for circle in refused:
        print("import circle: " + " -> ".join(circle), file=sys.stderr)
    if refused:
        sys.exit(1)
    print(f"no import circle between {len(files)} files")


if __name__ == "__main__":
    main()
