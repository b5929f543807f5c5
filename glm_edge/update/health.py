"""Health reports of a device: a local file, and a POST to an address."""

import json
import logging
from pathlib import Path
from typing import Any

from glm_edge.errors import UpdateError
from glm_edge.update.transport import HttpTransport
from glm_edge.writers import write_json, write_whole

HEALTH = "health.json"
_logger = logging.getLogger(__name__)


def report(directory: Path, fields: dict[str, Any], url: str | None) -> None:
    """Report the health of a release.

    An address that cannot be reached is a warning: the device must not lose its model because of a
    report. The file says whether the report was sent.

    Args:
      directory: directory of the device.
      fields: JSON-ready fields of the report.
      url: address for a POST, or None.

    Raises:
      OutputError: the file cannot be written.
    """
    sent = False
    if url:
        try:
            HttpTransport(url).post(json.dumps(fields).encode())
            sent = True
        except UpdateError as error:
            _logger.warning("the health report was not sent: %s", error)
    write_whole(directory / HEALTH, lambda path: write_json(path, {**fields, "sent": sent}))
