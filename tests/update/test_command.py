"""The command, from an empty folder to a rollback."""

import functools
import http.server
import json
import threading

import pytest
from absl import app, flags

from glm_edge.cli import main
from tests.update.conftest import contents, write_model


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an action in this process, and takes its flags away again."""
    before, values = set(flags.FLAGS), flags.FLAGS
    monkeypatch.setattr(
        app, "run", lambda function, argv: function([argv[0], *values(list(argv))[1:]])
    )

    def command(*arguments):
        try:
            main.main(["glm-edge", "update", *map(str, arguments)])
        finally:
            for name in set(values) - before:
                delattr(values, name)
            values.unparse_flags()
        return capsys.readouterr().out

    return command


def test_the_command_from_init_to_rollback(tmp_path, run):
    repository, keys, device = (tmp_path / name for name in ("repository", "keys", "phone"))
    server_flags = [f"--repository={repository}", f"--keys={keys}", "--level=1"]
    run("init", *server_flags)
    models = [write_model(tmp_path / f"model{seed}", seed) for seed in (1, 2)]
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(repository))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True).start()
    client = [f"--device_dir={device}", f"--url=http://127.0.0.1:{server.server_address[1]}"]
    try:
        assert "release 1: " in run("publish", *server_flags, f"--source={models[0]}")
        root = repository / "metadata" / "1.root.json"
        assert run("fetch", *client, f"--root={root}").startswith("ready: release 1")
        path = run("apply", *client).strip()
        assert contents(device / "releases/1/model") == contents(models[0])
        assert path == str(device / "releases/1/model")
        canary = run("publish", *server_flags, f"--source={models[1]}", "--percentage=0")
        assert "from release 1: " in canary
        assert run("fetch", *client).startswith("current: release 1")
        run("promote", *server_flags, "--percentage=100")
        assert run("fetch", *client).startswith("ready: release 2")
        with pytest.raises(SystemExit, match=r"failed its check.*ended with status 1"):
            run("apply", *client, "--check_command=false")
        run("publish", *server_flags, f"--source={models[1]}")
        run("fetch", *client)
        assert run("apply", *client, "--check_command=test -d").strip().endswith("3/model")
        assert run("rollback", *client, "--reason=slow").strip() == path
        report = json.loads((device / "health.json").read_text())
        assert (report["release"], report["healthy"], report["reason"]) == (3, False, "slow")
        assert "renewed: root, targets" in run("renew", *server_flags)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one action"),
        (["install"], "name one action"),
        (["publish"], "pass --keys"),
        (["fetch"], "pass --device_dir"),
        (["fetch", "--device_dir=x", "--url=ftp://a"], "--url='ftp://a'|must begin with http"),
    ],
)
def test_a_wrong_call_is_one_line(run, arguments, message):
    with pytest.raises(SystemExit, match=message) as raised:
        run(*arguments)
    assert "\n" not in str(raised.value)
