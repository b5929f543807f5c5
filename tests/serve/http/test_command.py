"""`python -m glm_edge.serve`, from the command line to SIGTERM."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

from tests.serve.http.fakes import NANO

pytest.importorskip("uvicorn")


@pytest.fixture
def serve():
    """Starts the command with some flags; returns the process and its address when it is ready."""
    processes = []

    def start(*flags):
        process = subprocess.Popen(
            [sys.executable, "-m", "glm_edge.serve", "--port=0", *flags],
            env={**os.environ, "GLM_EDGE_API_KEY": "secret"},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        lines = iter(process.stdout.readline, "")
        ready = next(line for line in lines if line.startswith("serving nano at "))
        return process, ready.split()[-1]

    yield start
    for process in processes:
        process.kill()


def ask(url, count):
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": count,
        "temperature": 0,
    }
    headers = {"authorization": "Bearer secret"}
    answer = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)
    return answer.json()


@pytest.mark.slow
def test_the_command_serves_until_sigterm(serve, tmp_path):
    process, url = serve("--slots=1", "--context=64", f"--compilation_cache={tmp_path}")
    assert httpx.get(f"{url}/models").status_code == 401
    assert ask(url, 3)["usage"]["completion_tokens"] <= 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_serves_a_phone_file(serve, nano_file):
    _, url = serve(f"--model={nano_file}", f"--processor={NANO}")
    _, same = serve("--slots=1", "--context=512")
    answers = [ask(address, 8)["choices"][0]["message"]["content"] for address in (url, same)]
    assert answers[0] == answers[1] != ""
