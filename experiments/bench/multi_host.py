"""Shards a model over the devices of several processes, and checks logits and greedy tokens.

    python -m experiments.bench.multi_host --launch=2 --compare

Starts two processes on this machine's CPU, each with `--devices_per_process` simulated devices. On
a cluster, run the same command on every host, with the address of the first:

    python -m experiments.bench.multi_host --checkpoint=DIR --coordinator=HOST:PORT \\
        --num_processes=N --process_id=I

Cloud TPU and Slurm need none of the last three flags. Every process reads only the rows of its
shards.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

import glm_edge as ge
from glm_edge.cli.checkpoints import CHECKPOINT_HELP, checkpoint_of
from glm_edge.cli.console import launch
from glm_edge.errors import ConfigError
from glm_edge.generate import generate
from glm_edge.params import sharding

FLAGS = flags.FLAGS
TOLERANCE = 1e-4


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_integer("launch", 0, "Number of processes to start on this machine's CPU.", 0)
    flags.DEFINE_integer(
        "devices_per_process", 4, "Number of simulated devices per process with --launch.", 1
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "Number of processes of the run.", 1)
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", 0)
    flags.DEFINE_integer("model_ways", 0, "Number of devices along `model`; 0 uses all devices.", 0)
    flags.DEFINE_bool("fully_sharded", False, "Also shard weights along `data`.")
    flags.DEFINE_integer("rows", 2, "Number of prompts of random tokens.", 1)
    flags.DEFINE_integer("length", 12, "Tokens per prompt.", 1)
    flags.DEFINE_integer("max_new_tokens", 8, "Number of tokens to generate.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of the prompts.")
    flags.DEFINE_bool("compare", False, "Repeat on one device of process 0, and compare.")


def main(argv: Sequence[str]) -> None:
    del argv
    if FLAGS.launch:
        sys.exit(start_processes(FLAGS.launch, FLAGS.devices_per_process))
    join_processes(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    report(*run_sharded())


def join_processes(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Join all processes into one JAX run; None asks the cluster.

    Raises:
      ConfigError: the processes lack distinct ids, or cannot connect.
    """
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"jax.distributed: {error}; use --launch=2, or pass --coordinator=HOST:PORT, "
            "--num_processes and --process_id"
        ) from error


def start_processes(processes: int, devices: int) -> int:
    """Start processes of this script; return the first nonzero exit status."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    simulated = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}"
    command = [sys.executable, "-m", "experiments.bench.multi_host", *sys.argv[1:], "--launch=0"]
    command += [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
    started = [
        subprocess.Popen([*command, f"--process_id={index}"], env=environment)
        for index in range(processes)
    ]
    try:
        while all(process.poll() is None for process in started):
            time.sleep(0.1)
        # The other processes wait for a failed one, so they are stopped.
        if any(process.poll() for process in started):
            for process in started:
                process.terminate()
        return next((status for process in started if (status := process.wait())), 0)
    finally:
        for process in started:
            process.kill()


def run_sharded() -> tuple[np.ndarray, np.ndarray]:
    """Compute logits and tokens on the complete mesh, on every process."""
    mesh = make_mesh(FLAGS.model_ways)
    rules = sharding.FULLY_SHARDED if FLAGS.fully_sharded else sharding.RULES
    model, params = ge.load(checkpoint(), mesh=mesh, rules=rules)
    arrays = jax.tree.leaves(params)
    local_bytes = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    total_bytes = sum(array.nbytes for array in arrays)
    print(
        f"process {jax.process_index()} of {jax.process_count()}: mesh {dict(mesh.shape)}, "
        f"{local_bytes / jax.local_device_count() / 1e6:.2f} MB of {total_bytes / 1e6:.2f} MB "
        "per device",
        flush=True,
    )
    with sharding.on(mesh, rules):
        return tuple(
            multihost_utils.process_allgather(array, tiled=True) for array in forward(model, params)
        )


def make_mesh(model_ways: int) -> jax.sharding.Mesh:
    """Return all devices of all processes as (`data`, `model`)."""
    devices = jax.device_count()
    model_devices = model_ways or devices
    if devices % model_devices:
        raise ConfigError(f"--model_ways={model_devices} must divide {devices} devices")
    return jax.make_mesh((devices // model_devices, model_devices), ("data", "model"))


def forward(model: Any, params: Any) -> tuple[jax.Array, jax.Array]:
    """Compute logits [rows, length, V] of random prompts, and the tokens that follow them."""
    rng = np.random.default_rng(FLAGS.seed)
    size = (FLAGS.rows, FLAGS.length)
    tokens = rng.integers(0, model.config.decoder.vocab_size, size, np.int32)
    logits, _ = jax.jit(model.apply)({"params": params}, tokens)
    return logits, generate(model, params, tokens, max_new_tokens=FLAGS.max_new_tokens).tokens


def report(logits: np.ndarray, tokens: np.ndarray) -> None:
    """Print tokens and, with --compare, their difference from those of one device."""
    if jax.process_index():
        return
    for row in tokens:
        print("tokens", *row)
    if not FLAGS.compare:
        return
    expected, expected_tokens = map(np.asarray, forward(*ge.load(checkpoint())))
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    same = np.array_equal(tokens, expected_tokens)
    print(f"logits differ by {error:.1e} of the largest; tokens equal: {same}")
    if error > TOLERANCE or not same:
        sys.exit(1)


def checkpoint() -> Any:
    """Return the path of the checkpoint."""
    return checkpoint_of(FLAGS.checkpoint)


if __name__ == "__main__":
    define_flags()
    launch(main)
