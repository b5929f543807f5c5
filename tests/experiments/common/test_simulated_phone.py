"""The simulated phone: what it accepts, and its `adb`."""

import base64
import io
import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from experiments import phone_agent
from experiments.common.simulated_phone import KEYBOARD, Phone, put_on_path
from experiments.nano.phone_screens import dialogues, digits, generator
from experiments.nano.phone_screens.actions import Action, format_action

STEPS = [
    {"kind": "tap", "box": [10, 20, 30, 40]},
    {"kind": "swipe", "start": (505, 705), "end": (505, 295)},
    {"kind": "type", "text": "hello"},
    {"kind": "back"},
]
CALLS = [
    ["shell", "input", "tap", "10", "39"],
    ["shell", "input", "swipe", "200", "700", "210", "300", "1000"],
    ["shell", "am", "broadcast", "-a", "ADB_INPUT_B64", "--es", "msg", "aGVsbG8="],
    ["shell", "input", "keyevent", "4"],
]


@pytest.fixture
def phone(tmp_path):
    return Phone.create(tmp_path, STEPS, [b"a", b"b", b"c", b"d", b"e"])


def test_right_actions_go_through_the_screens(phone):
    for call, picture in zip(CALLS, [b"b", b"c", b"d", b"e"], strict=True):
        assert not phone.completed
        phone.adb(call)
        assert phone.picture.read_bytes() == picture
    assert phone.completed
    phone.act("back")
    assert not phone.completed


@pytest.mark.parametrize(
    "call",
    [
        ["shell", "input", "tap", "30", "39"],
        ["shell", "input", "tap", "10", "19"],
        CALLS[3],
        ["shell", "input", "keyevent", "KEYCODE_HOME"],
        ["shell", "monkey", "-p", "org.example", "1"],
    ],
)
def test_a_wrong_action_changes_nothing_and_fails_the_task(phone, call):
    phone.adb(call)
    assert phone.picture.read_bytes() == b"a"
    for right in CALLS:
        phone.adb(right)
    assert phone.mistakes == 1
    assert not phone.completed


def test_a_swipe_counts_by_its_direction(tmp_path):
    for end, right in (((505, 100), True), ((505, 900), False), ((100, 690), False)):
        phone = Phone.create(tmp_path, STEPS[1:2], [b"a", b"b"])
        phone.act("swipe", start=(505, 705), end=end)
        assert phone.completed == right


def test_the_program_adb_answers_the_clients_calls(phone, tmp_path):
    environment = put_on_path(tmp_path)

    def adb(*arguments):
        return subprocess.run(["adb", *arguments], env=environment, capture_output=True, text=True)

    assert "device" in adb("devices").stdout
    assert KEYBOARD in adb("-s", "emulator-5554", "shell", "ime", "list", "-s").stdout
    adb("pull", "/sdcard/tmp.png", str(tmp_path / "screen.png"))
    assert (tmp_path / "screen.png").read_bytes() == b"a"
    for call in CALLS:
        assert adb(*call).returncode == 0
    assert Phone(tmp_path).completed
    unknown = adb("reboot")
    assert unknown.returncode == 1
    assert "unknown call reboot" in unknown.stderr


@pytest.fixture(scope="module")
def screens():
    return generator.ScreenGenerator(digits.sklearn_digits("eval"))


class Oracle(phone_agent.Replay):
    """The replay, with answers of someone who knows the task."""

    def __init__(self, answers):
        self.answers, self.requests = list(answers), []

    def _ask(self, messages):
        self.requests.append(json.loads(json.dumps(messages)))
        return self.answers.pop(0)


@pytest.mark.parametrize("seed", range(6))
def test_an_agent_that_knows_the_answers_finishes_every_task(tmp_path, screens, seed):
    rng = np.random.default_rng(seed)
    _, steps = dialogues.draw_task(np.random.default_rng(seed), screens, "exam")
    text, count, phone = phone_agent.new_phone(tmp_path, rng, screens)
    assert 2 <= count == len(steps) <= 4
    answers = [format_action(question.answer_action) for _, question in steps]
    agent = Oracle([*answers, format_action(Action("finish", message="done"))])
    assert agent.run(text, phone)
    assert Phone(tmp_path).completed
    # A request has one picture, in its last message, and the earlier answers.
    last = agent.requests[-1]
    assert [m["role"] for m in last] == ["system", *["user", "assistant"] * count, "user"]
    assert sum("image_url" in json.dumps(message) for message in last) == 1
    assert last[1]["content"][0]["text"].startswith(f"{text}\n\n")
    url = last[-1]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.size == (generator.WIDTH * 5, generator.HEIGHT * 5)


def test_an_agent_that_stops_early_or_answers_nonsense_does_not_finish(tmp_path, screens):
    text, _, phone = phone_agent.new_phone(tmp_path, np.random.default_rng(0), screens)
    assert Oracle(['finish(message="done")']).run(text, phone)
    assert not phone.completed
    assert not Oracle(["hello"]).run(text, phone)
    assert not Oracle(['do(action="Home")'] * 8).run(text, phone)
