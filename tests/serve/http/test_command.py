"""`python -m glm_edge.serve`, from the command line to SIGTERM."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

pytest.importorskip("uvicorn")


@pytest.mark.slow
def test_the_command_serves_until_sigterm(tmp_path):
    flags = ["--port=0", "--slots=1", "--context=64", f"--compilation_cache={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "glm_edge.serve", *flags],
        env={**os.environ, "GLM_EDGE_API_KEY": "secret"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        ready = next(line for line in lines if line.startswith("serving nano at "))
        url = ready.split()[-1]
        assert httpx.get(f"{url}/models").status_code == 401
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        headers = {"authorization": "Bearer secret"}
        answer = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] <= 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert any(tmp_path.iterdir())
