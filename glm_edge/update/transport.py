"""Downloads from a static HTTP server: resumed, bounded in time, compared with a hash."""

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from glm_edge.errors import UpdateError, require
from glm_edge.files import opened
from glm_edge.update.disk import disk_errors

ATTEMPTS = 3
TIMEOUT_S = 30.0
# A server that sends less per second is treated like one that stalls.
SLOWEST_BYTES_PER_S = 1024
_CHUNK = 1 << 16


class StatusError(UpdateError):
    """Raised for an HTTP status that is not success.

    Attributes:
      status: the status.
    """

    def __init__(self, message: str, status: int) -> None:
        """Store the status."""
        super().__init__(message)
        self.status = status


class Transport(Protocol):
    """A source of the repository's files."""

    def read(self, path: str, start: int) -> tuple[int, Iterator[bytes]]:
        """Open a file.

        Args:
          path: path in the repository.
          start: wanted offset of the first byte.

        Returns:
          The offset of the first byte, `start` or 0, and the bytes.

        Raises:
          StatusError: the server refuses.
          UpdateError: the server cannot be reached, or stops. Also raised by the iterator.
        """


class HttpTransport:
    """Files of a static HTTP server, through one pool of connections."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        """Prepare connections, without opening one.

        Args:
          url: address of the repository.
          timeout_s: longest wait for a connection, and between two bytes, in seconds.

        Raises:
          UpdateError: the address does not begin with http:// or https://.
        """
        if not url.startswith(("http://", "https://")):
            raise UpdateError(f"url={url!r:.200}: must begin with http:// or https://")
        self._urllib3 = require("urllib3", extra="update")
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._pool = self._urllib3.PoolManager(
            timeout=timeout_s,
            retries=self._urllib3.Retry(total=None, connect=0, read=0, redirect=3),
        )

    def read(self, path: str, start: int) -> tuple[int, Iterator[bytes]]:
        """Open a file; see `Transport.read`."""
        url = f"{self._url}/{path}"
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            response = self._pool.request("GET", url, headers=headers, preload_content=False)
        except self._urllib3.exceptions.HTTPError as error:
            raise UpdateError(f"{url}: cannot be fetched: {error}") from error
        if response.status not in (200, 206):
            response.close()
            raise StatusError(f"{url}: the server answers {response.status}", response.status)
        if response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                response.close()
                raise UpdateError(f"{url}: the server sends another range than bytes {start}-")
            return start, self._chunks(url, response)
        return 0, self._chunks(url, response)

    def post(self, body: bytes) -> None:
        """Send JSON to the address itself.

        Args:
          body: JSON.

        Raises:
          UpdateError: the server cannot be reached, or refuses.
        """
        headers = {"Content-Type": "application/json"}
        try:
            response = self._pool.request("POST", self._url, body=body, headers=headers)
        except self._urllib3.exceptions.HTTPError as error:
            raise UpdateError(f"{self._url}: cannot be reached: {error}") from error
        if response.status >= 300:
            raise StatusError(f"{self._url}: the server answers {response.status}", response.status)

    def _chunks(self, url: str, response: "object") -> Iterator[bytes]:
        began, count, complete = time.monotonic(), 0, False
        try:
            # read1 returns what has arrived; `read` would wait for a slow server to fill a chunk.
            while chunk := response.read1(_CHUNK):  # type: ignore[attr-defined]
                count += len(chunk)
                elapsed = time.monotonic() - began
                if elapsed > self._timeout_s + count / SLOWEST_BYTES_PER_S:
                    raise UpdateError(f"{url}: only {count} bytes came in {elapsed:.0f} s")
                yield chunk
            complete = True
        except (self._urllib3.exceptions.HTTPError, OSError) as error:
            raise UpdateError(f"{url}: broke off after {count} bytes: {error}") from error
        finally:
            # An abandoned body would be the beginning of the next answer on this connection.
            (response.release_conn if complete else response.close)()  # type: ignore[attr-defined]


class FolderTransport:
    """Files of a local folder, such as a memory card with a copy of the repository."""

    def __init__(self, folder: str | Path) -> None:
        """Remember the folder.

        Args:
          folder: copy of a repository.
        """
        self.folder = Path(folder)

    def read(self, path: str, start: int) -> tuple[int, Iterator[bytes]]:
        """Open a file; see `Transport.read`."""
        file = self.folder / path
        if not file.is_file():
            raise StatusError(f"{file}: does not exist", 404)
        return start, _read_from(file, start)


def _read_from(path: Path, start: int) -> Iterator[bytes]:
    with opened(path, UpdateError) as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            yield chunk


def object_path(sha256: str) -> str:
    """Return the path of an object in the repository."""
    return f"objects/{sha256[:2]}/{sha256}"


def download(transport: Transport, sha256: str, size: int, folder: Path) -> int:
    """Download an object, or continue an earlier download of it.

    Args:
      transport: source.
      sha256: signed hash of the object, also its file name in `folder`.
      size: signed size in bytes.
      folder: directory of objects. A partial download stays there for the next call.

    Returns:
      Bytes that came over the network.

    Raises:
      UpdateError: the server stops, stalls or sends other bytes, several times in a row.
      OutputError: the disk is full, or cannot be written.
    """
    target, partial = folder / sha256, folder / f"{sha256}.part"
    if target.is_file() and hash_file(target) == sha256:
        return 0
    count, failure = 0, UpdateError(sha256)
    for _ in range(ATTEMPTS):
        try:
            with disk_errors(partial):
                count += _continue(transport, object_path(sha256), partial, size)
        except UpdateError as error:
            failure = error
            if isinstance(error, StatusError) and error.status != 416:
                break
            if isinstance(error, StatusError):
                partial.unlink(missing_ok=True)
            continue
        if hash_file(partial) == sha256:
            os.replace(partial, target)
            return count
        partial.unlink(missing_ok=True)
        failure = UpdateError(f"{object_path(sha256)}: the server sends other bytes than signed")
    raise failure


def _continue(transport: Transport, path: str, partial: Path, size: int) -> int:
    """Append the missing bytes of a partial download; return their count."""
    start = partial.stat().st_size if partial.is_file() else 0
    if start > size:
        partial.unlink()
        start = 0
    if start == size:
        return 0
    start, chunks = transport.read(path, start)
    count = 0
    with open(partial, "r+b" if start else "wb") as file:
        file.seek(start)
        for chunk in chunks:
            count += len(chunk)
            if start + count > size:
                raise UpdateError(f"{path}: the server sends more than the signed {size} bytes")
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if start + count < size:
        raise UpdateError(f"{path}: ended after {start + count} of {size} bytes")
    return count


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with opened(path, UpdateError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
