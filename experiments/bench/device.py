"""Validates the simulated phone against published speeds, a measured table of power, and physics.

    python -m experiments.bench.device --out=FILE.json

Prints every published row, the worst first, and one line per check:

  conservation  heat in = heat stored + heat to the air, in float32 and float64; steady state of
                the network; releases of a clock after an hour
  decoding      speeds of every phone predicted from the rows of other phones: median error with its
                bootstrap interval over phones, rank correlation, and two simpler predictors
  power         `C f V^2` fitted to the measured cores of Snapdragon 8 Gen 2
  throttling    three runtimes on iPhone 17 Pro, with parameters that were fitted to these rows
  preemption    frames that are dropped beside decoding
  loading       hit rates of blocks against Belady's bound
  speed         simulated seconds per second of 64 policies; the same result alone and in a batch

Every predicted value is simulated. The exit status is 1 if a check fails; `speed` does not fail,
since it depends on the load of the machine.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy import stats

from experiments.common import device_scenarios as scenarios
from experiments.common.provenance import provenance_of
from glm_edge.cli.console import launch, print_table, refuse_arguments
from glm_edge.cli.corpora import check_absent, write_text
from glm_edge.device import governors, loader, power, roofline
from glm_edge.device.machine import machine, thermal_network
from glm_edge.device.schedule import Task, arrays_of
from glm_edge.device.simulate import simulate
from glm_edge.device.specs import DecodeRow, decode_rows, device, opp_tables
from glm_edge.device.thermal import steady_rise_k
from glm_edge.device.ticks import BASE, LOST, run

FLAGS = flags.FLAGS
BOOTSTRAPS = 2000
LAYERS, TOKENS = 40, 60


class Check(NamedTuple):
    """A line of the result.

    Attributes:
      name: name of the check.
      value: simulated value.
      bound: the bound that it must satisfy, as text.
      passed: True if it does, None if the check only reports.
    """

    name: str
    value: float
    bound: str
    passed: bool | None


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string("out", None, "JSON file for the results.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --out file.")
    flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.")
    flags.DEFINE_list("only", list(PARTS), "Parts to run.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    check_absent(FLAGS.out, FLAGS.overwrite)
    checks, log = [], {}
    for name in FLAGS.only:
        part_checks, log[name] = PARTS[name]()
        checks += part_checks
    print("\nchecks; all values are simulated")
    print_table(
        ("check", "value", "bound", "passed"),
        [(c.name, f"{c.value:.3g}", c.bound, SHOWN[c.passed]) for c in checks],
    )
    if FLAGS.out:
        report = {
            **provenance_of("bench.device", ("seed",)),
            "checks": [check._asdict() for check in checks],
            **log,
        }
        write_text(FLAGS.out, json.dumps(report, indent=1) + "\n", FLAGS.overwrite)
    if any(check.passed is False for check in checks):
        sys.exit(1)


SHOWN = {True: "yes", False: "NO", None: "-"}


def at_most(name: str, value: float, bound: float) -> Check:
    """Check that a value is at most a bound."""
    return Check(name, float(value), f"at most {bound:g}", bool(value <= bound))


def at_least(name: str, value: float, bound: float) -> Check:
    """Check that a value is at least a bound."""
    return Check(name, float(value), f"at least {bound:g}", bool(value >= bound))


def conservation() -> tuple[list[Check], dict[str, Any]]:
    """Compare heat in with heat stored and lost, and the steady state with its solution."""
    checks = []
    for bits, bound in ((32, 1e-4), (64, 1e-9)):
        with jax.enable_x64(bits == 64):
            phone = machine(device("sm8550"))
            tasks = [scenarios.DECODE, scenarios.FRAME]
            state = simulate(phone, governors.policy("performance"), tasks, 120.0).state
            totals = np.asarray(state.totals, float)
            put = totals[: BASE + 1].sum()
            stored = (np.asarray(phone.capacity_j_k) * np.asarray(state.rise_k, float)).sum()
            gap = abs(put - stored - totals[LOST]) / put
            checks.append(at_most(f"energy of 120 s, relative gap, float{bits}", gap, bound))
    checks.append(at_most("steady state against the linear solution, K", steady_gap_k(), 0.05))
    seconds = 3600.0
    clock = Task("clock", "npu", 4e11, period_s=0.3)
    policy = governors.policy("performance")
    result = simulate(machine(device("sm8550"), tick_s=0.1), policy, [clock], seconds, 10, 10.0)
    gap = abs(float(result.state.released[0]) - seconds / clock.period_s)
    checks.append(at_most("releases after an hour, difference", gap, 1.0))
    return checks, {}


def steady_gap_k() -> float:
    """Simulate a small phone until its temperatures are constant; return the largest difference."""
    small = {"thermal.case_j_k": 2.0, "thermal.spreader_j_k": 0.5}
    small |= {f"thermal.{engine}_j_k": 0.05 for engine in ("cpu", "gpu", "npu")}
    small |= {f"{engine}.leakage_w_v": 0.0 for engine in ("cpu", "gpu", "npu")}
    phone_device = device("sm8550")
    phone = machine(phone_device, small)
    policy = governors.policy("performance")
    result = simulate(phone, policy, [scenarios.DECODE], 120.0)
    longer = simulate(phone, policy, [scenarios.DECODE], 121.0)
    # The heat of the last second, when nothing changes any more.
    joules = np.asarray(longer.state.totals, float) - np.asarray(result.state.totals, float)
    seconds = longer.seconds - result.seconds
    network = thermal_network(phone_device.values | small)
    expected = steady_rise_k(network, joules[: BASE + 1] / seconds)
    return float(np.abs(np.asarray(longer.state.rise_k, float) - expected).max())


def decoding() -> tuple[list[Check], dict[str, Any]]:
    """Predict every published speed from the rows of other phones."""
    rows = [row for row in decode_rows() if row.usable]
    chips = sorted({row.chip for row in rows})
    by_chip = {chip: [row for row in rows if row.chip == chip] for chip in chips}
    errors = roofline.log_errors_by_chip(rows)
    lines = []
    for chip in chips:
        others = np.concatenate([errors[other] for other in chips if other != chip])
        low, high = np.quantile(others, [0.05, 0.95])
        known = {row.runtime_engine for row in rows if row.chip != chip}
        for row, error in zip(by_chip[chip], errors[chip], strict=True):
            predicted = row.decode_tokens_s * np.exp(error)
            lines.append(
                {
                    "chip": chip,
                    "runtime": row.runtime,
                    "engine": row.engine,
                    "model": row.model,
                    "format": row.format,
                    "published": row.decode_tokens_s,
                    "simulated": predicted,
                    "low": predicted * np.exp(-high),
                    "high": predicted * np.exp(-low),
                    "error": float(np.expm1(error)),
                    "known": row.runtime_engine in known,
                    "source": row.source,
                }
            )
    lines.sort(key=lambda line: -abs(line["error"]))
    print(f"decoding, {len(lines)} published rows; simulated from the rows of other phones")
    print_table(
        ("chip", "runtime", "engine", "model", "published", "simulated", "90 % interval", "error"),
        [
            (
                line["chip"],
                line["runtime"],
                line["engine"],
                line["model"],
                f"{line['published']:.1f}",
                f"{line['simulated']:.1f}",
                f"{line['low']:.1f} to {line['high']:.1f}",
                f"{100 * line['error']:+.0f} %",
            )
            for line in lines
        ],
    )
    unused = [row for row in decode_rows() if not row.usable]
    fitted = roofline.fit_efficiency(rows)
    print(f"\nnot fitted, laptops, boards and guessed bytes: {len(unused)} rows")
    print_table(
        ("chip", "runtime", "engine", "model", "published", "simulated"),
        [
            (r.chip, *r.runtime_engine, r.model, r.decode_tokens_s, f"{fitted.row_tokens_s(r):.1f}")
            for r in unused
        ],
    )
    shares = {" ".join(name): round(share, 2) for name, share in fitted.shares.items()}
    print(f"\nfitted to these rows: {1e6 * fitted.layer_s:.0f} us per layer, shares {shares}")
    all_errors = np.abs([line["error"] for line in lines])
    known_errors = np.abs([line["error"] for line in lines if line["known"]])
    inside = np.mean([line["low"] <= line["published"] <= line["high"] for line in lines])
    low, high = bootstrap_median({c: np.abs(np.expm1(e)) for c, e in errors.items()})
    one = np.median(factor_errors(rows, lambda row: 0))
    engine = np.median(factor_errors(rows, lambda row: row.engine))
    rank = stats.spearmanr(
        [line["published"] for line in lines], [line["simulated"] for line in lines]
    ).statistic
    checks = [
        at_most("decoding, median error", np.median(all_errors), 0.22),
        Check("  90 % bootstrap interval over phones, low", low, "-", None),
        Check("  90 % bootstrap interval over phones, high", high, "-", None),
        at_most("decoding, median error, runtime known", np.median(known_errors), 0.18),
        at_least("decoding, Spearman's rank correlation", rank, 0.9),
        at_least(
            "median error of one share per engine, over ours", engine - np.median(all_errors), 0.0
        ),
        Check("  median error of one share per engine", float(engine), "-", None),
        Check("  median error of one share for all", float(one), "-", None),
        Check("  share of rows within their 90 % interval", float(inside), "-", None),
        Check("  share of rows within 25 %", float(np.mean(all_errors <= 0.25)), "-", None),
    ]
    return checks, {"rows": lines, "layer_s": fitted.layer_s, "shares": shares}


def factor_errors(rows: Sequence[DecodeRow], group: Callable[[DecodeRow], Any]) -> list[float]:
    """Predict with the mean share of bandwidth of the same group on other phones."""

    def share(row: DecodeRow) -> float:
        return row.bytes_per_token * row.decode_tokens_s / row.bandwidth_bytes_s

    errors = []
    for row in rows:
        same = [r for r in rows if group(r) == group(row) and r.chip != row.chip]
        if same:
            mean = np.exp(np.mean(np.log([share(other) for other in same])))
            errors.append(abs(mean / share(row) - 1))
    return errors


def bootstrap_median(errors: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the 90 % interval of the median over resampled phones."""
    rng = np.random.default_rng(FLAGS.seed)
    chips = sorted(errors)
    medians = [
        np.median(np.concatenate([errors[chip] for chip in rng.choice(chips, len(chips))]))
        for _ in range(BOOTSTRAPS)
    ]
    low, high = np.quantile(medians, [0.05, 0.95])
    return float(low), float(high)


