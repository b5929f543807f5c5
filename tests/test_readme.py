"""README's Python blocks: names that exist, and a run in order at small settings."""

import ast
import builtins
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import glm_edge as ge
from experiments import make_checkpoint
from glm_edge.compress.methods import to_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOWNLOADED = make_checkpoint.CONFIGS["glm_edge_1_5b"] | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# Every device that the block about several asks for, on the CPU.
DEVICES = "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"


def dotted(node: ast.AST) -> list[str] | None:
    """`["ge", "quantize", "rtn"]` of the expression `ge.quantize.rtn`."""
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_names_of_the_blocks_exist(block):
    for node in ast.walk(ast.parse(block)):
        names = dotted(node)
        if names and names[0] == "ge":
            found = ge
            for name in names[1:]:
                found = getattr(found, name)


def cheap(block: str) -> str:
    """The same block with a step of each training, and without what is not installed."""
    block = re.sub(r"\bsteps=\d+", "steps=1", block)
    if importlib.util.find_spec("litert_lm_builder") is None:
        block = re.sub(r"^ge\.export\.litertlm.*\n", "", block, flags=re.MULTILINE)
    if importlib.util.find_spec("ai_edge_litert") is None:
        block = re.sub(
            r"^.*(ge\.export|compatibility|exported\b).*\n", "", block, flags=re.MULTILINE
        )
    return block


def test_cheap_without_litert_leaves_no_name_undefined(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tree = ast.parse("".join(map(cheap, BLOCKS)))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {*dir(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    assert {node.id for node in names} - bound == set()


def test_table_of_methods_is_the_one_of_the_code():
    assert f"\n{to_markdown()}\n" in README


@pytest.mark.slow
def test_blocks_run_in_order(tmp_path):
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ge.shipped("nano"), tmp_path / "path" / "to" / "checkpoint")
    tokenizer = json.loads((ge.shipped("nano") / "tokenizer.json").read_text())
    ids = [*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])]
    downloaded = tmp_path / "glm-edge-1.5b-chat"
    fields = DOWNLOADED | {"vocab_size": max(ids) + 1, "eos_token_id": [0], "pad_token_id": 0}
    make_checkpoint.write(fields, str(downloaded), 1e9, seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (ge.shipped("nano") / name).exists():
            shutil.copy(ge.shipped("nano") / name, downloaded)
    program = "".join(f"print('block {i}', flush=True)\n{cheap(b)}" for i, b in enumerate(BLOCKS))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": DEVICES}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    assert (tmp_path / "nano-small" / "tokenizer.json").is_file()
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    assert re.findall(r"^block (\d+)$", done.stdout, re.MULTILINE) == [
        str(index) for index in range(len(BLOCKS))
    ]


def test_address_is_one_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("urls", {}).get("Repository", "") == ge.REPOSITORY_URL
    cloned = set(re.findall(r"git clone (\S+)", README))
    assert cloned == ({ge.REPOSITORY_URL} if ge.REPOSITORY_URL else set())


def test_commands_of_readme_are_listed():
    from glm_edge.cli.main import COMMANDS

    named = {
        name for group in re.findall(r"glm-edge ([a-z|]+)", README) for name in group.split("|")
    }
    assert {"compress", "export"} <= named <= set(COMMANDS)
