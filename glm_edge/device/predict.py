"""Predicted speed, energy and heat of a model on a phone, with intervals.

Two sources of doubt enter an interval. Every assumed number of the device varies by 30 %. The speed
varies by the errors that the fit makes for phones whose rows it does not use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from glm_edge.configs import GLMConfig
from glm_edge.device import governors, loader, roofline, workload
from glm_edge.device.machine import AMBIENT_C, Machine, machine, stacked, variations
from glm_edge.device.schedule import TaskArrays
from glm_edge.device.specs import ENGINES, Device, decode_rows
from glm_edge.device.specs import device as read_device
from glm_edge.device.ticks import BASE, THROTTLED, run
from glm_edge.errors import ConfigError, DataError, require
from glm_edge.params import Format
from glm_edge.params.tree import Params
from glm_edge.tables import text_table

TICK_S, SAMPLE_S = 0.25, 5.0
LATER_S = 600.0
DEFAULT_CONTEXT = 1024
HOUR_S = 3600.0
LOW, HIGH = 0.05, 0.95
# Activations are estimated, not measured.
ACTIVATION_SPREAD = 0.3
# A speed within this share of the cold one does not count as throttled.
NOTICEABLE = 0.02


class Interval(NamedTuple):
    """A simulated value and its 90 % interval.

    Attributes:
      value: with all numbers as they are.
      low: 5 % quantile over varied assumptions.
      high: 95 % quantile.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Interval":
        """Build an interval from a first value as it is, and varied values."""
        low, high = np.quantile(values[1:], [LOW, HIGH])
        return cls(float(values[0]), float(low), float(high))


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Further conditions of a prediction.

    Attributes:
      cache_dtype: type of keys and values.
      ambient_c: temperature of the air in C.
      draws: phones with varied assumptions, at least 8.
      seed: seed of the draws.
    """

    cache_dtype: str = "float32"
    ambient_c: float = AMBIENT_C
    draws: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Prediction:
    """Simulated answers for a model on a phone; it prints as a table.

    Attributes:
      device: the device.
      engine: engine that runs the model.
      runtime: program whose efficiency was used, None for the mean of all.
      context: tokens in the cache.
      first_token_s: seconds from a prompt of `context` tokens to the first answer token.
      tokens_s: tokens per second of a cool phone.
      later_tokens_s: tokens per second after ten minutes of decoding.
      token_j: joules of the phone per token, mean of the ten minutes.
      battery_percent_h: percent of the battery per hour of decoding.
      peak_bytes: weights, cache and activations, without the program.
      skin_c: temperature of the case after ten minutes.
      limit: what limits the speed of a cool phone: `bandwidth`, `fixed time per layer`, `products`,
        or `storage` if the model does not fit in memory.
      later_limit: what limits the speed after ten minutes: the same, `skin`, `die`, or `critical
        trip`.
      basis: rows and fits that the prediction comes from.
      draws: count of varied phones.
      trace_s: seconds of the samples [S].
      trace_tokens_s: tokens per second of each phone over time [draws + 1, S].
      trace_skin_c: temperature of the case [draws + 1, S].
    """

    device: Device
    engine: str
    runtime: str | None
    context: int
    first_token_s: Interval
    tokens_s: Interval
    later_tokens_s: Interval
    token_j: Interval
    battery_percent_h: Interval
    peak_bytes: Interval
    skin_c: Interval
    limit: str
    later_limit: str
    basis: tuple[str, ...]
    draws: int
    trace_s: np.ndarray
    trace_tokens_s: np.ndarray
    trace_skin_c: np.ndarray

    def rows(self) -> list[tuple[str, str, Interval]]:
        """List quantity, unit and interval of every answer."""
        return [
            (f"time to first token, prompt of {self.context}", "s", self.first_token_s),
            ("tokens per second, cool", "1/s", self.tokens_s),
            ("tokens per second, after 10 min", "1/s", self.later_tokens_s),
            ("energy per token, complete phone", "J", self.token_j),
            ("battery per hour of decoding", "%", self.battery_percent_h),
            ("peak memory, without the program", "GB", _scaled(self.peak_bytes, 1e-9)),
            ("case after 10 min", "C", self.skin_c),
        ]

    def __str__(self) -> str:
        cells = [
            (name, unit, *(f"{value:.3g}" for value in interval))
            for name, unit, interval in self.rows()
        ]
        program = self.runtime or "an unknown program"
        return "\n".join(
            [
                f"{self.device.title}, {self.engine}, {program}: simulated, not measured",
                text_table(("quantity", "unit", "simulated", "5 %", "95 %"), cells),
                f"limit: {self.limit}; after 10 min: {self.later_limit}",
                *self.basis,
            ]
        )

    def figure(self, path: str | Path) -> None:
        """Draw speed and skin temperature over ten minutes, with their intervals.

        Args:
          path: path of the PNG file.

        Raises:
          MissingExtraError: matplotlib is not installed.
        """
        drawing = require("matplotlib.figure", extra="plot").Figure(
            (8.4, 3.2), layout="constrained"
        )
        panels = zip(
            drawing.subplots(1, 2),
            (self.trace_tokens_s, self.trace_skin_c),
            ("tokens per second", "case, C"),
            strict=True,
        )
        for axis, values, label in panels:
            low, high = np.quantile(values[1:], [LOW, HIGH], axis=0)
            minutes = self.trace_s / 60
            axis.fill_between(minutes, low, high, alpha=0.25, label="5 to 95 %")
            axis.plot(minutes, values[0], label="simulated")
            axis.set(xlabel="minutes", ylabel=label, ylim=(0, None))
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        drawing.suptitle(f"{self.device.title}, {self.engine}, simulated", fontsize=10)
        drawing.savefig(path, dpi=120)


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(*(factor * value for value in interval))


def predict(
    model: nn.Module,
    params: Params,
    device: str | Path | Device = "sm8650",
    context: int | None = None,
    engine: str = "cpu",
    runtime: str | None = "LiteRT-LM",
    images: int = 0,
    clips: int = 0,
    formats: Mapping[str, Format] | None = None,
    options: PredictOptions | None = None,
) -> Prediction:
    """Predict speed, energy, memory and heat of a model on a phone.

    Args:
      model: a GLM.
      params: its parameters, arrays and boxes; abstract ones suffice, see
        `workload.abstract_params`.
      device: name of a device of the package, path of a device file, or a device.
      context: tokens of the prompt, those of images and clips included; also the tokens that a
        decoded token attends to. None means 1024, or the model's limit if that is less.
      engine: `cpu`, `gpu` or `npu`.
      runtime: program whose published speeds are used; None for the mean of all.
      images: images that the prompt contains.
      clips: recordings that the prompt contains.
      formats: formats of some matrices by path that are not yet quantized, such as a plan's.
      options: cache, air and draws; None takes the defaults.

    Returns:
      The prediction.

    Raises:
      ConfigError: the model is not a GLM, or lacks an encoder for `images` or `clips`.
      DataError: the device file is malformed, the engine is unknown, the context is too long, or
        there are fewer than 8 draws.

    Example:
      >>> model, params = ge.load(ge.shipped("nano"))
      >>> print(ge.device.predict(model, params, device="sm8650", context=512))
    """
    config = getattr(model, "config", None)
    if not isinstance(config, GLMConfig):
        raise ConfigError(f"predict: the model must be a GLM, not {type(model).__name__}")
    if engine not in ENGINES:
        raise DataError(f"predict: engine {engine!r:.60} is not one of {', '.join(ENGINES)}")
    options = options or PredictOptions()
    draws, cache_dtype = options.draws, options.cache_dtype
    if draws < 8:
        raise DataError(f"predict: draws={draws} is too few for an interval; use at least 8")
    phone = device if isinstance(device, Device) else read_device(device)
    if context is None:
        context = min(DEFAULT_CONTEXT, config.decoder.max_position_embeddings)
    sizes = workload.bytes_by_path(params, formats)
    token = workload.total(workload.decode_ops(config, sizes, context, cache_dtype))
    prompt = workload.prefill_ops(config, sizes, context, cache_dtype)
    prompt += images * workload.image_ops(config, sizes) if images else []
    prompt += clips * workload.clip_ops(config, sizes) if clips else []
    rows = decode_rows()
    fitted_rows = [row for row in rows if row.usable]
    efficiency = roofline.fit_efficiency(fitted_rows)
    errors = np.concatenate(list(roofline.log_errors_by_chip(fitted_rows).values()))
    rate = roofline.prefill_rate(rows, phone.name, runtime, engine)

    # The first phone is as described; the others vary.
    rng = np.random.default_rng(options.seed)
    values = [phone.values] + [
        phone.values | varied for varied in variations(phone, draws, options.seed)
    ]
    slower = np.exp(np.concatenate([[0.0], rng.choice(errors, draws)]))
    prompt_ops_s = rate.ops_s * np.exp(np.concatenate([[0.0], rng.normal(0, rate.spread, draws)]))
    peaks = workload.peak_bytes(config, sizes, context, cache_dtype)
    bandwidth = efficiency.share(runtime, engine) * _column(values, "dram.bandwidth_bytes_s")
    bandwidth /= slower
    layer_s = efficiency.layer_s * slower
    usable = _column(values, "dram.capacity_bytes") * _column(values, "dram.usable_share")
    # Encoders and the table of embeddings may leave memory after the prompt.
    room = usable - peaks["cache"] - peaks["activations"]
    memory_s = _memory_seconds(token, room, values, bandwidth)
    # Products of one token overlap with reading; a fixed time follows each layer.
    products_s = token.ops / prompt_ops_s
    token_s = np.maximum(memory_s, products_s) + token.layers * layer_s
    prompt_s = roofline.op_time_s(
        prompt, prompt_ops_s[:, None], bandwidth[:, None], layer_s[:, None]
    )
    # Weights that do not fit are read once per prompt, as for a token.
    first_s = np.maximum(np.asarray(prompt_s, float).sum(axis=1), memory_s)
    machines = [
        _with_rates(machine(phone, v, TICK_S, options.ambient_c), engine, *rates)
        for v, *rates in zip(values, prompt_ops_s, token.bytes / memory_s, strict=True)
    ]
    # Tokens per unit, so that a unit is not shorter than a step of the simulation.
    chunk = max(1, int(np.ceil(TICK_S / token_s.min())))
    tasks = _tasks(engine, chunk, token, layer_s)
    every = round(SAMPLE_S / TICK_S)
    ticks = round(LATER_S / TICK_S)
    policies = [governors.of_device(_replaced(phone, v)) for v in values]
    state, trace = jax.vmap(lambda m, p, t: run(m, p, t, steps=1, ticks=ticks, every=every))(
        stacked(machines), jax.tree.map(lambda *x: np.stack(x), *policies), tasks
    )
    totals = np.asarray(state.totals, float)
    speeds = np.asarray(trace.units_s, float)[:, :, 0] * chunk
    skin_c = np.asarray(trace.skin_c, float)
    energy_j = totals[:, : BASE + 1].sum(axis=1)
    tokens = speeds.mean(axis=1) * LATER_S
    later = speeds[:, -6:].mean(axis=1)
    limit = "storage"
    if token.weight_bytes <= room[0]:
        limit = _limit(memory_s[0], products_s[0], token.layers * layer_s[0])
    return Prediction(
        device=phone,
        engine=engine,
        runtime=runtime,
        context=context,
        first_token_s=Interval.of(first_s),
        tokens_s=Interval.of(1.0 / token_s),
        later_tokens_s=Interval.of(later),
        token_j=Interval.of(energy_j / np.maximum(tokens, 1.0)),
        battery_percent_h=Interval.of(
            100 * energy_j / LATER_S * HOUR_S / _column(values, "battery.energy_j")
        ),
        peak_bytes=_memory_interval(peaks),
        skin_c=Interval.of(skin_c[:, -1]),
        limit=limit,
        later_limit=_later_limit(
            limit, later[0] * token_s[0], bool(np.isfinite(state.off_s[0])), bool(state.hot[0] > 0)
        ),
        basis=(
            f"intervals: {draws} phones with assumed numbers varied by 30 %, and the fit's errors "
            "for other phones",
            f"decoding: {efficiency.rows} published rows, "
            + (
                f"{runtime} on the {engine} reaches {efficiency.share(runtime, engine):.2f} of the "
                "peak bandwidth"
                if (runtime, engine) in efficiency.shares
                else f"no row of {runtime} on the {engine}: the mean share of all"
            ),
            f"prompt: {rate.ops_s / 1e12:.2f}e12 operations per second, {rate.basis}",
            f"{int((token.weight_bytes > room[1:]).sum())} of the {draws} phones read weights from "
            "storage",
            f"throttled {100 * totals[0, THROTTLED] / LATER_S:.0f} % of the ten minutes",
        ),
        draws=draws,
        trace_s=SAMPLE_S * (np.arange(speeds.shape[1]) + 0.5),
        trace_tokens_s=speeds,
        trace_skin_c=skin_c,
    )


def _column(values: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([numbers[name] for numbers in values])


def _replaced(phone: Device, values: Mapping[str, float]) -> Device:
    """Return a device with other values of its numbers."""
    numbers = {
        name: number.__class__(values[name], number.status, number.source)
        for name, number in phone.numbers.items()
    }
    return Device(phone.name, phone.title, numbers, phone.cores)


def _memory_seconds(
    token: workload.Work,
    room: np.ndarray,
    values: list[dict[str, float]],
    bandwidth: np.ndarray,
) -> np.ndarray:
    """Compute the seconds of reading one token's weights and cache, from storage if need be."""
    storage = _column(values, "storage.sequential_bytes_s")
    weights_s = [
        loader.loaded_token_s(token.weight_bytes, *limits, max(token.layers, 1))
        for limits in zip(room, storage, bandwidth, strict=True)
    ]
    return np.array(weights_s) + token.cache_bytes / bandwidth