def powers() -> tuple[list[Check], dict[str, Any]]:
    """Fit the measured cores of Snapdragon 8 Gen 2."""
    checks, log = [], {}
    for core, table in opp_tables("sm8550").items():
        # The static part of the little core is hidden in its switching power.
        static = core == "cortex-a510"
        coefficient, per_volt, errors = power.fit_coefficient(table, static)
        bound = 0.16 if static else 0.10
        label = f"{core}, worst error of C f V^2{' + b V' if static else ''}"
        checks.append(at_most(label, np.abs(errors).max(), bound))
        log[core] = {
            "coefficient_w_hz_v2": coefficient,
            "static_w_v": per_volt,
            "median": float(np.median(np.abs(errors))),
            "worst": float(np.abs(errors).max()),
        }
    return checks, log


def throttlings() -> tuple[list[Check], dict[str, Any]]:
    """Compare the throttling of three runtimes with the published one."""
    simulated = scenarios.throttling()
    print("\nthrottling of iPhone 17 Pro; 13 parameters were fitted to these 9 values")
    print_table(
        ("runtime", "-10 %, s", "simulated", "-25 %, s", "simulated", "share", "simulated"),
        [
            (
                name,
                published[0],
                simulated[name].first_s,
                published[1],
                simulated[name].second_s,
                published[2],
                f"{simulated[name].share:.2f}",
            )
            for name, published in scenarios.THROTTLING.items()
        ],
    )
    fitted = {**scenarios.FITTED, **{f"W of {k}": v for k, v in scenarios.FITTED_W.items()}}
    print(
        f"fitted: {fitted}, die {scenarios.FITTED_DIE_C} C, skin {scenarios.FITTED_SKIN_C} C, gain "
        f"{scenarios.FITTED_GAIN_W_K} W/K"
    )
    shares, ratios = [], []
    for name, published in scenarios.THROTTLING.items():
        shares.append(abs(simulated[name].share - published[2]))
        pairs = zip(published[:2], simulated[name][:2], strict=True)
        ratios += [max(a / b, b / a) for a, b in pairs]
    later = {name: scenarios.FIRST_TOKENS_S[name] * simulated[name].share for name in simulated}
    checks = [
        at_most("throttling, difference of shares after 10 min", max(shares), 0.06),
        at_most("throttling, ratio of times", max(ratios), 2.0),
        at_least(
            "tokens per second after 10 min, npu over gpu (MLX)",
            later["Core ML, npu"] / later["MLX, gpu"],
            1.0,
        ),
    ]
    return checks, {name: value._asdict() for name, value in simulated.items()}


