"""What all tests share."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

# Small programs compile two to three times as fast without them; `XLA_FLAGS= pytest` has them back.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Folders whose tests are of many small programs, which take longer to optimize than to run. In the
# others programs are compiled as a user's are.
COMPILED_QUICKLY = ("checkpoint", "compress", "generate", "models", "params")


# Each compiled program keeps pages mapped, and Linux lets a process map 65,530 of them.
MAPPED = Path("/proc/self/maps")
MAPPED_ENOUGH = 20_000


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(request):
    """Compiles quickly where that pays, and frees programs before there are too many."""
    folder = Path(request.node.path).relative_to(Path(__file__).parent).parts[0]
    jax.config.update("jax_disable_most_optimizations", folder in COMPILED_QUICKLY)
    yield
    if not MAPPED.exists() or MAPPED.read_bytes().count(b"\n") > MAPPED_ENOUGH:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def eight_devices(request, tmp_path_factory):
    """What `eight_devices.py` beside the tests prints, run in a process of 8 simulated devices."""
    script = Path(request.node.path).with_name("eight_devices.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("eight_devices"))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)
