"""Rollout: the release of a device, a pure function of its id and a signed percentage."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from glm_edge.errors import UpdateError
from glm_edge.files import parse_json

# A percentage has two decimals.
BUCKETS = 10_000


@dataclass(frozen=True, slots=True)
class Channel:
    """The releases on offer.

    Attributes:
      stable: release for every device, None before the first one.
      candidate: release for a part of the devices, or None.
      percentage: part of the devices that receive the candidate, 0 to 100.
    """

    stable: int | None = None
    candidate: int | None = None
    percentage: float = 0.0

    def release_of(self, device: str) -> int | None:
        """Return the release for a device.

        Args:
          device: id of the device.

        Returns:
          The number of a release, None if there is none for this device.
        """
        if self.candidate and in_rollout(device, self.candidate, self.percentage):
            return self.candidate
        return self.stable


def in_rollout(device: str, release: int, percentage: float) -> bool:
    """Test that a device belongs to the first `percentage` of devices for a release.

    A device that belongs to a percentage belongs to every larger one. Each release begins with
    other devices, so that the same ones do not always take the risk.

    Args:
      device: id of the device.
      release: number of the release.
      percentage: 0 to 100, in steps of 0.01.

    Returns:
      Membership of the device.
    """
    digest = hashlib.sha256(f"{release}/{device}".encode("utf-8", "surrogatepass")).digest()
    bucket = int.from_bytes(digest[:8], "big") % BUCKETS
    return bucket < round(percentage * BUCKETS / 100)


def check_percentage(percentage: float) -> None:
    """Raise UpdateError unless a percentage is between 0 and 100."""
    number = isinstance(percentage, int | float) and not isinstance(percentage, bool)
    if not number or not math.isfinite(percentage) or not 0 <= percentage <= 100:
        raise UpdateError(f"percentage={percentage!r:.40}: must be between 0 and 100")


def channel_json(channel: Channel) -> bytes:
    """Write a channel as JSON."""
    fields = {
        "stable": channel.stable,
        "candidate": channel.candidate,
        "percentage": channel.percentage,
    }
    return json.dumps(fields).encode()


def channel_from_json(text: bytes, where: str) -> Channel:
    """Read a channel.

    Args:
      text: result of `channel_json`.
      where: name for messages.

    Returns:
      The channel.

    Raises:
      UpdateError: the text is not a channel.
    """
    fields = parse_json(text, where, UpdateError)
    if not isinstance(fields, dict):
        raise UpdateError(f"{where}: must be a JSON object")
    percentage: Any = fields.get("percentage")
    check_percentage(percentage)
    numbers = [fields.get(name) for name in ("stable", "candidate")]
    for number in numbers:
        if number is not None and (not isinstance(number, int) or number is True or number < 1):
            raise UpdateError(f"{where}: a release must be a positive integer or null")
    return Channel(numbers[0], numbers[1], float(percentage))
