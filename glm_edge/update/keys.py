"""Private keys in files, one per key, named by role."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glm_edge.errors import UpdateError, require
from glm_edge.files import read_bytes
from glm_edge.writers import write_whole

MAX_KEY_BYTES = 1 << 14
# Two people must agree on a release; the online key only says that the newest one is still valid.
KEYS_PER_ROLE = {"root": 2, "targets": 2, "snapshot": 1, "timestamp": 1}
# One key for both, because the same machine renews them.
ONLINE = ("snapshot", "timestamp")


def create_keys(folder: Path) -> dict[str, list[Any]]:
    """Create the keys of a repository.

    Args:
      folder: new or empty directory for the PEM files `root-1.pem`, `root-2.pem`, `targets-1.pem`,
        `targets-2.pem` and `online-1.pem`.

    Returns:
      Signers by role.

    Raises:
      UpdateError: the folder contains keys.
      OutputError: a file cannot be written.
    """
    signer_class = _signer_class()
    if folder.is_dir() and any(folder.glob("*.pem")):
        raise UpdateError(f"{folder}: already contains keys; choose another folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    by_file: dict[str, Any] = {}
    signers: dict[str, list[Any]] = {}
    for role, count in KEYS_PER_ROLE.items():
        stem = "online" if role in ONLINE else role
        for name in (f"{stem}-{index + 1}.pem" for index in range(count)):
            if name not in by_file:
                by_file[name] = signer_class.generate_ed25519()
                _write_key(folder / name, by_file[name].private_bytes)
            signers.setdefault(role, []).append(by_file[name])
    return signers


def _write_key(path: Path, pem: bytes) -> None:
    def write(temporary: Path) -> None:
        # Other users of the machine must not read the key, not even for a moment.
        temporary.touch(mode=0o600)
        temporary.write_bytes(pem)

    write_whole(path, write)


def read_keys(folders: Iterable[Path]) -> list[Any]:
    """Read the keys of folders.

    Args:
      folders: directories with PEM files; people may hold the keys of a role separately.

    Returns:
      Signers.

    Raises:
      UpdateError: a folder has no key, or a file is not a private key.
    """
    serialization = require("cryptography.hazmat.primitives.serialization", extra="update")
    signers = []
    for folder in folders:
        paths = sorted(folder.glob("*.pem"))
        if not paths:
            raise UpdateError(f"{folder}: contains no key (*.pem)")
        for path in paths:
            pem = read_bytes(path, MAX_KEY_BYTES, UpdateError)
            try:
                private = serialization.load_pem_private_key(pem, None)
                signers.append(_signer_class()(private))
            # The library raises other types for other damage, such as an encrypted key.
            except Exception as error:
                raise UpdateError(f"{path}: is not an ed25519 private key: {error}") from error
    return signers


def _signer_class() -> Any:
    require("cryptography", extra="update")
    return require("securesystemslib.signer", extra="update").CryptoSigner
