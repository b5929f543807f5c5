"""State of a device: one file, replaced in one step, that names the installed releases."""

import dataclasses
import uuid
from dataclasses import dataclass
from pathlib import Path

from glm_edge.errors import UpdateError
from glm_edge.files import read_json
from glm_edge.writers import write_json, write_whole

STATE = "state.json"
MAX_DEVICE_LENGTH = 200


@dataclass(frozen=True, slots=True)
class State:
    """The pointer to the current release, and everything else that must change with it.

    Attributes:
      device: id of the device, which decides its part in a rollout.
      current: number of the installed release, None before the first one.
      previous: number of the release before it, None without one.
      skipped: releases that failed on this device.
      clock: time of the last trusted metadata in seconds since 1970.
    """

    device: str
    current: int | None = None
    previous: int | None = None
    skipped: tuple[int, ...] = ()
    clock: float = 0.0


def read_state(directory: Path, device: str | None) -> State:
    """Read the state, or begin a new one.

    Args:
      directory: directory of the device.
      device: id of the device; None keeps the stored one, or draws a random one.

    Returns:
      The state.

    Raises:
      UpdateError: the file or the id is malformed.
    """
    if device is not None and not (device.isprintable() and 0 < len(device) <= MAX_DEVICE_LENGTH):
        raise UpdateError(f"device={device!r:.60}: must be 1 to {MAX_DEVICE_LENGTH} characters")
    path = directory / STATE
    if not path.exists():
        return State(device or uuid.uuid4().hex)
    fields = read_json(path, UpdateError)
    try:
        fields["skipped"] = tuple(map(_number, fields["skipped"]))
        state = State(**fields)
        for release in (state.current, state.previous):
            if release is not None:
                _number(release)
        if not isinstance(state.device, str) or not isinstance(state.clock, int | float):
            raise TypeError("wrong type of 'device' or 'clock'")
    except (KeyError, TypeError) as error:
        raise UpdateError(f"{path}: is not the state of a device: {error}") from error
    return dataclasses.replace(state, device=device or state.device)


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is not the number of a release")
    return value


def write_state(directory: Path, state: State) -> None:
    """Replace the state in one step.

    Args:
      directory: directory of the device.
      state: new state.

    Raises:
      OutputError: the file cannot be written.
    """
    write_whole(directory / STATE, lambda path: write_json(path, dataclasses.asdict(state)))
