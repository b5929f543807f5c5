"""Devices as data: every number of a phone with its unit, its source and its status.

A device file is JSON. `numbers` maps names of `UNITS` to a value, a status and a source. `like`
names another device whose numbers fill the gaps; these count as assumed, since they describe
another phone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge import files
from glm_edge.errors import DataError
from glm_edge.tables import text_table

DATA = Path(__file__).parent / "data"
ENGINES = ("cpu", "gpu", "npu")
MEASURED, PUBLISHED, ASSUMED = "measured", "published", "assumed"
STATUSES = (MEASURED, PUBLISHED, ASSUMED)
ALIKE_DEPTH = 4


def _units() -> dict[str, tuple[str, float, float]]:
    """Build the table of numbers: unit, and the physical range (exclusive of its lower end)."""
    units = {
        "dram.bandwidth_bytes_s": ("bytes/s", 1e6, 1e14),
        "dram.shared_share": ("of the peak", 0.0, 1.0),
        "dram.energy_j_byte": ("J/byte", 0.0, 1e-8),
        "dram.capacity_bytes": ("bytes", 1e3, 1e13),
        "dram.usable_share": ("of the capacity", 0.0, 1.0),
        "storage.sequential_bytes_s": ("bytes/s", 1e3, 1e12),
        "battery.energy_j": ("J", 1.0, 1e8),
        "phone.base_power_w": ("W", 0.0, 100.0),
        "cpu.power_scale": ("of the table", 0.0, 10.0),
        "thermal.leakage_fold_k": ("K", 1.0, 1e3),
        "thermal.spreader_to_case_k_w": ("K/W", 0.0, 1e3),
        "thermal.case_to_air_k_w": ("K/W", 0.0, 1e3),
        "thermal.spreader_j_k": ("J/K", 0.0, 1e5),
        "thermal.case_j_k": ("J/K", 0.0, 1e5),
        "limits.hot_c": ("C", -50.0, 200.0),
        "limits.cool_c": ("C", -50.0, 200.0),
        "limits.low_speed": ("of top speed", 0.0, 1.0),
        "limits.critical_c": ("C", -50.0, 200.0),
        "limits.skin_c": ("C", -50.0, 100.0),
        "limits.sustainable_w": ("W", 0.0, 1e3),
    }
    for engine in ENGINES:
        units |= {
            f"{engine}.ops_s": ("operations/s", 1e3, 1e18),
            f"{engine}.bandwidth_share": ("of the peak", 0.0, 1.0),
            f"{engine}.stall_share": ("of switching power", 0.0, 1.0),
            f"{engine}.idle_share": ("of switching power", 0.0, 1.0),
            f"{engine}.leakage_w_v": ("W/V at 25 C", 0.0, 100.0),
            f"thermal.{engine}_to_spreader_k_w": ("K/W", 0.0, 1e3),
            f"thermal.{engine}_j_k": ("J/K", 0.0, 1e4),
        }
        if engine != "cpu":
            units |= {
                f"{engine}.top_power_w": ("W", 0.0, 1e3),
                f"{engine}.power_exponent": ("", 1.0, 4.0),
                f"{engine}.top_voltage_v": ("V", 0.1, 5.0),
            }
    return units


UNITS = _units()
# Zero is physical for these numbers only.
_ZERO_ALLOWED = ("leakage_w_v", "idle_share", "stall_share", "base_power_w", "energy_j_byte")


@dataclass(frozen=True)
class Number:
    """A value of a device.

    Attributes:
      value: in the unit of `UNITS`.
      status: `measured` (on this device), `published` (by its maker or a kernel), or `assumed`.
      source: origin of the value, or the reason for the assumption.
    """

    value: float
    status: str
    source: str


@dataclass(frozen=True)
class OppTable:
    """Operating points of one CPU core.

    Attributes:
      core: name, such as `cortex-x3`.
      frequency_hz: ascending frequencies [K].
      voltage_v: voltages [K].
      power_w: power of one busy core [K], None if only a coefficient is published.
      coefficient_w_hz_v2: published coefficient of `C f V^2`, None if there is none.
      status: see `Number`.
      source: origin of the table.
    """

    core: str
    frequency_hz: np.ndarray
    voltage_v: np.ndarray
    power_w: np.ndarray | None
    coefficient_w_hz_v2: float | None
    status: str
    source: str

    @property
    def speed(self) -> np.ndarray:
        """Frequencies relative to the highest one [K]."""
        return self.frequency_hz / self.frequency_hz[-1]

    def power_at(self, speed: np.ndarray) -> np.ndarray:
        """Interpolate the power of one core in watts at relative speeds.

        Args:
          speed: relative speeds, 1 for the highest point.

        Returns:
          Watts; below the lowest point, those of the lowest point.
        """
        power = self.power_w
        if power is None:
            power = (self.coefficient_w_hz_v2 or 0.0) * self.frequency_hz * self.voltage_v**2
        return np.interp(speed, self.speed, power)


@dataclass(frozen=True)
class Device:
    """A phone: its numbers with their sources, and the operating points of its engines.

    Attributes:
      name: name of the chip, such as `sm8550`.
      title: name for readers.
      numbers: value, status and source by name of `UNITS`.
      cores: count of CPU cores by `OppTable`, those that work together on a model.
    """

    name: str
    title: str
    numbers: Mapping[str, Number]
    cores: tuple[tuple[OppTable, int], ...] = field(repr=False)

    @property
    def values(self) -> dict[str, float]:
        """Values by name."""
        return {name: number.value for name, number in self.numbers.items()}

    @property
    def assumed(self) -> tuple[str, ...]:
        """Names of assumed numbers, which intervals vary."""
        return tuple(n for n, number in self.numbers.items() if number.status == ASSUMED)

    def cpu_points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Combine the tables of the CPU's cores at the speeds of the first.

        Returns:
          Relative speeds, voltages in volts, and power in watts of all cores, [K] each.
        """
        first = self.cores[0][0]
        power = np.sum([n * table.power_at(first.speed) for table, n in self.cores], axis=0)
        return first.speed, first.voltage_v, power

    def __str__(self) -> str:
        rows = [
            (name, f"{number.value:.4g}", UNITS[name][0], number.status, number.source)
            for name, number in self.numbers.items()
        ]
        return f"{self.title} ({self.name})\n" + text_table(
            ("number", "value", "unit", "status", "source"), rows
        )


