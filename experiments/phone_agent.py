"""Lets an agent do tasks of several steps on a simulated phone, with a model that is served.

    python -m experiments.phone_agent --tasks=200 --seed=7 --digits_dir=DIR --out=FILE.json
    python -m experiments.phone_agent --tasks=20 --client_dir=Open-AutoGLM

A task is a written instruction of 2 to 4 steps, such as "dial 4 7" or "open the play row, then go
back", in wordings that the training does not use. The phone shows a generated screen per step. A
task counts if every action is right and the agent then ends it with `finish`.

The agent is a replay of Open-AutoGLM's requests through the `openai` package (extra `test`): the
system prompt, one screenshot per request, and the history of answers. With --client_dir, a folder
with a clone of that project, its own unchanged program runs instead, on an `adb` that this script
puts on PATH. It needs the packages of its requirements.txt.

Without --base_url, the script serves --model itself (extra `serve`).
"""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import numpy as np
from absl import flags
from PIL import Image

from experiments.common.provenance import provenance_of
from experiments.common.serving import served
from experiments.common.simulated_phone import PACKAGE, Phone, put_on_path
from experiments.nano.phone_screens import dialogues, digits, generator, metrics
from experiments.nano.phone_screens.actions import Action, parse_action, to_pixels
from experiments.nano.phone_screens.instructions import Question
from glm_edge.cli.console import bar, launch, print_table, refuse_arguments
from glm_edge.errors import DataError, require
from glm_edge.writers import write_json

FLAGS = flags.FLAGS

# Pixels of the phone per pixel of a generated screen.
SCALE = 5
MAX_STEPS = 8
# Name of the model that the client asks for.
NAME = "autoglm-phone-9b"
CLIENT_TIMEOUT_S = 120
# The parts of Open-AutoGLM's requests that do not depend on the task. Its system prompt is far
# longer; the service's chat template removes all of it for this model.
SYSTEM = "You are an agent that operates a phone. Answer with one action per screenshot."
OPTIONS = {"max_tokens": 3000, "temperature": 0.0, "top_p": 0.85, "frequency_penalty": 0.2}
DELAYS = (
    "TAP", "DOUBLE_TAP", "LONG_PRESS", "SWIPE", "BACK", "HOME", "LAUNCH", "KEYBOARD_SWITCH",
    "TEXT_CLEAR", "TEXT_INPUT", "KEYBOARD_RESTORE",
)  # fmt: skip


def define_flags() -> None:
    """Define the flags of this script, which other scripts may import."""
    flags.DEFINE_string("model", "nano", "Checkpoint directory, or the name of a shipped model.")
    flags.DEFINE_string("base_url", None, "Address of a running service, such as http://…/v1.")
    flags.DEFINE_string("client_dir", None, "Clone of Open-AutoGLM, whose client then runs.")
    flags.DEFINE_integer("tasks", 200, "Number of tasks.", 1)
    flags.DEFINE_integer("seed", 7, "Seed of tasks and screens.")
    flags.DEFINE_string(
        "digits_dir", None, "Folder of MNIST files; default: scikit-learn's digits."
    )
    flags.DEFINE_string("out", None, "JSON file for the results.")


def png_of(image: np.ndarray) -> bytes:
    """Encode a screen as the phone's screenshot."""
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(SCALE, 0).repeat(SCALE, 1)).save(file, "PNG")
    return file.getvalue()


def expected(question: Question) -> dict[str, Any]:
    """Return the action that `Phone` expects, in pixels."""
    action = question.answer_action
    if question.target is not None:
        return {"kind": "tap", "box": [SCALE * edge for edge in question.target.box]}
    if action.kind == "Swipe":
        return {"kind": "swipe", "start": action.start, "end": action.end}
    return {"kind": "type", "text": action.text} if action.kind == "Type" else {"kind": "back"}


def new_phone(folder: Path, rng: np.random.Generator, screens: generator.ScreenGenerator):
    """Draw a task, and write its phone; return the task's text, its number of steps, the phone."""
    text, steps = dialogues.draw_task(rng, screens, "exam")
    pictures = [png_of(screen.image) for screen, _ in steps]
    last = screens.draw(rng) if len({id(screen) for screen, _ in steps}) > 1 else steps[-1][0]
    phone = Phone.create(
        folder, [expected(question) for _, question in steps], [*pictures, png_of(last.image)]
    )
    return text, len(steps), phone


def do(phone: Phone, action: Action) -> None:
    """Do an action as the client does, in pixels."""
    size = generator.WIDTH * SCALE, generator.HEIGHT * SCALE
    if action.kind == "Tap" and action.element is not None:
        phone.act("tap", at=to_pixels(action.element, *size))
    elif action.kind == "Swipe" and action.start is not None and action.end is not None:
        phone.act("swipe", start=to_pixels(action.start, *size), end=to_pixels(action.end, *size))
    elif action.kind == "Type":
        phone.act("type", text=action.text)
    else:
        phone.act(action.kind.lower())


