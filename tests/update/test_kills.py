"""A device that is killed at any line of an update."""

import subprocess
import sys
from pathlib import Path

POINTS = 30


def test_killed_anywhere_a_device_has_a_complete_model(second):
    """The child processes end by SIGKILL, so that no cleanup runs."""
    script = Path(__file__).parent / "killed_device.py"
    command = [sys.executable, str(script), str(second.folder), str(POINTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    before, after, finished = map(int, result.stdout.split())
    assert (before + after, finished) == (POINTS, POINTS)
    # The points reach both sides of the switch.
    assert before
    assert after