def opp_tables(chip: str) -> dict[str, OppTable]:
    """Read the operating points of a chip's CPU cores.

    Args:
      chip: name in `data/cpu_tables.json`: `sm8550` (measured), `gs101`, `rk3588`.

    Returns:
      Tables by name of the core.

    Raises:
      DataError: there is no table of that chip.
    """
    chips = files.read_json(DATA / "cpu_tables.json", DataError)
    if chip not in chips:
        raise DataError(f"opp_tables: no table of {chip!r:.60}; known: {', '.join(chips)}")
    entry = chips[chip]
    return {
        core: OppTable(
            core,
            np.array(columns["frequency_hz"], float),
            np.array(columns["voltage_v"], float),
            np.array(columns["power_w"], float) if "power_w" in columns else None,
            columns.get("published_coefficient_w_hz_v2"),
            entry["status"],
            entry["source"],
        )
        for core, columns in entry["cores"].items()
    }


def names() -> tuple[str, ...]:
    """List the devices that the package describes."""
    others = ("cpu_tables", "decode_rows")
    return tuple(sorted(p.stem for p in DATA.glob("*.json") if p.stem not in others))


def device(name: str | Path) -> Device:
    """Read a device.

    Args:
      name: name of a device of the package (`names()`), or path of a device file.

    Returns:
      The device, checked.

    Raises:
      DataError: the device is unknown; or a number is missing, unknown, or not physical. The
        message names the file and the number.

    Example:
      >>> device("sm8550").numbers["dram.bandwidth_bytes_s"].status
      'published'
    """
    return _read(_path_of(name), 0)


