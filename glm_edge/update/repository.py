"""The server's side: signed metadata of The Update Framework in a folder of static files."""

import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_edge.errors import UpdateError, require
from glm_edge.files import read_bytes
from glm_edge.update.disk import disk_errors
from glm_edge.update.keys import KEYS_PER_ROLE, create_keys
from glm_edge.update.rollout import Channel, channel_from_json, channel_json, check_percentage
from glm_edge.update.trust import MAX_TARGET_BYTES
from glm_edge.writers import DirectoryLock, write_whole

CHANNEL = "channel.json"
# The short life of a timestamp bounds how long a server can hide a release.
DAYS = {"root": 365, "targets": 365, "snapshot": 30, "timestamp": 7}


class Repository:
    """A folder that any static HTTP server can serve.

    `metadata/` has the signed metadata, `targets/` the signed plans and the channel, `objects/` the
    bytes of releases by hash.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a repository.

        Args:
          directory: folder made by `create_repository`. Each method raises UpdateError if it is not
            one.
        """
        self.directory = Path(directory)
        self._api = require("tuf.api.metadata", extra="update")

    @property
    def _metadata(self) -> Path:
        return self.directory / "metadata"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the repository.

        Raises:
          UpdateError: the folder does not exist.
          OutputError: another process is changing it, or the disk cannot be written.
        """
        if not self.directory.is_dir():
            raise UpdateError(f"{self.directory}: is not a repository; make one with init")
        with disk_errors(self.directory):
            # A method that changes the channel calls another one that also locks.
            lock = DirectoryLock(self.directory, self.directory, again=True)
            try:
                yield
            finally:
                lock.release()

    @property
    def root(self) -> bytes:
        """The first root metadata, which comes with each device."""
        return read_bytes(self._metadata / "1.root.json", MAX_TARGET_BYTES, UpdateError)

    @property
    def channel(self) -> Channel:
        """The releases on offer."""
        return channel_from_json(self.target(CHANNEL), CHANNEL)

    def target_names(self) -> list[str]:
        """Return the names of the signed files."""
        return sorted(self._load_all()["targets"].signed.targets)

    def target(self, name: str) -> bytes:
        """Read a signed file.

        Args:
          name: name of the target.

        Returns:
          Its bytes.

        Raises:
          UpdateError: the metadata does not list it, or the file is missing or damaged.
        """
        info = self._load_all()["targets"].signed.targets.get(name)
        if info is None:
            raise UpdateError(f"{self.directory}: has no {name}")
        content = read_bytes(self._target_path(info), MAX_TARGET_BYTES, UpdateError)
        with _checked(name):
            info.verify_length_and_hashes(content)
        return content

    def publish(self, targets: Mapping[str, bytes], signers: Sequence[Any]) -> None:
        """Sign files and make them visible.

        Args:
          targets: bytes by name; existing names are replaced.
          signers: enough keys for targets, snapshot and timestamp.

        Raises:
          UpdateError: keys are missing.
          OutputError: a file cannot be written.
        """
        with self.locked():
            metadata = self._load_all()
            for role in ("targets", "snapshot", "timestamp"):
                self._signers_of(metadata["root"], role, signers)
            for name, content in targets.items():
                info = self._api.TargetFile.from_data(name, content, ["sha256"])
                metadata["targets"].signed.targets[name] = info
                _write(self._target_path(info), content)
            self._sign(metadata, ("targets", "snapshot", "timestamp"), signers, DAYS)

    def renew(self, signers: Sequence[Any], days: Mapping[str, int] = DAYS) -> list[str]:
        """Sign metadata again, with new times of expiry.

        Args:
          signers: keys; roles without enough of them keep their time of expiry.
          days: days until expiry by role.

        Returns:
          The renewed roles.

        Raises:
          UpdateError: the keys of snapshot and timestamp are missing.
          OutputError: a file cannot be written.
        """
        with self.locked():
            metadata = self._load_all()
            roles = []
            for role in DAYS:
                try:
                    self._signers_of(metadata["root"], role, signers)
                except UpdateError:
                    if role in ("snapshot", "timestamp"):
                        raise
                    continue
                roles.append(role)
            self._sign(metadata, roles, signers, days)
            return roles

    def promote(self, percentage: float, signers: Sequence[Any]) -> Channel:
        """Offer the candidate to more devices; 100 percent makes it the stable release.

        Args:
          percentage: part of the devices, 0 to 100.
          signers: enough keys for targets, snapshot and timestamp.

        Returns:
          The new channel.

        Raises:
          UpdateError: there is no candidate, or the percentage would shrink.
        """
        check_percentage(percentage)
        with self.locked():
            channel = self.channel
            if channel.candidate is None:
                raise UpdateError(f"{self.directory}: has no candidate to promote")
            if percentage < channel.percentage:
                raise UpdateError(
                    f"percentage={percentage}: is below {channel.percentage}; devices keep what "
                    "they have, so use halt"
                )
            if percentage == 100:
                channel = Channel(stable=channel.candidate)
            else:
                channel = Channel(channel.stable, channel.candidate, percentage)
            self.publish({CHANNEL: channel_json(channel)}, signers)
            return channel

    def halt(self, signers: Sequence[Any]) -> Channel:
        """Withdraw the candidate; devices that have it return to the stable release.

        Args:
          signers: enough keys for targets, snapshot and timestamp.

        Returns:
          The new channel.

        Raises:
          UpdateError: there is no candidate.
        """
        with self.locked():
            channel = self.channel
            if channel.candidate is None:
                raise UpdateError(f"{self.directory}: has no candidate to halt")
            channel = Channel(stable=channel.stable)
            self.publish({CHANNEL: channel_json(channel)}, signers)
            return channel

    def _target_path(self, info: Any) -> Path:
        # The name that a client asks for under consistent snapshots: HASH.NAME in its folder.
        folder, _, name = info.path.rpartition("/")
        return self.directory / "targets" / folder / f"{info.hashes['sha256']}.{name}"

    def _load_all(self) -> dict[str, Any]:
        roots = [int(path.name.split(".")[0]) for path in self._metadata.glob("*.root.json")]
        if not roots:
            raise UpdateError(f"{self.directory}: is not a repository; make one with init")
        timestamp = self._load("timestamp.json")
        snapshot = self._load(f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
        targets = self._load(f"{snapshot.signed.meta['targets.json'].version}.targets.json")
        return {
            "root": self._load(f"{max(roots)}.root.json"),
            "targets": targets,
            "snapshot": snapshot,
            "timestamp": timestamp,
        }

    def _load(self, name: str) -> Any:
        content = read_bytes(self._metadata / name, MAX_TARGET_BYTES, UpdateError)
        with _checked(name):
            return self._api.Metadata.from_bytes(content)

    def _signers_of(self, root: Any, role: str, signers: Sequence[Any]) -> list[Any]:
        described = root.signed.roles[role]
        usable = {
            signer.public_key.keyid: signer
            for signer in signers
            if signer.public_key.keyid in described.keyids
        }
        if len(usable) < described.threshold:
            raise UpdateError(
                f"{role}: needs {described.threshold} of its keys, got {len(usable)}; add their "
                "folders to keys="
            )
        return list(usable.values())

    def _sign(
        self,
        metadata: dict[str, Any],
        roles: Sequence[str],
        signers: Sequence[Any],
        days: Mapping[str, int],
    ) -> None:
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        # In this order, so that a client never sees a version that is not complete.
        for role in roles:
            signed = metadata[role].signed
            signed.version += 1
            signed.expires = now + datetime.timedelta(days=days[role])
            if role == "snapshot":
                version = metadata["targets"].signed.version
                signed.meta["targets.json"] = self._api.MetaFile(version)
            if role == "timestamp":
                version = metadata["snapshot"].signed.version
                signed.snapshot_meta = self._api.MetaFile(version)
            self._write_signed(metadata, role, signers)

    def _write_signed(self, metadata: dict[str, Any], role: str, signers: Sequence[Any]) -> None:
        entry = metadata[role]
        entry.signatures.clear()
        for signer in self._signers_of(metadata["root"], role, signers):
            entry.sign(signer, append=True)
        prefix = "" if role == "timestamp" else f"{entry.signed.version}."
        _write(self._metadata / f"{prefix}{role}.json", entry.to_bytes())


def create_repository(directory: str | Path, keys: str | Path) -> Repository:
    """Create an empty repository and its keys.

    Root and targets need two signatures; one online key signs snapshot and timestamp.

    Args:
      directory: new or empty folder of the repository.
      keys: new or empty folder of the private keys, outside of the repository.

    Returns:
      The repository.

    Raises:
      UpdateError: a folder is in use, or the keys would be served.
      OutputError: a file cannot be written.
    """
    directory, keys = Path(directory), Path(keys)
    if directory.is_dir() and any(directory.iterdir()):
        raise UpdateError(f"{directory}: is not empty; choose another folder")
    if keys.resolve().is_relative_to(directory.resolve()):
        raise UpdateError(f"{keys}: is inside the repository, which a server makes public")
    api = require("tuf.api.metadata", extra="update")
    with disk_errors(keys):
        signers = create_keys(keys)
    with disk_errors(directory):
        directory.joinpath("metadata").mkdir(parents=True)
    root = api.Root(consistent_snapshot=True)
    for role, role_signers in signers.items():
        for signer in role_signers:
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = KEYS_PER_ROLE[role]
    roles = {
        "root": root,
        "targets": api.Targets(),
        "snapshot": api.Snapshot(),
        "timestamp": api.Timestamp(),
    }
    for signed in roles.values():
        # `_sign` makes it one; the constructors refuse zero.
        signed.version = 0
    metadata = {role: api.Metadata(signed) for role, signed in roles.items()}
    repository = Repository(directory)
    everyone = [signer for role_signers in signers.values() for signer in role_signers]
    repository._sign(metadata, tuple(roles), everyone, DAYS)
    repository.publish({CHANNEL: channel_json(Channel())}, everyone)
    return repository


def _write(path: Path, content: bytes) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: temporary.write_bytes(content))


@contextlib.contextmanager
def _checked(name: str) -> Iterator[None]:
    try:
        yield
    # The parser documents only a part of the exceptions that damaged input causes.
    except Exception as error:
        raise UpdateError(f"{name}: is damaged: {error}") from error
