"""A process that runs one TFLite file for another process, so that a crash ends this one alone.

Run by its path, it imports numpy and LiteRT and nothing of glm_edge. Requests come on standard
input, answers leave on standard output: eight bytes with the length of a JSON object, the object,
then the bytes of the arrays that it lists.
"""

import contextlib
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

LENGTH = struct.Struct("<Q")
MAX_HEADER = 1 << 24
MAX_ARRAYS = 1 << 36
ROOM_BYTES = 8 << 30
FILE_COPIES = 4


class ProtocolError(Exception):
    """What came through the pipe is no message."""


def send(stream: BinaryIO, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a message.

    Args:
      stream: to write to.
      fields: JSON values.
      arrays: by name; numbers.
    """
    # Not `ascontiguousarray`, which gives scalars a dimension.
    packed = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in packed.items()]
    header = json.dumps({**fields, "arrays": listed}).encode()
    stream.write(LENGTH.pack(len(header)) + header)
    for array in packed.values():
        stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Reads a message.

    Args:
      stream: to read from.

    Returns:
      `(fields, arrays)`, or None where the stream ends.

    Raises:
      ProtocolError: the bytes are no message.
    """
    prefix = stream.read(LENGTH.size)
    if not prefix:
        return None
    try:
        (length,) = LENGTH.unpack(prefix)
        if length > MAX_HEADER:
            raise ProtocolError(f"a header of {length} bytes")
        fields = json.loads(_exactly(stream, length))
        arrays, room = {}, MAX_ARRAYS
        for name, kind, shape in fields.pop("arrays"):
            dtype = np.dtype(kind)
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            room -= size
            if dtype.hasobject or min(size, room, *shape, 0) < 0:
                raise ProtocolError(f"an array {name} of {kind} {shape}")
            arrays[name] = np.frombuffer(_exactly(stream, size), dtype).reshape(shape)
    except (ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
        raise ProtocolError(str(error)) from error
    return fields, arrays


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise ProtocolError(f"{len(content)} of {size} bytes")
    return content


class Host:
    """Holds the interpreter and the arrays that stay here between two runs."""

    def __init__(self) -> None:
        self._interpreter: Any = None
        self._runners: dict[str, Any] = {}
        self._kept: dict[int, np.ndarray] = {}
        self._next = 0

    def answer(
        self, fields: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Does what one request asks."""
        for key in fields.get("drop", ()):
            self._kept.pop(key, None)
        if fields["do"] == "load":
            self._load(fields["path"], fields["num_threads"])
            return {}, {}
        if fields["do"] == "fetch":
            return {}, {"array": self._kept[fields["key"]]}
        return self._run(fields, arrays)

    def _load(self, path: str, num_threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        _limit(os.path.getsize(path))
        self._interpreter = Interpreter(model_path=path, num_threads=num_threads)

    def _run(
        self, fields: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        name = fields["signature"]
        if name not in self._runners:
            self._runners[name] = self._interpreter.get_signature_runner(name)
        held = {argument: self._kept[key] for argument, key in fields["kept"].items()}
        outputs = self._runners[name](**arrays, **held)
        kept = {}
        for output in set(fields["keep"]) & set(outputs):
            array = outputs.pop(output)
            kept[output] = [self._next, array.dtype.str, list(array.shape)]
            self._kept[self._next] = array
            self._next += 1
        return {"kept": kept}, outputs


def _limit(file_bytes: int) -> None:
    """Keeps a hostile file from taking the machine's memory, or leaving a core on its disk."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = FILE_COPIES * file_bytes + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


@contextlib.contextmanager
def _own_output() -> Iterator[BinaryIO]:
    """Standard output for answers alone; what libraries print goes to standard error."""
    own = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(own, "wb") as stream:
        yield stream


def main() -> None:
    """Answers requests until the other process closes the pipe."""
    # An interrupt at the terminal is for the process that asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host = Host()
    with _own_output() as output:
        while (request := receive(sys.stdin.buffer)) is not None:
            try:
                fields, arrays = host.answer(*request)
            except Exception as error:  # of a library that has no class of its own
                fields, arrays = {"error": f"{error or type(error).__name__}"}, {}
            send(output, fields, arrays)


if __name__ == "__main__":
    main()
