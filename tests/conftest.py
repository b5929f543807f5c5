"""What all tests share."""

import collections
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Small programs take longer to compile than to run: two to three times as long with fusion
# emitters, a third longer in 32 parts that threads compile, and five times as long with LLVM's
# optimizations. Processes that tests start inherit the settings;
# `XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` compiles as for a user.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# After the environment, which jax reads while it is imported.
import jax
import jax.monitoring
import pytest

# What jax reports after each program that it compiled, or read from a cache of compiled programs.
COMPILED = "/jax/core/compile/backend_compile_duration"

# The collector's default thresholds make it look at jax's many small objects thousands of times a
# run, a twentieth of the time.
gc.set_threshold(100_000, 50, 100)

# Each compiled program keeps pages mapped, and Linux lets a process map 65,530 of them.
MAPPED = Path("/proc/self/maps")
MAPPED_ENOUGH = 40_000


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Frees compiled programs before there are too many."""
    yield
    if not MAPPED.exists() or MAPPED.read_bytes().count(b"\n") > MAPPED_ENOUGH:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def optimized(monkeypatch):
    """Compiles as for a user, here and in processes that the test starts."""
    quickly = jax.config.read("jax_disable_most_optimizations")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quickly)


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


class CompiledPrograms(collections.Counter):
    """Counts the programs that each test compiles, its fixtures' among them."""

    test = ""

    def __call__(self, event, duration, **_):
        if event == COMPILED:
            self[self.test] += 1


PROGRAMS = CompiledPrograms()
jax.monitoring.register_event_duration_secs_listener(PROGRAMS)


SCRIPTS = Path(__file__).with_name("experiments")


def pytest_ignore_collect(collection_path, config):
    """Imports no tests of scripts where none of them would run."""
    return True if collection_path == SCRIPTS and "not scripts" in config.option.markexpr else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests of scripts, before `-m` selects."""
    for item in items:
        if SCRIPTS in item.path.parents:
            item.add_marker("scripts")


def note_skipped(report):
    """Appends the id of what was skipped to the file that `GLM_EDGE_TEST_SKIPPED` names."""
    path = os.environ.get("GLM_EDGE_TEST_SKIPPED")
    if path and report.skipped:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{report.nodeid}\n")


pytest_runtest_logreport = pytest_collectreport = note_skipped


def pytest_runtest_setup():
    """Skips what would begin after the time that `GLM_EDGE_TEST_DEADLINE` names, in seconds."""
    deadline = os.environ.get("GLM_EDGE_TEST_DEADLINE")
    if deadline and time.time() > float(deadline):
        pytest.skip("GLM_EDGE_TEST_DEADLINE has passed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Attributes what is compiled during a test to it."""
    PROGRAMS.test = item.nodeid
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_sessionfinish(session):
    """Hands the counts of a worker process to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["programs"] = dict(PROGRAMS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds the counts of a worker process."""
    PROGRAMS.update(getattr(node, "workeroutput", {}).get("programs", {}))


def pytest_terminal_summary(terminalreporter):
    """Prints the ten tests that compile most, where a run's time goes."""
    if PROGRAMS.total():
        terminalreporter.section(f"{PROGRAMS.total()} programs compiled; most of them in")
        for test, count in PROGRAMS.most_common(10):
            terminalreporter.line(f"{count:5d} {test}")
