"""Process that runs one exported model for another process, so that a crash ends only this one.

It is run by its path, and imports numpy and one runtime but not glm_edge. It reads requests from
standard input and writes answers to standard output. A message is eight bytes with the length of a
JSON object, the object, then the bytes of the arrays that it lists.
"""

import contextlib
import ctypes
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
MEMORY_HEADROOM_BYTES = 8 << 30
# For each signature that reads the weights, LiteRT packs them anew and MNN makes them float32.
FILE_COPIES = {"litert": 12, "onnx": 8, "mnn": 24, "litertlm": 8}
CACHE_OUTPUT_SUFFIX = "_out"


class ProtocolError(Exception):
    """Bytes from the pipe that are not a message."""


def send(stream: BinaryIO, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a message.

    Args:
      stream: stream to write to.
      fields: JSON values by name.
      arrays: numeric arrays by name.
    """
    # Not `ascontiguousarray`, which adds a dimension to scalars.
    packed = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in packed.items()]
    header = json.dumps({**fields, "arrays": listed}).encode()
    stream.write(LENGTH.pack(len(header)) + header)
    for array in packed.values():
        stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Read a message.

    Args:
      stream: stream to read from.

    Returns:
      `(fields, arrays)`, or None at the end of the stream.

    Raises:
      ProtocolError: the bytes are not a message.
    """
    prefix = stream.read(LENGTH.size)
    if not prefix:
        return None
    try:
        (length,) = LENGTH.unpack(prefix)
        if length > MAX_HEADER:
            raise ProtocolError(f"a header of {length} bytes exceeds the limit")
        fields = json.loads(_exactly(stream, length))
        arrays, allowed = {}, MAX_ARRAYS
        for name, kind, shape in fields.pop("arrays"):
            dtype = np.dtype(kind)
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            allowed -= size
            if dtype.hasobject or min(size, allowed, *shape, 0) < 0:
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


class LiteRTRuntime:
    """The interpreter of a TFLite file."""

    def __init__(self, path: str, num_threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=path, num_threads=num_threads)
        self._runners: dict[str, Any] = {}

    def run(self, signature: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a signature."""
        if signature not in self._runners:
            self._runners[signature] = self._interpreter.get_signature_runner(signature)
        return self._runners[signature](**inputs)


class ONNXRuntime:
    """Sessions of a directory's ONNX graphs, with products in float32."""

    def __init__(self, path: str, num_threads: int) -> None:
        import onnxruntime

        self._library, self._path = onnxruntime, path
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        self._options.intra_op_num_threads = num_threads
        # The default rounds the activations of packed weights to int8.
        self._options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self._sessions: dict[str, Any] = {}

    def run(self, signature: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph; cache outputs get the names of the cache inputs."""
        if signature not in self._sessions:
            graph = os.path.join(self._path, f"{signature}.onnx")
            self._sessions[signature] = self._library.InferenceSession(
                graph, self._options, providers=["CPUExecutionProvider"]
            )
        session = self._sessions[signature]
        names = [output.name.removesuffix(CACHE_OUTPUT_SUFFIX) for output in session.get_outputs()]
        return dict(zip(names, session.run(None, dict(inputs)), strict=True))


class MNNRuntime:
    """Interpreters of a directory's MNN graphs."""

    def __init__(self, path: str, num_threads: int) -> None:
        import MNN

        self._library, self._path = MNN, path
        self._config = {"backend": "CPU", "numThread": num_threads, "precision": "high"}
        self._opened: dict[str, Any] = {}

    def run(self, signature: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph; cache outputs get the names of the cache inputs."""
        if signature not in self._opened:
            interpreter = self._library.Interpreter(os.path.join(self._path, f"{signature}.mnn"))
            interpreter.setExternalFile(os.path.join(self._path, "weights.bin"))
            self._opened[signature] = interpreter, interpreter.createSession(self._config)
        interpreter, session = self._opened[signature]
        for name, array in inputs.items():
            # A tensor is a view of an array, and does not keep it alive.
            copy = np.array(array)
            interpreter.getSessionInput(session, name).copyFrom(self._tensor(copy))
        interpreter.runSession(session)
        outputs = {}
        for name, output in interpreter.getSessionOutputAll(session).items():
            zeros = np.zeros(output.getShape(), np.float32)
            tensor = self._tensor(zeros)
            output.copyToHostTensor(tensor)
            values = np.array(tensor.getNumpyData(), np.float32).reshape(zeros.shape)
            outputs[name.removesuffix(CACHE_OUTPUT_SUFFIX)] = values
        return outputs

    def _tensor(self, array: np.ndarray) -> Any:
        library = self._library
        is_integer = array.dtype == np.int32
        kind = library.Halide_Type_Int if is_integer else library.Halide_Type_Float
        return library.Tensor(array.shape, kind, array, library.Tensor_DimensionType_Caffe)


class LiteRTLMRuntime:
    """LiteRT-LM's engine of a bundle, which answers greedily."""

    def __init__(
        self, path: str, num_threads: int, images: int, audio: bool, cache_dir: str
    ) -> None:
        import litert_lm

        litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
        cpu = litert_lm.Backend.CPU(thread_count=num_threads)
        options: dict[str, Any] = {"cache_dir": cache_dir}
        if images:
            options |= {"vision_backend": cpu, "max_num_images": images}
        if audio:
            options["audio_backend"] = cpu
        self._library, self._engine = litert_lm, litert_lm.Engine(path, cpu, **options)
        self._conversation: Any = None

    def reply(self, content: Any, max_new_tokens: int, same: bool) -> tuple[str, int]:
        """Answer a user's message.

        Args:
          content: text or parts.
          max_new_tokens: most tokens per answer of the conversation that this message begins.
          same: whether the message continues the previous conversation.

        Returns:
          `(text, tokens)`: the answer, and the number of tokens of the conversation so far.
        """
        if self._conversation is None or not same:
            if self._conversation is not None:
                self._conversation.close()
            sampler = self._library.SamplerConfig(top_k=1, top_p=0.0, temperature=1.0)
            self._conversation = self._engine.create_conversation(
                sampler_config=sampler, max_output_tokens=max_new_tokens
            )
        return self._send(self._conversation, content)

    def branch(self, content: Any) -> tuple[str, int]:
        """Answer a user's message in a clone of the conversation, which stays as it is.

        Args:
          content: text or parts.

        Returns:
          `(text, tokens)`: the answer, and the number of tokens of the clone.
        """
        if self._conversation is None:
            raise RuntimeError("there is no conversation to clone; send a message first")
        clone = clone_conversation(self._engine, self._conversation)
        try:
            return self._send(clone, content)
        finally:
            clone.close()

    def _send(self, conversation: Any, content: Any) -> tuple[str, int]:
        answer = conversation.send_message({"role": "user", "content": content})
        text = "".join(part.get("text", "") for part in answer.get("content", ()))
        return text, int(conversation.token_count)


def clone_conversation(engine: Any, conversation: Any) -> Any:
    """Clone a conversation of LiteRT-LM, whose context need not be prefilled again.

    The clone copies the cache on write, which takes less than a millisecond. In litert-lm 0.18.1:

    * A clone equals a fresh conversation in turns of text. With an image in the new turn, some
      answers differ from those of fresh conversations.
    * `create_conversation(messages=...)` prefills nothing, so clones of it save nothing. Send one
      message to a conversation before cloning it.
    * Checkpoints of sessions and `rewind` give other tokens than a fresh session.

    Args:
      engine: a `litert_lm.Engine`.
      conversation: one of its conversations.

    Returns:
      The clone, a `litert_lm` conversation that its caller closes.

    Raises:
      RuntimeError: the release of LiteRT-LM cannot clone.
    """
    # Python does not wrap the function of the C interface.
    from litert_lm._ffi import _get_lib
    from litert_lm.conversation import Conversation

    library = _get_lib()
    try:
        clone = library.litert_lm_conversation_clone
    except AttributeError:
        raise RuntimeError("this release of LiteRT-LM cannot clone conversations") from None
    clone.restype, clone.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pointer = clone(conversation._ptr)
    if not pointer:
        raise RuntimeError("LiteRT-LM cannot clone this conversation")
    return Conversation(library, pointer, engine=engine)


RUNTIMES = {
    "litert": LiteRTRuntime,
    "onnx": ONNXRuntime,
    "mnn": MNNRuntime,
    "litertlm": LiteRTLMRuntime,
}


class Worker:
    """The runtime, and the arrays that stay in this process between runs."""

    def __init__(self) -> None:
        self._runtime: Any = None
        self._arrays: dict[int, np.ndarray] = {}
        self._next = 0

    def handle(
        self, fields: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Handle one request."""
        for key in fields.get("drop", ()):
            self._arrays.pop(key, None)
        if fields["do"] == "load":
            self._load(fields["runtime"], fields["path"], fields["options"])
            return {}, {}
        if fields["do"] == "fetch":
            return {}, {"array": self._arrays[fields["key"]]}
        if fields["do"] == "reply":
            asked = (fields[name] for name in ("content", "max_new_tokens", "same"))
            text, tokens = self._runtime.reply(*asked)
            return {"text": text, "tokens": tokens}, {}
        if fields["do"] == "branch":
            text, tokens = self._runtime.branch(fields["content"])
            return {"text": text, "tokens": tokens}, {}
        return self._run(fields, arrays)

    def _load(self, runtime: str, path: str, options: Mapping[str, Any]) -> None:
        _limit(_bytes_of(path), FILE_COPIES[runtime])
        self._runtime = RUNTIMES[runtime](path, **options)

    def _run(
        self, fields: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        remote = {argument: self._arrays[key] for argument, key in fields["remote"].items()}
        outputs = self._runtime.run(fields["signature"], {**arrays, **remote})
        stayed = {}
        for output in set(fields["keep"]) & set(outputs):
            array = outputs.pop(output)
            stayed[output] = [self._next, array.dtype.str, list(array.shape)]
            self._arrays[self._next] = array
            self._next += 1
        return {"remote": stayed}, outputs


def _bytes_of(path: str) -> int:
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())


def _limit(file_bytes: int, copies: int) -> None:
    """Prevent a hostile file from exhausting memory, or writing a core dump."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = copies * file_bytes + MEMORY_HEADROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


@contextlib.contextmanager
def _answers_only() -> Iterator[BinaryIO]:
    """Reserve standard output for answers; output of libraries goes to standard error."""
    answers = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(answers, "wb") as stream:
        yield stream


def main() -> None:
    """Answer requests until the other process closes the pipe."""
    # The parent process handles an interrupt at the terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = Worker()
    with _answers_only() as output:
        while (request := receive(sys.stdin.buffer)) is not None:
            try:
                fields, arrays = worker.handle(*request)
            except Exception as error:  # of a library without a specific exception class
                fields, arrays = {"error": f"{error or type(error).__name__}"}, {}
            send(output, fields, arrays)


if __name__ == "__main__":
    main()