def split_answer(text: str) -> tuple[str, str]:
    """Split an answer into thought and action, as the client does."""
    for call in ("finish(message=", "do(action="):
        if call in text:
            thought, arguments = text.split(call, 1)
            return thought.strip(), call + arguments.strip()
    return "", text.strip()


class Replay:
    """An agent that sends what Open-AutoGLM's client sends.

    Args:
      base_url: address of the service.
    """

    def __init__(self, base_url: str):
        openai = require("openai", extra="test")
        self._client = openai.OpenAI(base_url=base_url, api_key="EMPTY")

    def run(self, task: str, phone: Phone) -> bool:
        """Do a task; return True if the agent ended it."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        for step in range(MAX_STEPS):
            screen = json.dumps({"current_app": PACKAGE})
            text = f"{task}\n\n{screen}" if not step else f"** Screen Info **\n\n{screen}"
            encoded = base64.b64encode(phone.picture.read_bytes()).decode()
            url = f"data:image/png;base64,{encoded}"
            parts = [{"type": "image_url", "image_url": {"url": url}}]
            parts.append({"type": "text", "text": text})
            answer = self._ask([*messages, {"role": "user", "content": parts}])
            try:
                action = parse_action(answer)
            except DataError:
                return False
            if action.kind == "finish":
                return True
            do(phone, action)
            messages.append({"role": "user", "content": parts[1:]})
            thought, action_text = split_answer(answer)
            content = f"<think>{thought}</think><answer>{action_text}</answer>"
            messages.append({"role": "assistant", "content": content})
        return False

    def _ask(self, messages: list[dict[str, Any]]) -> str:
        stream = self._client.chat.completions.create(
            model=NAME, messages=messages, stream=True, **OPTIONS
        )
        deltas = (chunk.choices[0].delta.content for chunk in stream if chunk.choices)
        return "".join(delta for delta in deltas if delta)


class Client:
    """Open-AutoGLM's own program.

    Args:
      directory: clone of the project.
      base_url: address of the service.
    """

    def __init__(self, directory: str, base_url: str):
        self._directory, self._base_url = Path(directory), base_url
        if not (self._directory / "main.py").exists():
            raise DataError(f"{directory}: has no main.py; --client_dir must be a clone")

    def run(self, task: str, phone: Phone) -> bool:
        """Do a task; return True if the program ended it."""
        environment = put_on_path(phone.folder)
        environment |= {f"PHONE_AGENT_{name}_DELAY": "0" for name in DELAYS}
        command = [sys.executable, "main.py", "--lang", "en", "--base-url", self._base_url]
        command += ["--max-steps", str(MAX_STEPS), task]
        try:
            finished = subprocess.run(
                command,
                cwd=self._directory,
                env=environment,
                capture_output=True,
                text=True,
                timeout=CLIENT_TIMEOUT_S,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return False
        return finished.returncode == 0 and "Max steps" not in finished.stdout


def run_tasks(base_url: str) -> list[dict[str, Any]]:
    """Do all tasks; return one record per task."""
    agent: Replay | Client = Replay(base_url)
    if FLAGS.client_dir:
        agent = Client(FLAGS.client_dir, base_url)
    images = digits.sklearn_digits("eval")
    if FLAGS.digits_dir:
        images = digits.mnist_folder(FLAGS.digits_dir, "eval")
    screens = generator.ScreenGenerator(images)
    rng = generator.random_stream("eval", FLAGS.seed)
    records = []
    for _ in bar("tasks")(range(FLAGS.tasks)):
        with tempfile.TemporaryDirectory() as folder:
            task, steps, phone = new_phone(Path(folder), rng, screens)
            ended = agent.run(task, phone)
            phone = Phone(folder)
            records.append(
                {
                    "task": task,
                    "steps": steps,
                    "ended": ended,
                    "mistakes": phone.mistakes,
                    "finished": ended and phone.completed,
                }
            )
    return records


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    with served(FLAGS.model, FLAGS.base_url, [f"--names={NAME}"]) as service:
        records = run_tasks(service.base_url)
    rows = []
    for steps in (None, *sorted({record["steps"] for record in records})):
        group = [r for r in records if steps is None or r["steps"] == steps]
        rate = metrics.wilson(sum(r["finished"] for r in group), len(group))
        rows.append(
            {
                "steps": steps or "all",
                "tasks": rate.count,
                "finished": rate.value,
                "low": rate.low,
                "high": rate.high,
            }
        )
    print_table(
        ("steps", "tasks", "finished", "95 % interval"),
        [
            (str(r["steps"]), str(r["tasks"]), f"{100 * r['finished']:.1f} %",
             f"{100 * r['low']:.1f} to {100 * r['high']:.1f}")
            for r in rows
        ],
    )  # fmt: skip
    if FLAGS.out:
        names = ["model", "tasks", "seed"]
        paths = ("client_dir", "digits_dir", "out")
        placeholders = [f"--{name}={name.upper()}" for name in paths if FLAGS[name].value]
        record = provenance_of("phone_agent", names, placeholders)
        write_json(Path(FLAGS.out), record | {"rows": rows, "tasks": records})


if __name__ == "__main__":
    define_flags()
    launch(main)