def _with_rates(phone: Machine, engine: str, ops_s: float, bandwidth: float) -> Machine:
    """Return a machine whose engine alone has these rates."""
    index = ENGINES.index(engine)
    rates, bandwidths = np.array(phone.ops_s), np.array(phone.bandwidth_bytes_s)
    rates[index], bandwidths[index] = ops_s, bandwidth
    return phone._replace(
        ops_s=rates,
        bandwidth_bytes_s=bandwidths,
        shared_bytes_s=np.maximum(phone.shared_bytes_s, bandwidth),
    )


def _tasks(engine: str, chunk: int, token: workload.Work, layer_s: np.ndarray) -> TaskArrays:
    """Build one decoding task per phone."""
    count = len(layer_s)

    def same(value: float) -> np.ndarray:
        return np.full((count, 1), value, float)

    return TaskArrays(
        engine=np.full((count, 1), ENGINES.index(engine)),
        ops=same(chunk * token.ops),
        bytes=same(chunk * token.bytes),
        fixed_s=chunk * token.layers * layer_s[:, None],
        priority=same(0.0),
        period_s=same(0.0),
        units=same(1.0),
        start_s=same(0.0),
    )


def _memory_interval(peaks: Mapping[str, int]) -> Interval:
    fixed, estimated = peaks["weights"] + peaks["cache"], peaks["activations"]
    return Interval(
        fixed + estimated,
        fixed + (1 - ACTIVATION_SPREAD) * estimated,
        fixed + (1 + ACTIVATION_SPREAD) * estimated,
    )


def _limit(memory_s: float, products_s: float, fixed_s: float) -> str:
    seconds = {"bandwidth": memory_s, "products": products_s, "fixed time per layer": fixed_s}
    return max(seconds, key=lambda name: seconds[name])


def _later_limit(limit: str, ratio: float, stopped: bool, hot: bool) -> str:
    if stopped:
        return "critical trip"
    if ratio >= 1.0 - NOTICEABLE:
        return limit
    return "die" if hot else "skin"