def preemptions() -> tuple[list[Check], dict[str, Any]]:
    """Count the frames that are dropped beside decoding."""
    results = scenarios.preemption()
    dropped = {name: result.late_share("frame") for name, result in results.items()}
    tokens = {name: result.results_s("decode") for name, result in results.items()}
    checks = [
        at_least("frames dropped, token boundaries", dropped["token boundaries"], 0.5),
        at_most("frames dropped, layer boundaries", dropped["layer boundaries"], 0.0),
        at_least(
            "tokens per second, layer over token boundaries",
            tokens["layer boundaries"] / tokens["token boundaries"],
            0.85,
        ),
    ]
    return checks, {"dropped": dropped, "tokens_s": tokens}


def loading() -> tuple[list[Check], dict[str, Any]]:
    """Compare hit rates of policies with Belady's."""
    accesses = loader.layers_in_order(LAYERS, TOKENS)
    rates: dict[str, list[float]] = {policy: [] for policy in loader.POLICIES}
    capacities = (10, 20, 30, 36, 39)
    for capacity in capacities:
        for policy in loader.POLICIES:
            trace = loader.simulate_loading([1] * LAYERS, accesses, capacity, 1.0, 1.0, policy)
            rates[policy].append(trace.hit_rate)
    best = np.array(rates["belady"])
    bounds = np.array([loader.hit_rate_bound(LAYERS, capacity) for capacity in capacities])
    others = max(np.max(np.array(rates[policy]) - best) for policy in loader.POLICIES)
    checks = [
        at_most("hit rate of LRU", max(rates["lru"]), 0.0),
        at_most("MRU against Belady, difference", np.abs(np.array(rates["mru"]) - best).max(), 0.0),
        at_most("Belady above (capacity - 1) / (layers - 1)", (best - bounds).max(), 0.0),
        at_most("best policy above Belady", others, 0.0),
    ]
    return checks, {"capacities": capacities, "hit_rates": rates}


