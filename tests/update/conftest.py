"""A repository with two releases of a small model, and devices."""

import shutil

import numpy as np
import pytest

from glm_edge.checkpoint.safetensors import write_safetensors
from glm_edge.errors import UpdateError

pytest.importorskip("tuf")
pytest.importorskip("zstandard")

from glm_edge.update import (
    Client,
    FolderTransport,
    Repository,
    create_repository,
    publish,
    read_keys,
)


def write_model(folder, seed):
    """A checkpoint whose packed weights and scales change with the seed, and whose rest stays."""
    folder.mkdir(parents=True)
    fixed, changing = np.random.default_rng(99), np.random.default_rng(seed)
    packed = fixed.integers(0, 256, (64, 512), dtype=np.uint8)
    flips = changing.random(packed.shape) < 0.02
    arrays = {
        "embed": fixed.standard_normal((256, 32)).astype(np.float32),
        "layers/0/data": np.where(flips, packed ^ 1, packed).astype(np.uint8),
        "layers/0/scale": (fixed.random(64) + 1e-4 * changing.random(64)).astype(np.float32),
    }
    write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(f'{{"seed": {seed}}}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("unchanged words " * 50)
    return folder


def contents(path):
    """Bytes by relative path, or of one file."""
    if path.is_file():
        return path.read_bytes()
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


class World:
    """A repository, its keys, its models by release, and new devices."""

    def __init__(self, folder):
        self.folder = folder
        self.repository = Repository(folder / "repository")

    @property
    def signers(self):
        return read_keys([self.folder / "keys"])

    def model(self, release):
        return contents(self.folder / f"model{release}")

    def device(self, name="phone", transport=None, **options):
        transport = transport or FolderTransport(self.repository.directory)
        options.setdefault("root", self.repository.root)
        return Client(self.folder / name, transport, **options)

    def release_on(self, name):
        """The release that a device has, by its bytes alone; a mix fails."""
        client = Client(self.folder / name, FolderTransport(self.folder))
        path = client.current()
        return next(r for r in (1, 2) if contents(path) == self.model(r))


def update(client):
    status = client.fetch().status
    assert status == "ready"
    return client.apply()


@pytest.fixture(scope="session")
def first_world(tmp_path_factory):
    """Release 1 published and installed on `phone`, release 2 ready to publish."""
    folder = tmp_path_factory.mktemp("world")
    create_repository(folder / "repository", folder / "keys")
    for release in (1, 2):
        write_model(folder / f"model{release}", release)
    world = World(folder)
    publish(world.repository, folder / "model1", world.signers, level=3)
    update(world.device())
    return folder


@pytest.fixture(scope="session")
def second_world(first_world, tmp_path_factory):
    """Release 2 published, release 1 on `phone`."""
    folder = tmp_path_factory.mktemp("second") / "world"
    shutil.copytree(first_world, folder, symlinks=True)
    world = World(folder)
    publish(world.repository, folder / "model2", world.signers, level=3)
    return folder


@pytest.fixture
def first(first_world, tmp_path):
    shutil.copytree(first_world, tmp_path / "world", symlinks=True)
    return World(tmp_path / "world")


@pytest.fixture
def second(second_world, tmp_path):
    shutil.copytree(second_world, tmp_path / "world", symlinks=True)
    return World(tmp_path / "world")


@pytest.fixture
def refused():
    """Checks that a call raises UpdateError with a message."""
    return lambda message: pytest.raises(UpdateError, match=message)
