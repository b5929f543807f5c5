"""Updates of a device, from publishing to rolling back."""

import dataclasses
import resource
import shutil
import signal

import numpy as np
import pytest

from glm_edge.errors import OutputError, UpdateError
from glm_edge.update import FolderTransport, publish
from tests.update.conftest import contents, update


def test_a_delta_installs_the_published_bytes(second):
    transport = FolderTransport(second.repository.directory)
    client = second.device(transport=transport)
    fetched = client.fetch()
    assert (fetched.status, fetched.release) == ("ready", 2)
    assert contents(client.current()) == second.model(1)
    assert contents(client.apply()) == second.model(2)
    complete = sum(len(content) for content in second.model(2).values())
    # 2 % of the packed values changed.
    assert 0 < fetched.downloaded < complete / 8
    assert client.fetch().status == "current"


def test_a_new_device_installs_the_complete_release(second):
    assert contents(update(second.device("new"))) == second.model(2)


def test_a_damaged_installation_is_repaired(second):
    client = second.device()
    path = client.current() / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert contents(update(client)) == second.model(2)


def test_damage_between_fetch_and_apply_keeps_the_old_release(second):
    client = second.device()
    client.fetch()
    for path in (client.directory / "objects").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UpdateError, match="the download is damaged; fetch again"):
        client.apply()
    assert second.release_on("phone") == 1
    assert contents(update(client)) == second.model(2)


def test_rollback_returns_and_skips(second):
    client = second.device()
    update(client)
    assert contents(client.rollback("answers are wrong")) == second.model(1)
    assert client.fetch().status == "skipped"
    with pytest.raises(UpdateError, match="no previous release"):
        client.rollback("again")


def test_a_failed_check_keeps_the_old_release(second):
    client = second.device()
    client.fetch()

    def check(path):
        assert contents(path) == second.model(2)
        raise UpdateError("loss is 9.1")

    with pytest.raises(UpdateError, match=r"failed its check: loss is 9\.1"):
        client.apply(check)
    assert second.release_on("phone") == 1
    assert client.fetch().status == "skipped"


def test_one_file_with_an_insertion(first, tmp_path):
    """A file without a table of tensors is split by content, so an insertion stays local."""
    draw = np.random.default_rng(0)
    data = draw.integers(0, 256, 6 << 20, dtype=np.uint8).tobytes()
    old, new = tmp_path / "old.tflite", tmp_path / "new.tflite"
    old.write_bytes(data)
    new.write_bytes(data[: 3 << 20] + b"inserted" + data[3 << 20 :])
    publish(first.repository, old, first.signers, level=1)
    client = first.device()
    assert update(client).read_bytes() == old.read_bytes()
    result = publish(first.repository, new, first.signers, level=1, deltas=1)
    assert result.deltas[2] < 10_000
    path = update(client)
    assert path.name == "new.tflite"
    assert path.read_bytes() == new.read_bytes()


def test_a_full_disk_keeps_the_old_release(second, monkeypatch):
    client = second.device()
    client.fetch()
    usage = shutil.disk_usage(second.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="make room"):
        client.apply()
    monkeypatch.undo()
    assert second.release_on("phone") == 1
    assert contents(client.apply()) == second.model(2)


def test_one_file_with_changes_everywhere(first, tmp_path):
    """Changed bytes move the boundaries of chunks, and the old bytes still correspond."""
    draw = np.random.default_rng(0)
    old = draw.integers(0, 256, 5 << 20, dtype=np.uint8)
    new = np.where(draw.random(old.size) < 0.01, old ^ 1, old)
    paths = [tmp_path / "old.litertlm", tmp_path / "new.litertlm"]
    for path, data in zip(paths, (old, new), strict=True):
        path.write_bytes(data.tobytes())
        result = publish(first.repository, path, first.signers, level=3, deltas=1)
    # One changed byte of 100 has an entropy of 0.08 bits per byte, the byte itself 8.
    assert result.deltas[2] < result.complete / 20
    assert update(first.device()).read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("limit", [200, 3000, 20_000])
def test_writes_that_fail_keep_the_old_release(second, limit):
    """The system refuses bytes beyond a limit, in the middle of any file, as a full disk does."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    client = second.device()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(OutputError, match="cannot be written"):
            update(client)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert second.release_on("phone") == 1
    assert contents(update(client)) == second.model(2)


def test_a_device_without_a_delta_reuses_equal_sections(first):
    publish(first.repository, first.folder / "model2", first.signers, level=3, deltas=0)
    changed = {"config.json", "model.safetensors"}
    fetched = first.device().fetch()
    new = first.device("new").fetch()
    assert {
        name for name in first.model(1) if first.model(1)[name] != first.model(2)[name]
    } == changed
    # The embedding and the tokenizer are installed.
    assert 0 < fetched.downloaded < new.downloaded / 1.5
    assert contents(first.device().apply()) == first.model(2)


def test_a_clock_set_back_is_refused(second, refused):
    now = second.device().state.clock
    client = second.device(clock=lambda: now - 86400)
    with refused("the clock is 86400 s behind"):
        client.fetch()
    assert second.release_on("phone") == 1


def test_a_new_directory_needs_a_root(second, refused):
    with refused("pass root="):
        second.device("new", root=None)


@pytest.mark.parametrize("field", ["current", "skipped", "device", "clock"])
def test_a_damaged_state_is_refused(second, refused, field):
    client = second.device()
    path = client.directory / "state.json"
    text = path.read_text().replace(f'"{field}": ', f'"{field}": {{"a": 1}}, "x": ')
    path.write_text(text)
    with refused("not the state of a device"):
        client.fetch()


def test_state_is_immutable(second):
    with pytest.raises(dataclasses.FrozenInstanceError):
        second.device().state.current = 2
