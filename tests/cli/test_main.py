"""The command `glm-edge`: what it lists, runs and refuses, in one line and with which status."""

import importlib.metadata
import json
import tomllib
import zipfile
from pathlib import Path

import pytest
from absl import app, flags

import glm_edge as ge
from experiments import make_checkpoint
from glm_edge.cli import console, main
from glm_edge.cli.checkpoints import checkpoint_of
from glm_edge.errors import OutputError

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


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this process, and takes its flags away again."""
    before, values = set(flags.FLAGS), flags.FLAGS

    def start(function, argv):
        return function([argv[0], *values(list(argv))[1:]])

    def command(*arguments):
        try:
            main.main(["glm-edge", *map(str, arguments)])
        finally:
            for name in set(values) - before:
                delattr(values, name)
            values.unparse_flags()

    monkeypatch.setattr(app, "run", start)
    return command


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
        (["serve"], "there is no server yet"),
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
    assert checkpoint_of(None) == checkpoint_of("") == ge.shipped("nano")
    assert checkpoint_of(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("exists; pass overwrite=True", "exists; pass --overwrite"),
        ("needs calibration= batches", "needs --calibration batches"),
        ("pass without=['images', 'audio'].", "pass --without=images,audio."),
        ("seed=3, and where=None matches none", "--seed=3, and where=None matches none"),
        ("--seed=3 and x.seed=3", "--seed=3 and x.seed=3"),
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
