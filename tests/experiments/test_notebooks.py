"""The notebooks: cells that compile, names that exist, and no need of a network."""

import ast
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest

import glm_edge as ge

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
ONLINE = re.compile(r"https?://|urlopen|snapshot_download|hf_hub|requests\.|wget|curl|%pip|!git")
COLAB = 'if "google.colab" in sys.modules:'
# Modules of experiments/ that load or generate data: texts, screens, questions, recordings.
DATA = {
    "experiments.common.calibration_data",
    "experiments.common.eval_data",
    "experiments.common.tap_items",
    "experiments.common.text_domains",
    "experiments.nano.batches",
    "experiments.nano.phone_screens.actions",
    "experiments.nano.phone_screens.dialogues",
    "experiments.nano.phone_screens.digits",
    "experiments.nano.phone_screens.generator",
    "experiments.nano.phone_screens.glyphs",
    "experiments.nano.phone_screens.instructions",
    "experiments.nano.phone_screens.painting",
    "experiments.nano.phone_screens.speech",
    "experiments.nano.phone_screens.wordings",
}


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def parsed(cell: str) -> ast.Module:
    # Lines that only IPython understands.
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell, flags=re.MULTILINE))


def load_a_glm(*names: str) -> dict:
    """Defines the functions of these names, with the imports of their cells."""
    space = {"Path": Path}
    for cell in code_cells(ROOT / "colab" / "load_a_glm.ipynb"):
        body = parsed(cell).body
        if any(isinstance(node, ast.FunctionDef) and node.name in names for node in body):
            retained = [
                n for n in body if isinstance(n, ast.FunctionDef | ast.Import | ast.ImportFrom)
            ]
            exec(compile(ast.Module(retained, []), "cell", "exec"), space)
    return space


