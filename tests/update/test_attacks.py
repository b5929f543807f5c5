"""Hostile repositories: mutated files, wrong keys, expired metadata."""

import json
import random
import shutil
from collections import Counter

import pytest

from glm_edge.errors import GlmEdgeError, UpdateError
from glm_edge.update import (
    Client,
    FolderTransport,
    Repository,
    create_repository,
    publish,
    read_keys,
)
from glm_edge.update.plan import pack_plan, parse_plan, plan_fields, unpack_plan
from glm_edge.update.repository import DAYS
from tests.update.conftest import contents, update


class Mutated(FolderTransport):
    """A folder, one of whose files has other bytes."""

    def __init__(self, folder, path, content):
        super().__init__(folder)
        self.path, self.content = path, content

    def read(self, path, start):
        if path == self.path:
            return start, iter([self.content[start:]])
        return super().read(path, start)


def mutate(draw, content):
    """Flip, cut, repeat, swap digits, or replace by other text."""
    data = bytearray(content)
    at = draw.randrange(len(data))
    kind = draw.randrange(6)
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[: draw.randrange(1, 200)]
    elif kind == 3:
        digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        if digits:
            data[draw.choice(digits)] = ord(draw.choice("0123456789"))
    elif kind == 4:
        data[:] = draw.choice(
            [b"[" * 50_000, b"{}", b"null", b'{"signed": {}}', b"\xff\xfe", b"9" * 999]
        )
    else:
        end = at + draw.randrange(1, 40)
        data[at:end] = draw.randbytes(end - at)
    return bytes(data)


def requests_of(client):
    """The files that an update asks for."""
    asked, read = [], client._transport.read

    def recording(path, start):
        start, chunks = read(path, start)
        asked.append(path)
        return start, chunks

    client._transport.read = recording
    update(client)
    return sorted(set(asked))


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_mutations_never_leave_a_mix(second, tmp_path, count):
    """Every mutation is refused by one error, or does not change the update."""
    draw, outcomes, lines = random.Random(0), Counter(), set()
    folder = second.repository.directory
    second.device("new")
    for name in ("phone", "new"):
        shutil.copytree(second.folder / name, tmp_path / name, symlinks=True)
    paths = {name: requests_of(second.device(name)) for name in ("phone", "new")}
    for index in range(count):
        name = ("phone", "new")[index % 2]
        shutil.rmtree(second.folder / name)
        shutil.copytree(tmp_path / name, second.folder / name, symlinks=True)
        path = draw.choice(paths[name])
        content = mutate(draw, (folder / path).read_bytes())
        device = second.device(name, Mutated(folder, path, content))
        try:
            if device.fetch().status == "ready":
                device.apply()
            outcomes["applied"] += 1
        except GlmEdgeError as error:
            outcomes[type(error).__name__] += 1
            lines.update(str(error).splitlines()[1:])
        release, model = device.state.current, device.current()
        assert release is None or contents(model) == second.model(release)
        assert release is not None or name == "new"
    # A changed digit may equal the old one, and spaces between JSON values do not count.
    assert outcomes["UpdateError"] > 0.9 * count
    assert set(outcomes) <= {"UpdateError", "applied"}
    assert not lines


def test_mutated_plans_are_refused_or_sound(second):
    """Plans beyond their signature: a publisher's mistake must not leave the directory."""
    draw, refused = random.Random(1), 0
    plan = unpack_plan(second.repository.target("deltas/1-2.plan"), "plan")
    text = json.dumps(plan_fields(plan)).encode()
    for _ in range(500):
        try:
            parsed = parse_plan(mutate(draw, text), "plan")
        except UpdateError:
            refused += 1
            continue
        assert all(".." not in file.path.split("/") for file in parsed.files)
    assert refused > 250


@pytest.mark.parametrize(
    "path", ["../a", "/etc/passwd", "a/../../b", "C:\\a", "a//b", "", "a\nb", "aux/.", "x" * 300]
)
def test_paths_outside_the_release_are_refused(second, refused, path):
    plan = unpack_plan(second.repository.target("releases/2.plan"), "plan")
    fields = plan_fields(plan)
    fields["files"][0]["path"] = path
    with refused("not a plain relative path"):
        parse_plan(json.dumps(fields).encode(), "plan")


def test_a_signed_plan_of_another_release_is_refused(second, refused):
    packed = second.repository.target("releases/1.plan")
    second.repository.publish(
        {"releases/2.plan": packed, "deltas/1-2.plan": packed}, second.signers
    )
    with refused("is a plan from None to 1"):
        second.device().fetch()


def test_a_decompression_bomb_is_refused(refused):
    zstandard = pytest.importorskip("zstandard")
    with refused("must declare at most"):
        unpack_plan(zstandard.ZstdCompressor().compress(bytes(1 << 26)), "plan")


def test_other_keys_are_refused(second, tmp_path, refused):
    other = create_repository(tmp_path / "other", tmp_path / "other_keys")
    publish(other, second.folder / "model1", read_keys([tmp_path / "other_keys"]), level=1)
    with refused("is not trusted"):
        Client(second.folder / "phone", FolderTransport(other.directory)).fetch()
    with refused("needs 1 of its keys, got 0"):
        second.repository.renew(read_keys([tmp_path / "other_keys"]))
    assert second.release_on("phone") == 1


def test_one_key_of_two_cannot_publish(second, tmp_path, refused):
    alone = tmp_path / "alone"
    shutil.copytree(second.folder / "keys", alone)
    (alone / "targets-2.pem").unlink()
    with refused("targets: needs 2 of its keys, got 1"):
        publish(second.repository, second.folder / "model1", read_keys([alone]), level=1)
    # The online key is enough to say that the newest release is still valid.
    roles = second.repository.renew(read_keys([alone]))
    assert roles == ["root", "snapshot", "timestamp"]
    assert contents(update(second.device())) == second.model(2)


def test_expired_metadata_is_refused_until_renewed(second, refused):
    second.repository.renew(second.signers, {**DAYS, "timestamp": -1})
    with refused("ExpiredMetadataError"):
        second.device().fetch()
    second.repository.renew(second.signers)
    assert contents(update(second.device())) == second.model(2)


def test_a_new_root_is_followed(second):
    """A device from before several renewals of the root follows their chain."""
    for _ in range(3):
        assert second.repository.renew(second.signers) == list(DAYS)
    assert contents(update(second.device())) == second.model(2)
    assert contents(update(second.device("new"))) == second.model(2)


def test_keys_stay_outside_of_the_repository(tmp_path, refused):
    with refused("inside the repository"):
        create_repository(tmp_path / "r", tmp_path / "r" / "keys")


def test_private_keys_are_private(second):
    modes = {path.stat().st_mode & 0o777 for path in (second.folder / "keys").glob("*.pem")}
    assert modes == {0o600}


@pytest.mark.parametrize(
    "pem", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_other_files_are_not_keys(tmp_path, refused, pem):
    (tmp_path / "a.pem").write_bytes(pem)
    with refused("is not an ed25519 private key"):
        read_keys([tmp_path])


def test_a_folder_that_is_not_a_repository(tmp_path, refused):
    with refused("is not a repository"):
        Repository(tmp_path).target_names()


def test_plans_round_trip(second):
    plan = unpack_plan(second.repository.target("deltas/1-2.plan"), "plan")
    assert unpack_plan(pack_plan(plan), "plan") == plan
    assert {s.method for _, _, s in plan.sections()} >= {"copy", "xor"}
