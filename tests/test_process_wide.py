"""Changes of the whole process are taken back, however the threads that make them overlap."""

import importlib
import logging
import os
import sys
import tempfile
import threading

import pytest

from glm_edge.checkpoint import orbax
from glm_edge.export.common.quiet import quiet

# The package has a function of its name.
coreml = importlib.import_module("glm_edge.export.coreml.export")


def state():
    status = os.fstat(2)
    logger = logging.getLogger("asyncio")
    variable = os.environ.get("TQDM_DISABLE")
    return sys.unraisablehook, logger.disabled, variable, status.st_dev, status.st_ino


@pytest.mark.parametrize("change", [orbax._quiet_tasks, coreml._progress_off, quiet])
def test_overlapping_changes_are_taken_back(change):
    before = state()
    first, second = change(), change()
    first.__enter__()
    changed = state()
    assert changed != before
    second.__enter__()
    first.__exit__(None, None, None)
    # Another thread is still inside.
    assert state() == changed
    second.__exit__(None, None, None)
    assert state() == before
    with pytest.raises(KeyError), change():
        raise KeyError
    assert state() == before


def test_temporary_in_waits_for_another_export(tmp_path):
    before, observed = tempfile.tempdir, []

    def export():
        with coreml._temporary_in(tmp_path / "b"):
            observed.append(tempfile.tempdir)

    with coreml._temporary_in(tmp_path / "a"):
        thread = threading.Thread(target=export)
        thread.start()
        thread.join(0.05)
        assert tempfile.tempdir == str(tmp_path / "a")
    thread.join()
    assert observed == [str(tmp_path / "b")]
    assert tempfile.tempdir == before