def _path_of(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix == ".json":
        return path
    if str(name) not in names():
        raise DataError(
            f"device: {str(name)!r:.60} is unknown; known: {', '.join(names())}, or a path of a "
            "JSON file"
        )
    return DATA / f"{name}.json"


def _read(path: Path, depth: int) -> Device:
    fields = files.read_json(path, DataError)
    where = files.shown_path(path)
    unknown = set(fields) - {"title", "like", "cpu", "numbers"}
    if unknown:
        raise DataError(
            f"{where}: unknown field {min(unknown)!r:.60}; use title, like, cpu, numbers"
        )
    numbers: dict[str, Number] = {}
    cores: tuple[tuple[OppTable, int], ...] = ()
    if "like" in fields:
        if depth >= ALIKE_DEPTH:
            raise DataError(f"{where}: like= refers to more than {ALIKE_DEPTH} files in a row")
        base = _read(_path_of(str(fields["like"])), depth + 1)
        cores = base.cores
        numbers = {
            name: Number(number.value, ASSUMED, f"as {base.name}: {number.source}")
            for name, number in base.numbers.items()
        }
    listed = fields.get("numbers", {})
    if not isinstance(listed, dict):
        raise DataError(f"{where}: numbers must be an object of names")
    for name, entry in listed.items():
        numbers[name] = _number(where, name, entry)
    if "cpu" in fields:
        cores = _cores(where, fields["cpu"])
    missing = [name for name in UNITS if name not in numbers]
    if missing:
        raise DataError(f"{where}: number {missing[0]!r} is missing ({UNITS[missing[0]][0]})")
    if not cores:
        raise DataError(f"{where}: cpu= is missing, the tables and counts of its cores")
    values = {name: number.value for name, number in numbers.items()}
    if not values["limits.cool_c"] < values["limits.hot_c"] < values["limits.critical_c"]:
        raise DataError(
            f"{where}: limits must ascend: cool_c {values['limits.cool_c']:g}, hot_c "
            f"{values['limits.hot_c']:g}, critical_c {values['limits.critical_c']:g}"
        )
    ordered = {name: numbers[name] for name in UNITS}
    return Device(path.stem, str(fields.get("title", path.stem)), ordered, cores)


def _number(where: str, name: str, entry: Any) -> Number:
    if name not in UNITS:
        raise DataError(f"{where}: number {name!r:.60} is unknown")
    if not isinstance(entry, dict) or set(entry) != {"value", "status", "source"}:
        raise DataError(f"{where}: number {name!r} must have exactly value, status and source")
    value, status, source = entry["value"], entry["status"], entry["source"]
    if status not in STATUSES:
        raise DataError(
            f"{where}: number {name!r} has status {status!r:.60}; use {', '.join(STATUSES)}"
        )
    if not isinstance(source, str) or not source.strip():
        raise DataError(f"{where}: number {name!r} has no source")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: number {name!r} must be a finite number, not {value!r:.60}")
    unit, low, high = UNITS[name]
    if not (low < value <= high or (value == 0 and name.endswith(_ZERO_ALLOWED))):
        raise DataError(
            f"{where}: number {name!r} is {value:g} {unit}, outside of the physical range {low:g} "
            f"to {high:g}"
        )
    return Number(float(value), status, source)


def _cores(where: str, fields: Any) -> tuple[tuple[OppTable, int], ...]:
    valid = isinstance(fields, dict) and set(fields) == {"table", "cores"}
    if not valid or not isinstance(fields["cores"], dict) or not fields["cores"]:
        raise DataError(f"{where}: cpu must have table (a chip) and cores (counts by name)")
    tables = opp_tables(str(fields["table"]))
    for core, count in fields["cores"].items():
        if core not in tables or type(count) is not int or count < 1:
            raise DataError(
                f"{where}: cpu core {core!r:.60} needs a count of at least 1 and one of the tables "
                f"{', '.join(tables)}"
            )
        if tables[core].power_w is None and tables[core].coefficient_w_hz_v2 is None:
            raise DataError(f"{where}: cpu core {core!r} has neither power nor a coefficient")
    return tuple((tables[core], count) for core, count in fields["cores"].items())


@dataclass(frozen=True)
class DecodeRow:
    """A published speed of a model on a device.

    Attributes:
      chip: name of the chip.
      phone: name of the product.
      engine: `cpu`, `gpu` or `npu`.
      runtime: name of the program.
      model: name of the model.
      format: weights' format as published.
      bytes_per_token: weights, and cache if stated, that one token reads, in bytes.
      layers: count of decoder layers.
      decode_tokens_s: published tokens per second.
      prefill_tokens_s: published prompt tokens per second, or None.
      body_parameters: parameters without embedding and head, or None.
      bytes_known: `exact`, `assumed bits of some tensors`, or `guessed`.
      source: where the speed is published.
      note: how the bytes were obtained.
      bandwidth_bytes_s: peak bandwidth of the chip's memory.
      is_phone: False for laptops and boards.
    """

    chip: str
    phone: str
    engine: str
    runtime: str
    model: str
    format: str
    bytes_per_token: int
    layers: int
    decode_tokens_s: float
    prefill_tokens_s: float | None
    body_parameters: int | None
    bytes_known: str
    source: str
    note: str
    bandwidth_bytes_s: float
    is_phone: bool

    @property
    def usable(self) -> bool:
        """True for phones and known bytes, the rows that fits and validation use."""
        return self.is_phone and self.bytes_known != "guessed"

    @property
    def runtime_engine(self) -> tuple[str, str]:
        """Runtime and engine, the class whose efficiency is fitted."""
        return self.runtime, self.engine


def decode_rows() -> tuple[DecodeRow, ...]:
    """Read the published speeds against which the package is validated."""
    fields = files.read_json(DATA / "decode_rows.json", DataError)
    others = fields["other_chips"]
    chips: Sequence[str] = names()
    bandwidth = {name: device(name).values["dram.bandwidth_bytes_s"] for name in chips}
    bandwidth |= {name: entry["value"] for name, entry in others.items()}
    return tuple(
        DecodeRow(**row, bandwidth_bytes_s=bandwidth[row["chip"]], is_phone=row["chip"] in chips)
        for row in fields["rows"]
    )
