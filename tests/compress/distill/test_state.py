"""Training that was killed goes on, and ends with the same bytes."""

import csv
import dataclasses
import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.checkpoint import safetensors
from glm_edge.compress import TrainOptions, distill
from glm_edge.compress.distill import state as training_state
from glm_edge.errors import CheckpointError, OutputError, RecipeError, TrainingError
from tests.tiny_models import init

STEPS = 11


class Bigram(nn.Module):
    """Predicts the next token from the last: compiles in no time."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(40)(nn.Embed(40, 8)(tokens))


def models():
    tokens = np.zeros((1, 2), np.int32)
    return Bigram(), *(init(Bigram(), tokens, seed=seed)["params"] for seed in range(2))


def data():
    rng = np.random.default_rng(0)
    return [{"tokens": rng.integers(0, 40, (2, 6)).astype(np.int32)} for _ in range(4)]


def train(state_dir=None, batches=None, progress=None, seed=3, **options):
    model, student, teacher = models()
    names = [field.name for field in dataclasses.fields(TrainOptions)]
    changes = {name: options.pop(name) for name in names if name in options}
    training = {"steps": STEPS, "save_every": 3, "accumulate": 2, **changes}
    if state_dir is not None:
        training["state_dir"] = str(state_dir)
    transform = distill(teacher=(model, teacher), train=TrainOptions(**training), **options)
    batches = data() if batches is None else batches
    rng = jax.random.key(seed)
    return transform(model, student, calibration=batches, rng=rng, progress=progress)[1:]


def bytes_of(params) -> dict[str, bytes]:
    return {name: np.asarray(a).tobytes() for name, a in boxes.to_flat(params)[0].items()}


def job(directory: Path, killed_at: int | None, in_write: bool):
    """What a child process runs; at the given call of the progress, or write, it kills itself."""
    calls = itertools.count(1)

    def fatal(*_):
        if next(calls) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if in_write:
        write = safetensors.write_safetensors

        def half(path, arrays, metadata=None):
            write(path, arrays, metadata)
            path.write_bytes(path.read_bytes()[:-100])
            fatal()
            write(path, arrays, metadata)

        training_state.write_safetensors = half
    params, report = train(directory / "state", progress=None if in_write else fatal)
    safetensors.write_safetensors(directory / "result.safetensors", boxes.to_flat(params)[0])
    (directory / "curve.txt").write_text(repr(report.curve))


def run_in_child(context, *arguments) -> int:
    child = context.Process(target=job, args=arguments)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.slow
def test_killed_training_ends_with_the_bytes_of_one_left_alone(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["glm_edge.compress"])
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run_in_child(context, tmp_path / "whole", None, False) == 0
    killed = tmp_path / "killed"
    # After step 5, when step 3 is saved; then while the state of step 9 is half written.
    assert run_in_child(context, killed, 1, False) == -signal.SIGKILL
    assert len((killed / "state" / "curve.csv").read_text().splitlines()) == 1 + 3
    assert run_in_child(context, killed, 2, True) == -signal.SIGKILL
    assert len((killed / "state" / "curve.csv").read_text().splitlines()) == 1 + 6
    assert not (killed / "result.safetensors").exists()
    assert run_in_child(context, killed, None, False) == 0
    for name in ("result.safetensors", "curve.txt", "state/curve.csv", "state/state.safetensors"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (killed / "state").iterdir()) == sorted(
        ["state.safetensors", "curve.csv", "job.json"]
    )


class StopError(Exception):
    """Raised in place of a kill."""


def stop(stage, done, total):
    raise StopError


def test_an_interrupted_run_goes_on_where_it_was_saved(tmp_path):
    expected, complete = train()
    with pytest.raises(StopError):
        train(tmp_path, progress=stop)
    read = []

    class Counted(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    actual, report = train(tmp_path, batches=Counted(data()))
    assert bytes_of(actual) == bytes_of(expected)
    assert report.curve == complete.curve
    # Steps 4 to 11 read two batches each; the third round begins half way through.
    assert len(read) <= 2 * (STEPS - 3) + 2
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [point.loss for point in complete.curve]
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))


def test_a_finished_run_is_not_repeated(tmp_path):
    expected, complete = train(tmp_path)
    # As if killed after the last state and before its curve.
    curve = (tmp_path / "curve.csv").read_text()
    (tmp_path / "curve.csv").write_text(curve[: len(curve) // 2])
    actual, report = train(tmp_path, progress=stop)
    assert (tmp_path / "curve.csv").read_text() == curve
    assert bytes_of(actual) == bytes_of(expected)
    assert report.curve == complete.curve


def test_how_often_states_are_saved_changes_nothing(tmp_path):
    with pytest.raises(StopError):
        train(tmp_path, progress=stop)
    assert bytes_of(train(tmp_path, save_every=1)[0]) == bytes_of(train()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 3.0}, "another recipe"),
        ({"accumulate": 1}, "another recipe"),
        ({"seed": 4}, "another rng"),
        ({"batches": data()[:3]}, "another calibration"),
    ],
)
def test_the_state_of_another_recipe_is_refused(tmp_path, change, message):
    with pytest.raises(StopError):
        train(tmp_path, progress=stop)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(OutputError, match=message):
        train(tmp_path, **change)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_damaged_state_is_refused(tmp_path):
    with pytest.raises(StopError):
        train(tmp_path, progress=stop)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        train(tmp_path)


def test_the_last_good_state_is_kept_when_the_loss_is_not_finite(tmp_path):
    class Poisoned:
        """Sound batches for three steps; no length, so in order."""

        def __iter__(self):
            for index, batch in enumerate(itertools.islice(itertools.cycle(data()), 12)):
                yield {**batch, "loss_mask": np.full((2, 6), np.nan if index == 7 else 1.0)}

    options = {"batches": Poisoned(), "save_every": 100}
    with pytest.raises(TrainingError, match="loss is nan at step 4") as caught:
        train(tmp_path, **options)
    stored = safetensors.SafetensorsFile(tmp_path / "state.safetensors")
    assert stored.read("losses").shape[0] == 3
    retained = stored.read("[0]['Embed_0']['embedding']")
    np.testing.assert_array_equal(retained, caught.value.params["Embed_0"]["embedding"])
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == 1 + 3


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(tmp_path / "file" / "state")
    with pytest.raises(RecipeError, match="save_every must be a whole number"):
        train(save_every=0)
