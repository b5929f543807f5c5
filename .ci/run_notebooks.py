"""Executes notebooks, and compares their headline numbers with the committed outputs.

    python .ci/run_notebooks.py [--write] NOTEBOOK ...

Every cell has to run. A cell tagged `headline` prints the numbers that the notebook is about; its
metadata `tolerance` is how far each may move from the committed one, relative to it. With --write
the outputs go into the notebooks instead. Exit status: 0 when all ran and agree, else 1.
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# Of pictures that are stored: screens and plots look the same with these.
COLORS = 256
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# A bar of progress redraws its line, and warnings name files of this machine.
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3"}


def execute(path: Path, timeout: int) -> nbformat.NotebookNode:
    """Run a copy of a notebook from its own folder."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=timeout, resources=folder).execute()
    return notebook


def printed(cell: nbformat.NotebookNode) -> str:
    """Join what a cell wrote to standard output."""
    streams = [output for output in cell.outputs if output.output_type == "stream"]
    return "".join(output.text for output in streams if output.name == "stdout")


def differences(committed: str, text: str, tolerance: float) -> list[str]:
    """List the lines whose words differ, or whose numbers moved further than the tolerance."""
    moved = []
    pairs = list(zip(committed.splitlines(), text.splitlines(), strict=False))
    if len(committed.splitlines()) != len(text.splitlines()) or not pairs:
        return [f"{text!r} instead of {committed!r}"]
    for before, after in pairs:
        values = [
            [float(number.replace(",", "")) for number in NUMBER.findall(line)]
            for line in (before, after)
        ]
        same = NUMBER.sub("", before) == NUMBER.sub("", after) and len(values[0]) == len(values[1])
        if not same or any(
            abs(new - old) > tolerance * abs(old) for old, new in zip(*values, strict=True)
        ):
            moved.append(f"{after!r} instead of {before!r}, tolerance {tolerance:g}")
    return moved


def compared(path: Path, notebook: nbformat.NotebookNode) -> list[str]:
    """Compare the headlines of an executed notebook with those of the committed file."""
    committed = nbformat.read(path, as_version=4)
    moved, headlines = [], 0
    for before, after in zip(committed.cells, notebook.cells, strict=True):
        if "headline" in after.metadata.get("tags", []):
            headlines += 1
            tolerance = after.metadata["tolerance"]
            moved += differences(printed(before), printed(after), tolerance)
    return moved if headlines else ["no cell is tagged headline"]


def smaller(png: str) -> str:
    """Encode a picture in base64 again, with a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    stream = io.BytesIO()
    picture.quantize(COLORS, kmeans=1, dither=Image.Dither.NONE).save(stream, "png", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def write(path: Path, notebook: nbformat.NotebookNode) -> None:
    """Write the outputs without standard error, times, and paths of this machine."""
    names = {str(ROOT), str(Path.home()), tempfile.gettempdir()} - {"/"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            texts = output if output.output_type == "stream" else output.get("data", {})
            if "image/png" in texts:
                texts["image/png"] = smaller(texts["image/png"])
            for kind in {"text", "text/plain", "text/markdown", "text/html"} & texts.keys():
                texts[kind] = texts[kind].replace(str(ROOT), ".")
                if any(name in texts[kind] for name in names):
                    sys.exit(f"{path}: an output names a folder of this machine: {texts[kind]}")
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def main() -> int:
    """Run the notebooks of the command line, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument("--timeout", type=int, default=900, help="seconds that a cell may take")
    arguments = parser.parse_args()
    os.environ.update(QUIET)
    failed = False
    for path in arguments.notebooks:
        try:
            notebook = execute(path, arguments.timeout)
        except CellExecutionError as error:
            failed = True
            print(f"{path}: {error}", file=sys.stderr)
            continue
        if arguments.write:
            write(path, notebook)
            continue
        for line in compared(path, notebook):
            failed = True
            print(f"{path}: {line}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