def speeds() -> tuple[list[Check], dict[str, Any]]:
    """Time 64 policies, and compare one of them alone with the batch."""
    phone = machine(device("sm8550"))
    tasks = arrays_of([scenarios.DECODE, scenarios.FRAME])
    count, ticks = 64, 500
    limits = [
        governors.policy(die=governors.allocator(control, 3.0))
        for control in np.linspace(55.0, 95.0, count)
    ]
    policies = jax.tree.map(lambda *values: jnp.stack(values), *limits)
    several = jax.jit(
        jax.vmap(lambda policy: run(phone, policy, tasks, steps=20, ticks=ticks, every=ticks)[0])
    )
    start, start_cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(several(policies))
    first_s, first_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        batch = jax.block_until_ready(several(policies))
        seconds.append(time.perf_counter() - start)
    simulated = count * ticks * float(phone.step.seconds)
    alone = run(phone, limits[7], tasks, steps=20, ticks=ticks, every=ticks)[0]
    done = abs(float(alone.done[0]) - float(batch.done[7, 0]))
    energy = np.abs(np.asarray(alone.totals[:LOST]) - np.asarray(batch.totals[7][:LOST])).sum()
    checks = [
        at_most("units, alone against in a batch", done, 0.0),
        at_most("energy in J, alone against in a batch", energy, 1e-3),
        Check(
            "simulated s per s, 64 policies, best of 3", simulated / min(seconds), ">= 1000", None
        ),
        Check("first call, s", first_s, "<= 15", None),
        Check("first call, s of processor time", first_cpu_s, "-", None),
    ]
    return checks, {"seconds": seconds, "simulated_s": simulated}


PARTS: dict[str, Callable[[], tuple[list[Check], dict[str, Any]]]] = {
    "conservation": conservation,
    "decoding": decoding,
    "power": powers,
    "throttling": throttlings,
    "preemption": preemptions,
    "loading": loading,
    "speed": speeds,
}

if __name__ == "__main__":
    define_flags()
    launch(main)
