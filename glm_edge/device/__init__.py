"""A phone on paper: roofline, power, heat, governors and scheduling, simulated from data.

`predict` answers in one call; the modules below it are its parts.
"""

from glm_edge.device import (
    governors,
    loader,
    power,
    roofline,
    schedule,
    search,
    sensors,
    thermal,
    workload,
)
from glm_edge.device.machine import Machine, machine, stacked, variations
from glm_edge.device.predict import Interval, Prediction, PredictOptions, predict
from glm_edge.device.schedule import Task
from glm_edge.device.simulate import Result, simulate
from glm_edge.device.specs import Device, decode_rows, device, names, opp_tables
from glm_edge.device.ticks import run

__all__ = [
    "Device",
    "Interval",
    "Machine",
    "PredictOptions",
    "Prediction",
    "Result",
    "Task",
    "decode_rows",
    "device",
    "governors",
    "loader",
    "machine",
    "names",
    "opp_tables",
    "power",
    "predict",
    "roofline",
    "run",
    "schedule",
    "search",
    "sensors",
    "simulate",
    "stacked",
    "thermal",
    "variations",
    "workload",
]


def __dir__() -> list[str]:
    return __all__
