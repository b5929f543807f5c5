"""Updates copies of a device, kills each at another line, and checks and finishes its update.

    python -m tests.update.killed_device WORLD POINTS

Prints the devices that had the old model after the kill, the new one, and those that finished.
"""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.update.conftest import World, contents  # noqa: E402

PACKAGE = str(ROOT / "glm_edge")


def traced(function, limit):
    """Run a function, and kill this process at the given line of the package; return the count."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count == limit:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


def update(world, name):
    client = world.device(name)
    if client.fetch().status == "ready":
        client.apply()


def main(folder, points):
    world = World(Path(folder))
    shutil.copytree(world.folder / "phone", world.folder / "counted", symlinks=True)
    lines = traced(lambda: update(world, "counted"), -1)
    draw = random.Random(0)
    tail = lines - lines // 20
    # Half of the points are in the last part, where the model is switched.
    limits = [draw.randrange(1, lines) for _ in range(points - points // 2)]
    limits += [draw.randrange(tail, lines) for _ in range(points // 2)]
    releases, finished = [], 0
    for index, limit in enumerate(limits):
        name = f"device{index}"
        shutil.copytree(world.folder / "phone", world.folder / name, symlinks=True)
        child = os.fork()
        if child == 0:
            traced(lambda name=name: update(world, name), limit)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"line {limit} of {lines} was not reached"
        releases.append(world.release_on(name))
        update(world, name)
        client = world.device(name)
        finished += contents(client.current()) == world.model(2)
        extra = {path.name for path in client.directory.rglob("*.partial")}
        assert not extra, extra
    print(releases.count(1), releases.count(2), finished)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
