"""The page: served with its policy, and used in a browser as a person does."""

import io
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from glm_edge.serve.http import Server, Service

CHROMIUM = shutil.which("chromium")


def test_the_page_needs_no_key_and_allows_no_other_origin(client):
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "connect-src 'self'" in policy
    assert "default-src 'none'" in policy
    # Nothing is loaded from elsewhere.
    assert "http://" not in response.text
    assert "https://" not in response.text


@pytest.fixture(scope="module")
def address(nano_engine, processor):
    server = Server(Service(nano_engine, processor, ["nano"]), port=0)
    # The engine is shared with other tests, and stays open.
    server.service.engine = _Shared(nano_engine)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.started.wait(30)
    yield f"http://127.0.0.1:{server.port}/"
    server.stop()
    thread.join(30)


class _Shared:
    """An engine that `close` does not end."""

    def __init__(self, engine):
        self._engine = engine

    def close(self, timeout=0.0):
        pass

    def __getattr__(self, name):
        return getattr(self._engine, name)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_person_drops_a_screenshot_asks_and_sees_the_tap(address):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (192, 96, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    with playwright.sync_playwright() as runtime:
        browser = runtime.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.locator("#model", has_text="nano").wait_for()
        page.set_input_files(
            "#file", {"name": "s.png", "mimeType": "image/png", "buffer": file.getvalue()}
        )
        page.locator("#picture[width='96']").wait_for()
        page.fill("#text", "tap the star icon")
        page.click("#send")
        page.locator("#facts", has_text="tokens/s").wait_for()
        assert page.text_content("#answer").startswith("do(action=")
        assert page.get_attribute("#mark", "data-tap").count(",") == 1
        assert "cached" in page.text_content("#facts")
        # A drawn picture of another size, and an error of the service.
        page.click("#clear")
        page.hover("#picture", position={"x": 40, "y": 200})
        page.mouse.down()
        page.hover("#picture", position={"x": 90, "y": 260})
        page.mouse.up()
        page.fill("#text", "")
        page.locator("#model").evaluate("model => { model.dataset.id = 'other'; }")
        page.click("#send")
        page.wait_for_selector(".error")
        assert "does not exist" in page.text_content(".error")
        browser.close()
    assert errors == []
