"""Publishes signed releases of a model, and updates a device from them.

    python -m glm_edge.update ACTION --flag=value ...

On the server's side, in a folder that any static HTTP server can serve:

    init      --repository=DIR --keys=DIR                   make a repository and its keys
    publish   --repository=DIR --keys=DIRS --source=PATH    sign a release; --percentage=5: a canary
    promote   --repository=DIR --keys=DIRS --percentage=50  offer the canary to more devices
    halt      --repository=DIR --keys=DIRS                  withdraw the canary
    renew     --repository=DIR --keys=DIRS                  sign again before the metadata expires

On a device:

    fetch     --device_dir=DIR --url=URL --root=FILE        download; --root only the first time
    apply     --device_dir=DIR --url=URL                    verify, and switch to the new release
    rollback  --device_dir=DIR --url=URL --reason=TEXT      return to the release before

The root of trust for --root is metadata/1.root.json of the repository. --keys takes several
folders, since root and targets need two signatures, which two people can hold.
"""

import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from glm_edge import update
from glm_edge.cli.console import progress
from glm_edge.errors import UpdateError
from glm_edge.files import read_bytes
from glm_edge.update.client import MAX_ROOT_BYTES
from glm_edge.update.delta import LEVEL
from glm_edge.update.publish import DELTAS
from glm_edge.update.transport import TIMEOUT_S, HttpTransport

FLAGS = flags.FLAGS

flags.disclaim_key_flags()


def define_flags() -> None:
    """Define the command's flags."""
    flags.DEFINE_string("repository", None, "Folder of the repository.")
    flags.DEFINE_list("keys", [], "Folders of private keys; init makes the first one.")
    flags.DEFINE_string("source", None, "Checkpoint directory or file to publish.")
    flags.DEFINE_float("percentage", 100.0, "Devices that receive the release, in percent.")
    flags.DEFINE_integer("deltas", DELTAS, "Earlier releases to write deltas from.", 0)
    flags.DEFINE_integer("level", LEVEL, "Level of zstd.", 1, 22)
    flags.DEFINE_string("device_dir", None, "Directory of the device.")
    flags.DEFINE_string("url", None, "Address of the repository.")
    flags.DEFINE_string("root", None, "Root metadata that came with the device.")
    flags.DEFINE_string("device", None, "Id of the device; default: stored, at first random.")
    flags.DEFINE_string("report_url", None, "Address that receives health reports by POST.")
    flags.DEFINE_string("check_command", None, "Command that tests the model, whose path follows.")
    flags.DEFINE_string("reason", "unhealthy", "Reason of the rollback, for the report.")
    flags.DEFINE_float("timeout_s", TIMEOUT_S, "Longest wait for the server in seconds.", 0.1)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
      argv: the program's name and the action.
    """
    if len(argv) != 2 or argv[1] not in ACTIONS:
        raise app.UsageError(f"name one action: {', '.join(ACTIONS)}")
    ACTIONS[argv[1]]()


def _path(name: str) -> Path:
    value = FLAGS[name].value
    if not value:
        raise app.UsageError(f"pass --{name}")
    return Path(value)


def _repository() -> tuple[update.Repository, list[Any]]:
    if not FLAGS.keys:
        raise app.UsageError("pass --keys")
    repository = update.Repository(_path("repository"))
    return repository, update.read_keys(map(Path, FLAGS.keys))


def _init() -> None:
    if len(FLAGS.keys) != 1:
        raise app.UsageError("pass one folder for --keys")
    repository = update.create_repository(_path("repository"), FLAGS.keys[0])
    print(f"repository {repository.directory}, keys in {FLAGS.keys[0]}; move one key of each pair")


def _publish() -> None:
    repository, signers = _repository()
    result = update.publish(
        repository,
        _path("source"),
        signers,
        percentage=FLAGS.percentage,
        deltas=FLAGS.deltas,
        level=FLAGS.level,
        progress=progress(),
    )
    print(f"release {result.release}: {result.bytes} bytes, complete download {result.complete}")
    for base, size in result.deltas.items():
        print(f"from release {base}: {size} bytes")


def _promote() -> None:
    repository, signers = _repository()
    print(repository.promote(FLAGS.percentage, signers))


def _halt() -> None:
    repository, signers = _repository()
    print(repository.halt(signers))


def _renew() -> None:
    repository, signers = _repository()
    print(f"renewed: {', '.join(repository.renew(signers))}")


def _client() -> update.Client:
    root = read_bytes(FLAGS.root, MAX_ROOT_BYTES, UpdateError) if FLAGS.root else None
    return update.Client(
        _path("device_dir"),
        HttpTransport(str(FLAGS.url or ""), FLAGS.timeout_s),
        root=root,
        device=FLAGS.device,
        report_url=FLAGS.report_url,
    )


def _fetch() -> None:
    fetched = _client().fetch()
    print(f"{fetched.status}: release {fetched.release}, {fetched.downloaded} bytes downloaded")


def _apply() -> None:
    print(_client().apply(_check if FLAGS.check_command else None))


def _check(model: Path) -> None:
    command = [*shlex.split(FLAGS.check_command), str(model)]
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise UpdateError(f"check_command={command[0]}: cannot be run: {error}") from error
    if status:
        raise UpdateError(f"check_command={command[0]}: ended with status {status}")


def _rollback() -> None:
    print(_client().rollback(FLAGS.reason))


ACTIONS: dict[str, Callable[[], None]] = {
    "init": _init,
    "publish": _publish,
    "promote": _promote,
    "halt": _halt,
    "renew": _renew,
    "fetch": _fetch,
    "apply": _apply,
    "rollback": _rollback,
}
