"""The command, run in the process of the tests."""

import pytest
from absl import app, flags

from glm_edge.cli import main


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this process, and takes its flags away again."""
    before, values = set(flags.FLAGS), flags.FLAGS

    def start(function, argv):
        return function([argv[0], *values(list(argv))[1:]])

    def command(*arguments):
        try:
            main.main(["glm-edge", *map(str, arguments)])
        finally:
            for name in set(values) - before:
                delattr(values, name)
            values.unparse_flags()

    monkeypatch.setattr(app, "run", start)
    return command
