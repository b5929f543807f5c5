"""Signed metadata on the device, checked by the client of The Update Framework."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_edge.errors import GlmEdgeError, OutputError, UpdateError, require
from glm_edge.files import read_bytes
from glm_edge.update.transport import StatusError, Transport

MAX_TARGET_BYTES = 1 << 24


class Trust:
    """Metadata of a repository: signatures, expiry, and protection from rollback and freeze."""

    def __init__(self, folder: Path, root: bytes, transport: Transport) -> None:
        """Read the root of trust.

        Args:
          folder: directory of the metadata that was accepted before.
          root: the first root metadata, which came with the device.
          transport: source.

        Raises:
          UpdateError: the root is malformed or not signed by itself.
          OutputError: the folder cannot be written.
        """
        self._folder = folder
        updater = require("tuf.ngclient", extra="update").Updater
        # Verification of ed25519 signatures; without it, each signature would count as wrong.
        require("cryptography", extra="update")
        with self._one_error("root"):
            folder.mkdir(parents=True, exist_ok=True)
            for litter in folder.glob("tmp*"):
                litter.unlink()
            self._updater = updater(
                str(folder),
                "metadata",
                target_base_url="targets",
                fetcher=_fetcher(transport),
                bootstrap=root,
            )

    def refresh(self) -> None:
        """Fetch and check the newest metadata.

        Raises:
          UpdateError: the metadata is expired, wrongly signed, older than before, or damaged, or
            the server cannot be reached.
          OutputError: the folder cannot be written.
        """
        with self._one_error("metadata"):
            self._updater.refresh()
            # The Update Framework renames without a sync. An empty timestamp after a loss of power
            # would end the protection from rollback.
            for path in (*self._folder.rglob("*.json"), self._folder):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def target(self, name: str) -> bytes | None:
        """Fetch a signed file.

        Args:
          name: name of the target.

        Returns:
          Its bytes, None if the metadata does not list it.

        Raises:
          UpdateError: the server sends other bytes, or cannot be reached.
          OutputError: the folder cannot be written.
        """
        path = self._folder / "target"
        with self._one_error(name):
            info = self._updater.get_targetinfo(name)
            if info is None:
                return None
            if info.length > MAX_TARGET_BYTES:
                raise UpdateError(f"{name}: has {info.length} bytes; the limit is 16 MiB")
            self._updater.download_target(info, str(path))
            try:
                return read_bytes(path, MAX_TARGET_BYTES, UpdateError)
            finally:
                path.unlink()

    @contextlib.contextmanager
    def _one_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except GlmEdgeError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{self._folder}: cannot be written: {reason}") from error
        # The parser of metadata documents only a part of the exceptions that damaged input causes.
        except Exception as error:
            if isinstance(error.__cause__, GlmEdgeError):
                raise error.__cause__ from None
            kind = type(error).__name__
            raise UpdateError(f"{name}: is not trusted: {error or kind} ({kind})") from error


def _fetcher(transport: Transport) -> Any:
    """Adapt a transport to the interface of The Update Framework."""
    interface: Any = require("tuf.ngclient", extra="update").FetcherInterface
    exceptions = require("tuf.api.exceptions", extra="update")

    class Fetcher(interface):
        """Downloads through a transport."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            try:
                return transport.read(url, 0)[1]
            except StatusError as error:
                raise exceptions.DownloadHTTPError(str(error), error.status) from error

    return Fetcher()
