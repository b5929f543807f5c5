"""Answers requests over HTTP, in the form of OpenAI's API.

    python -m glm_edge.serve --model=DIR --port=8000

Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /v1/audio/transcriptions, /health and
/metrics. All programs are compiled before the socket opens; --compilation_cache keeps them for the
next start.

SIGTERM or SIGINT ends the service: new requests receive 503, open ones finish within --drain_s, and
streams that are open then end with an error event. A second signal ends them at once.

A key keeps others out: --api_key, or better the variable GLM_EDGE_API_KEY, which other users of the
machine cannot read. It protects the paths below /v1.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

import glm_edge as ge
from glm_edge.cli.checkpoints import CHECKPOINT_HELP, checkpoint_of
from glm_edge.cli.console import refuse_arguments
from glm_edge.errors import DataError, require
from glm_edge.generate.early_exit import early_exit
from glm_edge.preprocess.processor import Processor
from glm_edge.serve import Engine, JaxBackend
from glm_edge.serve.backend import Backend
from glm_edge.serve.http import Limits, Server, Service
from glm_edge.serve.http.hosts import LOOPBACK
from glm_edge.serve.runner_backend import RunnerBackend

FLAGS = flags.FLAGS
KEY_VARIABLE = "GLM_EDGE_API_KEY"
PACKAGES = ("starlette", "uvicorn", "prometheus_client", "python_multipart")
CACHE_DTYPES = ("float32", "bfloat16", "int8")

flags.disclaim_key_flags()


def define_flags() -> None:
    """Define the command's flags."""
    flags.DEFINE_string("model", None, CHECKPOINT_HELP)
    flags.DEFINE_string("processor", None, "Checkpoint with the tokenizer of a --model=*.tflite.")
    flags.DEFINE_list("exits", [], "Layers of early exit, which requests may then use.")
    flags.DEFINE_list("names", [], "Names of the model for clients; default: that of the folder.")
    flags.DEFINE_string("host", "127.0.0.1", "Address; the default is this machine only.")
    flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", 0, 65535)
    flags.DEFINE_list("allowed_hosts", [], "Further names of this service in the Host header.")
    flags.DEFINE_integer("connections", 500, "Most open connections.", 1)
    flags.DEFINE_string("api_key", None, f"Key that clients must send; default: ${KEY_VARIABLE}.")
    flags.DEFINE_integer("slots", 8, "Requests that run at once.", 1)
    flags.DEFINE_integer("context", None, "Tokens of prompt and answer; default: the model's.", 1)
    flags.DEFINE_enum("cache_dtype", "float32", CACHE_DTYPES, "Type of the key/value cache.")
    flags.DEFINE_integer("cache_mb", 256, "Memory of the prefix cache in MiB; 0 is off.", 0)
    flags.DEFINE_integer("queue_size", 1000, "Requests that may wait.", 1)
    flags.DEFINE_enum(
        "thinking",
        "inline",
        ["inline", "separate", "omit"],
        "Thoughts: in the content without tags, in reasoning_content, or not at all.",
    )
    flags.DEFINE_integer("body_mb", 32, "Largest body in MiB.", 1)
    flags.DEFINE_integer("memory_mb", 2048, "Memory of all open requests' inputs in MiB.", 1)
    flags.DEFINE_float("image_megapixels", 24.0, "Largest image.", 0.001)
    flags.DEFINE_float("body_s", 30.0, "Seconds in which a body must arrive.", 0.1)
    flags.DEFINE_float("drain_s", 30.0, "Seconds for open requests after a signal.", 0.0)
    flags.DEFINE_string("compilation_cache", None, "Folder that keeps compiled programs.")
    flags.DEFINE_bool("access_log", False, "Log each request.")


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
      argv: the program's name.
    """
    refuse_arguments(argv)
    for package in PACKAGES:
        require(package, extra="serve")
    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", FLAGS.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    checkpoint = checkpoint_of(FLAGS.model)
    if _is_file(checkpoint) and not FLAGS.processor:
        raise DataError(f"{checkpoint}: a file has no tokenizer; pass processor=DIR")
    key = FLAGS.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is None and FLAGS.host not in LOOPBACK:
        logging.warning("--host=%s without a key: anyone who reaches it may ask", FLAGS.host)
    limits = Limits(
        body_bytes=FLAGS.body_mb << 20,
        body_s=FLAGS.body_s,
        memory_bytes=FLAGS.memory_mb << 20,
        image_pixels=round(FLAGS.image_megapixels * 1e6),
    )
    backend = _backend(checkpoint)
    engine = Engine(backend, cache_bytes=FLAGS.cache_mb << 20, queue_size=FLAGS.queue_size)
    service = Service(
        engine,
        Processor.from_checkpoint(checkpoint_of(FLAGS.processor or FLAGS.model)),
        names=FLAGS.names or [checkpoint.resolve().name.removesuffix(".tflite")],
        limits=limits,
        api_key=key,
        thinking=FLAGS.thinking,
    )
    print(f"compiling programs for {backend.num_slots} slots", flush=True)
    engine.warm_up()
    engine.start()
    server = Server(
        service,
        FLAGS.host,
        FLAGS.port,
        drain_s=FLAGS.drain_s,
        connections=FLAGS.connections,
        allowed_hosts=FLAGS.allowed_hosts,
        access_log=FLAGS.access_log,
        on_start=lambda port: print(
            f"serving {service.names[0]} at http://{FLAGS.host}:{port}/v1", flush=True
        ),
    )
    server.run()


def _is_file(checkpoint: Path) -> bool:
    return checkpoint.suffix == ".tflite"


def _backend(checkpoint: Path) -> Backend:
    """Open an exported file, or load a checkpoint."""
    if _is_file(checkpoint):
        backend: Any = RunnerBackend.from_file(checkpoint)
        return backend
    model: Any
    model, params = ge.load(checkpoint)
    exits = None
    if FLAGS.exits:
        try:
            exits = early_exit(model, [int(layer) for layer in FLAGS.exits])
        except ValueError as error:
            raise DataError(f"exits={','.join(FLAGS.exits)}: {error}") from error
    return JaxBackend(model, params, FLAGS.slots, FLAGS.context, FLAGS.cache_dtype, exits=exits)