def test_all_notebooks_are_there():
    assert [notebook.stem for notebook in NOTEBOOKS] == [
        "load_a_glm",
        "prune_and_distill",
        "quantize",
        "quickstart",
        "serve",
        "to_the_phone",
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_committed_executed(notebook):
    fields = json.loads(notebook.read_text())
    assert (fields["nbformat"], fields["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in fields["cells"]}) == len(fields["cells"])
    code = [cell for cell in fields["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert "error" not in {output["output_type"] for output in cell["outputs"]}
        compile(parsed("".join(cell["source"])), notebook.name, "exec")
    headlines = [cell for cell in code if "headline" in cell["metadata"].get("tags", [])]
    assert headlines
    for cell in headlines:
        assert 0 <= cell["metadata"]["tolerance"] <= 0.1
        assert cell["outputs"]


@pytest.mark.parametrize(
    ("committed", "text", "tolerance", "moved"),
    [
        ("loss: 2.00\n", "loss: 2.09\n", 0.05, 0),
        ("loss: 2.00\n", "loss: 2.11\n", 0.05, 1),
        ("1,000 bytes\n", "1,001 bytes\n", 0.0, 1),
        ("loss: 2.00\n", "cost: 2.00\n", 0.05, 1),
        ("loss: 2.00\n", "loss: 2.00\nmore\n", 0.05, 1),
        ("loss: 2.00\n", "loss: nan\n", 0.05, 1),
        ("", "", 0.05, 1),
    ],
)
def test_headline_numbers_are_compared(committed, text, tolerance, moved):
    path = ROOT / ".ci" / "run_notebooks.py"
    specification = importlib.util.spec_from_file_location("run_notebooks", path)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert len(script.differences(committed, text, tolerance)) == moved


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_imported_exists(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(parsed(cell)):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.module.partition(".")[0] not in ("glm_edge", "experiments"):
                continue
            module = importlib.import_module(node.module)
            for name in node.names:
                result = hasattr(module, name.name)
                assert result or importlib.import_module(f"{node.module}.{name.name}")


def experiments_modules(tree: ast.Module) -> set[str]:
    """Lists the modules of experiments/ that code imports, inside functions as well."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = (f"{node.module}.{alias.name}" for alias in node.names)
            names |= {name if is_module(name) else node.module for name in members}
    return {name for name in names if name.partition(".")[0] == "experiments"}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_only_data_of_experiments(notebook):
    modules = set().union(*(experiments_modules(parsed(cell)) for cell in code_cells(notebook)))
    assert modules <= DATA


@pytest.mark.parametrize("module", sorted(DATA))
def test_data_modules_import_only_data(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert experiments_modules(ast.parse(path.read_text())) <= DATA


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("from experiments.common import tap_items, figures", {"tap_items", "figures"}),
        ("import experiments.quickstart as job", {"quickstart"}),
        ("def f():\n    from experiments.quickstart import cells", {"quickstart"}),
        ("import glm_edge\nfrom glm_edge.cli import loss", set()),
    ],
)
def test_experiments_modules_of_code(code, modules):
    names = {name.rpartition(".")[2] for name in experiments_modules(ast.parse(code))}
    assert names == modules


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_colab_and_a_named_repository_need_a_network(notebook):
    for cell in code_cells(notebook):
        lines = cell.splitlines()
        online = [number for number, line in enumerate(lines) if ONLINE.search(line)]
        if not online:
            continue
        if COLAB in lines:
            assert all(lines[number].startswith("    ") for number in online)
            continue
        guarded = {
            number
            for node in ast.walk(parsed(cell))
            if isinstance(node, ast.Try)
            for number in range(node.lineno, node.handlers[0].lineno)
        }
        assert guarded.issuperset(number + 1 for number in online)


def first_cell(notebook: Path) -> tuple[str, str]:
    """The line of extras, and the rest of the first cell."""
    extras, others = code_cells(notebook)[0].split("\n", 1)
    return extras, others


def test_first_cells_are_the_same_but_for_extras():
    cells = [first_cell(notebook) for notebook in NOTEBOOKS]
    assert len({others for _, others in cells}) == 1
    assert all(re.fullmatch(r'EXTRAS = "[a-z,]+"', extras) for extras, _ in cells)
    assert f'REPOSITORY = "{ge.REPOSITORY_URL}"  # @param' in cells[0][1]


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Runs a first cell as Colab would, in a folder of uploads, and returns its commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(repository="", clones=True):
        ran = []

        def command(line):
            ran.append(line)
            if line.startswith("git clone") and clones:
                write_checkout(tmp_path / line.split()[-1])

        extras, others = first_cell(NOTEBOOKS[0])
        others = others.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
        lines = re.sub(r"^(\s*)[%!](.*)$", r"\1command(f'\2')", others, flags=re.MULTILINE)
        exec(f"{extras}\n{lines}", {"command": command})
        return ran

    return run


def write_checkout(root: Path) -> None:
    (root / "experiments").mkdir(parents=True)
    (root / "experiments" / "__init__.py").touch()


def upload(folder: Path, files: dict[str, str]) -> None:
    """Writes archives: of a checkout in a folder `…glm…`, of another folder, or broken ones."""
    for name, inside in files.items():
        if inside == "broken":
            (folder / name).write_bytes(b"no archive at all")
            continue
        with tempfile.TemporaryDirectory() as made:
            packed = Path(made, "packed", inside)
            write_checkout(packed) if "glm" in packed.name else packed.mkdir(parents=True)
            kind = next(k for k, ends, _ in shutil.get_unpack_formats() if name.endswith((*ends,)))
            shutil.move(shutil.make_archive(f"{made}/a", kind, f"{made}/packed"), folder / name)


WHEEL = "glm_edge-0.1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("uploads", "repository", "source"),
    [
        ({}, "", "."),
        ({"glm_edge-main (1).zip": "glm_edge-main"}, "", "glm_edge_archive/glm_edge-main"),
        ({"main.zip": "glm_edge-main"}, "", "glm_edge_archive/glm_edge-main"),
        ({"GLM_Edge-main.zip": "GLM/glm_edge"}, "", "glm_edge_archive/GLM/glm_edge"),
        ({"a.tgz": "a/b/glm"}, "https://host/x", "glm_edge_archive/a/b/glm"),
        ({"a.tar.xz": "glm"}, "", "glm_edge_archive/glm"),
        ({"a.tar.bz2": "glm", WHEEL: "broken"}, "", "glm_edge_archive/glm"),
        ({"a.zip": "broken", "b.tar.gz": "glm"}, "", "glm_edge_archive/glm"),
        ({"a.zip": "other", "b.tar": "glm"}, "", "glm_edge_archive/glm"),
        ({WHEEL: "broken"}, "https://host/x", "glm_edge_checkout"),
        ({"a.zip": "broken"}, "https://host/x", "glm_edge_checkout"),
    ],
)
def test_colab_installs_what_is_there(uploads, repository, source, colab, tmp_path, capsys):
    upload(tmp_path, uploads)
    if source == ".":
        write_checkout(tmp_path)
    ran = colab(repository)
    installs = [line for line in ran if line.startswith("pip")]
    assert installs == [f'pip install -q -e "{tmp_path / source}[data,plot]"']
    assert sys.path[0] == str(tmp_path / source)
    # Nothing is downloaded where the repository was uploaded, and nothing twice.
    assert len(ran) - 1 == (source == "glm_edge_checkout")
    assert f"glm_edge {ge.__version__} of {Path(ge.__file__).parent}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uploads", "told"),
    [
        ({}, "there is no archive"),
        ({WHEEL: "broken"}, rf"there is {WHEEL} \(a wheel holds no experiments/\)"),
        ({"notes.zip": "other"}, r"there is notes\.zip \(holds no experiments/__init__\.py\)"),
        ({"a.tar.gz": "broken"}, r"there is a\.tar\.gz \(ReadError: [^\n]+\)"),
    ],
)
def test_colab_without_the_repository_says_what_lies_there(uploads, told, colab, tmp_path):
    upload(tmp_path, uploads)
    with pytest.raises(FileNotFoundError, match=f"upload an archive of the repository.*{told}$"):
        colab()
    assert not (tmp_path / "glm_edge_archive").exists()


def test_colab_says_that_a_clone_failed(colab):
    with pytest.raises(FileNotFoundError, match=r"https://host/x \(git clone gave no"):
        colab("https://host/x", clones=False)


def test_notebooks_import_what_users_may():
    for notebook in NOTEBOOKS:
        text = "\n".join(code_cells(notebook))
        assert "experiments" in text.partition("import glm_edge")[2], "cell 1 asks for experiments/"
        assert "compress.transform" not in text
        assert ".run(" not in text
        assert "import_module" not in text


def test_a_checkpoint_is_found_without_a_network(monkeypatch, tmp_path):
    asked = []

    def refuse(address, timeout):
        asked.append((address, timeout))
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    find = load_a_glm("answers", "find_checkpoint")["find_checkpoint"]
    assert find("") == ge.shipped("nano")
    assert find(str(tmp_path)) == tmp_path
    assert not asked
    assert find("nobody/nothing") == ge.shipped("nano")
    # None where huggingface_hub is not installed.
    assert all(timeout <= 5 for _, timeout in asked)


def test_what_is_counted_and_heard_lies_in_the_clone():
    [counting] = [c for c in code_cells(ROOT / "colab" / "load_a_glm.ipynb") if "PUBLISHED" in c]
    names = re.findall(r'^    "([^"]+)": [\d_]+,$', counting, flags=re.MULTILINE)
    assert len(names) >= 9
    for name in names:
        assert (ROOT / "tests" / "checkpoint" / "published" / f"{name}.json").is_file()
    samples, rate = ge.preprocess.load_wav(ROOT / "colab" / "press_seven.wav")
    assert (rate, len(samples)) == (8000, 8760)


def test_commands_that_write_a_bundle_verify_it():
    text = "".join(notebook.read_text() for notebook in NOTEBOOKS)
    commands = re.findall(r"experiments\.export [^\n]*--format=litertlm.*", text)
    assert len(commands) >= 2
    assert all("--verify" in command for command in commands)
