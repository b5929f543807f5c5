"""Measures the model service under load, beside LiteRT-LM's server.

    python -m experiments.bench.serve --out=experiments/results/serve.json

Parts, in order:

- `slots`: tokens per second of 16 streaming clients on one slot and on 16.
- `soak`: --soak_clients streaming clients for --soak_s seconds; some read slowly, leave, or send
  half a body. No request may be starved or lost, memory must stay flat after a warm-up, and every
  answer must equal the one of a single run.
- `peer`: requests per second of 8 clients, here and on `litert-lm serve` (extra `litertlm`) with
  the same model as a bundle, alternately. Its server ignores limits of tokens, so both answer until
  the model stops.
- `start`: seconds until the service is ready, with a warm compilation cache.

Requests ask nano about a generated screen. Rules for a pass are in the table; they were written
before the measurement.
"""

import asyncio
import base64
import io
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import numpy as np
from absl import flags
from PIL import Image

from experiments.bench import clients
from experiments.common.provenance import provenance_of
from experiments.common.serving import served
from experiments.nano.phone_screens import digits, generator, instructions
from glm_edge.cli.console import launch, print_table, refuse_arguments
from glm_edge.writers import write_json

FLAGS = flags.FLAGS
PARTS = ("slots", "soak", "peer", "start")
flags.DEFINE_string("out", None, "JSON file for the results; parts are added to it.")
flags.DEFINE_string("model", "nano", "Checkpoint directory, or the name of a shipped model.")
flags.DEFINE_list("parts", list(PARTS), f"Parts to measure: {', '.join(PARTS)}.")
flags.DEFINE_integer("seed", 0, "Seed of screens, questions and clients.")
flags.DEFINE_float("slots_s", 30.0, "Seconds per number of slots.")
flags.DEFINE_float("soak_s", 300.0, "Seconds of the soak.")
flags.DEFINE_integer("soak_clients", 64, "Clients of the soak.", 1)
flags.DEFINE_float("peer_s", 20.0, "Seconds per run of a peer; runs alternate three times.")

MANY, PEER_CLIENTS, ROUNDS = 16, 8, 3
LONG_ANSWER = 64
WARM_UP_SHARE = 0.2


def bodies_of(seed: int, count: int = 24) -> list[dict[str, Any]]:
    """Make requests about screens, several per screen."""
    rng = generator.random_stream("eval", seed)
    screens = generator.ScreenGenerator(digits.sklearn_digits("eval"))
    bodies = []
    while len(bodies) < count:
        screen = screens.draw(rng)
        file = io.BytesIO()
        Image.fromarray((screen.image * 255).round().astype(np.uint8)).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        for question in instructions.questions(rng, screen, 4, wording="exam"):
            parts = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": question.instruction_text},
            ]
            messages = [{"role": "user", "content": parts}]
            bodies.append({"model": "nano", "temperature": 0, "messages": messages})
    return bodies[:count]


def measure_slots(cache: str) -> dict[str, Any]:
    """Measure tokens per second on one slot and on many."""
    bodies = [
        {**body, "max_tokens": LONG_ANSWER, "ignore_eos": True} for body in bodies_of(FLAGS.seed)
    ]
    rates = {}
    for slots in (1, MANY):
        with served(FLAGS.model, options=[f"--slots={slots}", cache]) as service:
            run = clients.run_clients(
                service.base_url, bodies, MANY, FLAGS.slots_s, {"normal": 1.0}, FLAGS.seed
            )
            result = asyncio.run(run)
            rates[slots] = sum(answer.tokens for _, answer in result.answers) / result.seconds
    ratio = rates[MANY] / rates[1]
    return {"tokens_per_s": rates, "ratio": ratio, "rule": "ratio >= 4", "passed": ratio >= 4}


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no memory of process {pid}")


