"""Servers that cut, stall, replay, swap, refuse or ignore ranges."""

import functools
import http.server
import itertools
import json
import shutil
import threading
import time

import pytest

from glm_edge.errors import UpdateError
from glm_edge.update import Client, FolderTransport, publish
from glm_edge.update.transport import HttpTransport, download
from tests.update.conftest import contents, update


class Handler(http.server.SimpleHTTPRequestHandler):
    """A static server with ranges; `server.fault` may change an answer."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.lstrip("/")
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.requests.append((path, start))
        file = self.server.folder / path
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        fault = self.server.fault(path, content)
        content, declared = fault or (content, len(content))
        self.send_response(206 if start and self.server.ranges else 200)
        if start and self.server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{declared - 1}/{declared}")
            content, declared = content[start:], declared - start
        self.send_header("Content-Length", str(declared))
        self.end_headers()
        self.wfile.write(content)
        if len(content) < declared:
            self.wfile.flush()
            self.server.stall.wait(5 if self.server.stalls else 0)
            self.close_connection = True

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.posted.append(json.loads(self.rfile.read(length)))
        self.send_response(204)
        self.end_headers()


@pytest.fixture
def server(second):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests, server.posted = second.repository.directory, [], []
    server.fault, server.ranges, server.stalls = (lambda path, content: None), True, False
    server.stall = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True).start()
    yield server
    server.stall.set()
    server.shutdown()
    server.server_close()


def test_http_and_a_posted_report(second, server):
    client = second.device(transport=server.url, report_url=server.url, device="phone-7")
    assert contents(update(client)) == second.model(2)
    client.rollback("taps miss")
    reports = [(r["device"], r["release"], r["healthy"], r["reason"]) for r in server.posted]
    assert reports == [("phone-7", 2, True, "applied"), ("phone-7", 2, False, "taps miss")]
    assert json.loads((client.directory / "health.json").read_text())["sent"] is True


def test_a_report_that_cannot_be_sent_keeps_the_update(second):
    client = second.device(report_url="http://127.0.0.1:9/reports")
    assert contents(update(client)) == second.model(2)
    assert json.loads((client.directory / "health.json").read_text())["sent"] is False


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_resumes(second, server, ranges):
    server.ranges = ranges
    server.fault = lambda path, content: (
        (content[: len(content) * 2 // 3], len(content)) if path.startswith("objects/") else None
    )
    client = second.device("new", transport=server.url)
    with pytest.raises(UpdateError, match="broke off"):
        client.fetch()
    server.fault = lambda path, content: None
    server.requests.clear()
    assert contents(update(client)) == second.model(2)
    resumed = [start for path, start in server.requests if path.startswith("objects/") and start]
    assert resumed


def test_a_stalled_server_is_an_error(second, server):
    server.stalls = True
    server.fault = lambda path, content: (
        (content[:-9], len(content)) if path.startswith("objects/") else None
    )
    client = second.device(transport=HttpTransport(server.url, timeout_s=0.05))
    began = time.monotonic()
    with pytest.raises(UpdateError, match="broke off after"):
        client.fetch()
    assert time.monotonic() - began < 4
    assert second.release_on("phone") == 1


def test_a_replayed_repository_is_refused(second, tmp_path, refused):
    """A server that returns to the state before release 2, with valid signatures."""
    old = tmp_path / "old"
    shutil.copytree(second.repository.directory, old)
    publish(second.repository, second.folder / "model2", second.signers, level=3)
    client = second.device()
    update(client)
    replaying = Client(client.directory, FolderTransport(old))
    with refused("BadVersionNumberError"):
        replaying.fetch()


def test_swapped_objects_are_refused(second, server, refused):
    objects = [path for path in (server.folder / "objects").rglob("*") if path.is_file()]
    server.fault = lambda path, content: (
        (objects[0].read_bytes() + bytes(9), len(objects[0].read_bytes()) + 9)
        if path.startswith("objects/")
        else None
    )
    with refused("other bytes than signed|more than the signed|ended after"):
        second.device("new", transport=server.url).fetch()
    assert second.device("new").current() is None


def test_a_missing_object_names_the_status(second, server, refused):
    shutil.rmtree(server.folder / "objects")
    with refused("the server answers 404"):
        second.device(transport=server.url).fetch()


def test_a_slow_server_is_an_error(tmp_path, monkeypatch):
    """One byte at a time never exceeds the wait between two bytes."""

    class Response:
        status, headers = 200, {}

        def read1(self, _):
            return b"x"

        def close(self):
            pass

    seconds = itertools.count(0, 10)
    monkeypatch.setattr("glm_edge.update.transport.time.monotonic", lambda: next(seconds))
    transport = HttpTransport("http://127.0.0.1:9")
    monkeypatch.setattr(transport._pool, "request", lambda *_, **__: Response())
    with pytest.raises(UpdateError, match=r"only \d+ bytes came in \d+ s"):
        download(transport, "0" * 64, 1 << 20, tmp_path)


@pytest.mark.parametrize("url", ["ftp://a", "file:///etc/passwd", "phone.local"])
def test_other_addresses_are_refused(refused, url):
    with refused("must begin with http"):
        HttpTransport(url)
