"""README and the guides beside packages: Python runs, links lead somewhere, numbers are logged."""

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
from experiments.golden import make_checkpoint
from glm_edge.compress.methods import to_markdown
from tests.gguf_writer import tiny_metadata, tiny_tensors, write_gguf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"
# Each guide runs by itself, from the first block to the last.
GUIDES = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md",
        "glm_edge/compress/README.md",
        "glm_edge/export/README.md",
        "glm_edge/checkpoint/README.md",
        "glm_edge/device/README.md",
        "BUILD.md",
    )
}
DOCUMENTS = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "glm_edge").rglob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
        *(ROOT / "tests").rglob("*.md"),
    )
)


def blocks_of(guide: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDES[guide], re.DOTALL)


BLOCKS = [(guide, block) for guide in GUIDES for block in blocks_of(guide)]
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


@pytest.mark.parametrize(("guide", "block"), BLOCKS, ids=range(len(BLOCKS)))
def test_names_of_the_blocks_exist(guide, block):
    for node in ast.walk(ast.parse(block)):
        names = dotted(node)
        if names and names[0] == "ge":
            value = ge
            for name in names[1:]:
                assert hasattr(value, name), ".".join(names)
                value = getattr(value, name)


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


@pytest.mark.parametrize("guide", GUIDES)
def test_cheap_without_litert_leaves_no_name_undefined(guide, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tree = ast.parse("".join(map(cheap, blocks_of(guide))))
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
    assert f"\n{to_markdown()}\n" in GUIDES["glm_edge/compress/README.md"]


def test_guides_hold_every_topic():
    # 15 lines for a newcomer, each package's guide, and the worked examples of contributing.
    assert [len(blocks_of(guide)) for guide in GUIDES] == [1, 7, 3, 3, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_blocks_run_in_order(guide, tmp_path):
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
    write_gguf(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf", tiny_metadata(), tiny_tensors())
    blocks = blocks_of(guide)
    program = "".join(f"print('block {i}', flush=True)\n{cheap(b)}" for i, b in enumerate(blocks))
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
    written = {"README.md": "nano-small", "glm_edge/checkpoint/README.md": "copy"}.get(guide)
    assert written is None or (tmp_path / written / "tokenizer.json").is_file()
    assert re.findall(r"^block (\d+)$", done.stdout, re.MULTILINE) == [
        str(index) for index in range(len(blocks))
    ]


def test_readme_is_read_in_a_minute():
    assert len(README.splitlines()) <= 150
    (block,) = blocks_of("README.md")
    assert len(block.splitlines()) <= 16


def test_worked_examples_are_short():
    examples = re.findall(r"```(?:python|diff)\n(.*?)```", GUIDES["BUILD.md"], re.DOTALL)
    assert len(examples) == 3
    assert all(len(example.splitlines()) <= 20 for example in examples)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_documents_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_documents_name_modules_that_exist(path):
    if path.name == "CHANGELOG.md" or (path.parent.name == "tables" and path.name != "README.md"):
        pytest.skip("a record of commands of their time")
    for name in re.findall(r"python -m (experiments[\w.]*)", path.read_text()):
        if "NAME" in name:
            continue
        assert importlib.util.find_spec(name.rstrip(".")), name


def load_log(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def test_numbers_of_the_table_are_those_of_the_logs():
    quality = {row["method"]: row for row in load_log("bench_quality.json")["rows"]}
    pruning = {row["method"]: row for row in load_log("bench_pruning.json")["rows"]}
    export = load_log("bench_export.json")
    decoded = {row["engine"]: row for row in export["results"]["decode 128"]}
    loaded = load_log("bench_load.json")["readers"]
    expected = []
    for method in (
        "glm_edge gptq int8-channel",
        "qwix gptq int8-channel",
        "glm_edge gptq int4-g32",
        "gptqmodel gptq int4-g32 act-order mse",
        "glm_edge gptq int3-g32",
        "gptqmodel gptq int3-g32 act-order mse",
        "glm_edge gptq int2-g32 extreme",
        "llama.cpp IQ2_S imatrix",
    ):
        row = quality[method]
        link = "(experiments/results/bench_quality.json)"
        loss = f"[{row['kl_text']:.2g}, {100 * row['increase']:+.2f} %]"
        expected.append(f"{loss}{link} at {row['packed_bits']:.2f} bits")
    for method in ("glm_edge sparsegpt 50 %, uniform", "SparseGPT 50 %"):
        expected.append(f"[{100 * pruning[method]['increase']:+.1f} %]")
    for method in ("glm_edge sparsegpt 2:4", "SparseGPT 2:4"):
        expected.append(f"[{100 * pruning[method]['increase']:+.1f} %]")
    for engine in ("LiteRT int8", "llama.cpp Q8_0", "LiteRT int4", "llama.cpp Q4_0"):
        rate, size = (
            decoded[engine]["tokens_per_second"][1],
            export["engines"][engine]["file_bytes"],
        )
        link = "(experiments/results/bench_export.json)"
        expected.append(f"[{rate:.3g}]{link}, {size / 1e6:.0f} MB")
    expected.append(f"[{loaded['glm_edge']['seconds']:.2f} s]")
    expected.append(f"[{min(r['seconds'] for n, r in loaded.items() if n != 'glm_edge'):.2f} s]")
    screens = load_log("nano_1000_screens.json")
    sizes = {row["stage"]: row["bytes"] / 1e6 for row in screens["rows"]}
    expected.append(f"[{sizes['quantized']:.1f} of {sizes['dense']:.1f} MB]")
    lost = screens["run"]["tap_loss"]["written"]
    expected.append(f"[{100 * lost['value']:.1f} points]")
    expected.append(f"(95 % interval {100 * lost['low']:.1f} to {100 * lost['high']:.1f})")
    seconds = {run["tool"]: run["seconds"] for run in load_log("bench_gptq.json")["runs"]}
    expected.append(f"[{seconds['gptq']:.0f} s where GPTQModel takes {seconds['GPTQModel']:.0f}]")
    prefill = load_log("bench_decode_bfloat16.json")["results"][0]
    ours, theirs = prefill["ours_ms"] / 1e3, prefill["transformers_ms"] / 1e3
    expected.append(f"[{ours:.2f} s where transformers takes {theirs:.2f}]")
    table = README.partition("## Results")[2].partition("## Documentation")[0]
    assert [text for text in expected if text not in table] == []
    rows = [line for line in table.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) == 10
    assert all(len(re.findall(r"\]\(experiments/results/\w+\.json\)", row)) == 2 for row in rows)


def test_address_is_one_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("urls", {}).get("Repository", "") == ge.REPOSITORY_URL
    cloned = set(re.findall(r"git clone (\S+)", "".join(GUIDES.values())))
    assert cloned == ({ge.REPOSITORY_URL} if ge.REPOSITORY_URL else set())


def test_commands_of_readme_are_listed():
    from glm_edge.cli.main import COMMANDS

    named = {
        name for group in re.findall(r"glm-edge ([a-z|]+)", README) for name in group.split("|")
    }
    assert {"compress", "export"} <= named <= set(COMMANDS)