def measure_soak(cache: str) -> dict[str, Any]:
    """Run good and bad clients for minutes; compare every answer with a single run."""
    bodies = [{**body, "max_tokens": LONG_ANSWER} for body in bodies_of(FLAGS.seed)]
    memory: list[tuple[float, float]] = []
    done = threading.Event()
    with served(FLAGS.model, options=[f"--slots={MANY}", cache]) as service:
        assert service.pid is not None
        pid = service.pid
        alone = [asyncio.run(clients.ask(service.base_url, body)).text for body in bodies]

        def watch() -> None:
            started = time.monotonic()
            while not done.wait(1.0):
                memory.append((time.monotonic() - started, resident_mb(pid)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        run = clients.run_clients(
            service.base_url, bodies, FLAGS.soak_clients, FLAGS.soak_s, clients.KINDS, FLAGS.seed
        )
        result = asyncio.run(run)
        done.set()
        watcher.join()
    first = [answer.first_s for _, answer in result.answers if answer.first_s is not None]
    p50, p99 = (clients.percentile(first, share) for share in (0.5, 0.99))
    lost = sum(not answer.complete for _, answer in result.answers)
    different = sum(answer.text != alone[prompt] for prompt, answer in result.answers)
    warm = [size for at, size in memory if at > WARM_UP_SHARE * FLAGS.soak_s]
    drift = max(warm) / min(warm) - 1
    malformed = {str(s): n for (kind, s), n in result.outcomes.items() if kind == "malformed"}
    passed = not lost and not different and p99 <= 10 * p50 and drift <= 0.1
    passed = passed and set(malformed) <= {"400"}
    return {
        "requests": sum(result.outcomes.values()),
        "requests_per_s": sum(result.outcomes.values()) / result.seconds,
        "first_token_p50_s": p50,
        "first_token_p99_s": p99,
        "lost": lost,
        "different_from_alone": different,
        "malformed_statuses": malformed,
        "memory_mb": [min(warm), max(warm)],
        "rule": "none lost or different, p99 <= 10 p50, memory within 5 % of its middle, 400 only",
        "passed": passed,
    }


def measure_peer(cache: str) -> dict[str, Any]:
    """Alternate runs of this service and of LiteRT-LM's on the same model."""
    from experiments.bench.runtimes.litertlm_server import litertlm_served

    bodies = bodies_of(FLAGS.seed)
    rates: dict[str, list[float]] = {"glm_edge": [], "litert_lm": []}
    with (
        served(FLAGS.model, options=[f"--slots={PEER_CLIENTS}", cache]) as service,
        litertlm_served(FLAGS.model) as (peer_url, peer_model),
    ):
        addresses = {"glm_edge": (service.base_url, "nano"), "litert_lm": (peer_url, peer_model)}
        for round_ in range(ROUNDS):
            for name, (address, model) in addresses.items():
                asked = [{**body, "model": model} for body in bodies]
                run = clients.run_clients(
                    address, asked, PEER_CLIENTS, FLAGS.peer_s, {"normal": 1.0}, round_
                )
                result = asyncio.run(run)
                complete = sum(answer.complete for _, answer in result.answers)
                rates[name].append(complete / result.seconds)
    ratios = sorted(a / b for a, b in zip(rates["glm_edge"], rates["litert_lm"], strict=True))
    ratio = ratios[len(ratios) // 2]
    return {
        "requests_per_s": rates,
        "ratio": ratio,
        "ratios": ratios,
        "rule": "median ratio >= 2",
        "passed": ratio >= 2,
    }


def measure_start(cache: str) -> dict[str, Any]:
    """Start the service once to fill the compilation cache, and once more."""
    seconds = []
    for _ in range(2):
        with served(FLAGS.model, options=[f"--slots={MANY}", cache]) as service:
            seconds.append(service.ready_s)
    return {
        "cold_s": seconds[0],
        "warm_s": seconds[1],
        "rule": "warm_s <= 20",
        "passed": seconds[1] <= 20,
    }


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    out = Path(FLAGS.out) if FLAGS.out else None
    results: dict[str, Any] = {}
    measures = {
        "slots": measure_slots,
        "soak": measure_soak,
        "peer": measure_peer,
        "start": measure_start,
    }
    with tempfile.TemporaryDirectory() as folder:
        for part in FLAGS.parts:
            names = ["model", "seed", "slots_s", "soak_s", "soak_clients", "peer_s"]
            record = provenance_of("bench.serve", names, [f"--parts={part}", "--out=OUT"])
            results[part] = {**measures[part](f"--compilation_cache={folder}"), "run": record}
            if out:
                write_json(out, results)
    print_table(
        ("part", "rule", "passed"),
        [(part, values["rule"], str(values["passed"])) for part, values in results.items()],
    )


if __name__ == "__main__":
    launch(main)
