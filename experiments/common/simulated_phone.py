"""A simulated phone for agents: it shows the screens of a task and judges each action.

Run as a program, this file is the part of `adb` that Open-AutoGLM's client calls. A shell script
named `adb` on PATH runs it, so it imports the standard library only and starts quickly. The state
is a folder: `phone.json` and one picture per step.

A right action shows the next step's screen. A wrong one counts as a mistake and changes nothing.
"""

import base64
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

STATE, FOLDER_VARIABLE = "phone.json", "SIMULATED_PHONE"
DEVICE, PACKAGE = "emulator-5554", "org.example.screens"
KEYBOARD, OTHER_KEYBOARD = "com.android.adbkeyboard/.AdbIME", "org.example/.Keyboard"
BACK_KEY = "4"


class Phone:
    """The phone of one folder.

    Attributes:
      folder: folder of the state.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._state: dict[str, Any] = json.loads((self.folder / STATE).read_text())

    @classmethod
    def create(cls, folder: str | Path, steps: list[dict[str, Any]], pictures: list[bytes]):
        """Write the state of a new phone.

        Args:
          folder: existing folder.
          steps: expected actions, each with a `kind`: "tap" with a `box` (x0, y0, x1, y1) in pixels
            of the picture, "swipe" with `start` and `end`, "type" with a `text`, or "back".
          pictures: PNG screenshots before each step, and after the last.
        """
        folder = Path(folder)
        for index, picture in enumerate(pictures):
            (folder / f"{index}.png").write_bytes(picture)
        state = {"steps": steps, "done": 0, "mistakes": 0, "keyboard": OTHER_KEYBOARD, "text": ""}
        (folder / STATE).write_text(json.dumps(state))
        return cls(folder)

    @property
    def completed(self) -> bool:
        """True after the last step, without mistakes."""
        return not self._state["mistakes"] and self._state["done"] == len(self._state["steps"])

    @property
    def mistakes(self) -> int:
        """Number of wrong actions."""
        return self._state["mistakes"]

    @property
    def picture(self) -> Path:
        """Path of the present screenshot."""
        return self.folder / f"{self._state['done']}.png"

    def act(self, kind: str, **values: Any) -> None:
        """Do one action.

        Args:
          kind: as in `create`, or any other, which is wrong.
          **values: `at` (x, y) of a tap; `start` and `end` of a swipe; `text`.
        """
        state = self._state
        steps, done = state["steps"], state["done"]
        if done < len(steps) and _is_right(steps[done], kind, values):
            state["done"] += 1
        else:
            state["mistakes"] += 1
        self._save()

    def adb(self, arguments: list[str]) -> str:
        """Answer one call of `adb`.

        Args:
          arguments: of the call, without the device.

        Returns:
          What `adb` prints.

        Raises:
          ValueError: the call is unknown here.
        """
        match arguments:
            case ["version"]:
                return "Android Debug Bridge version 1.0.41\n"
            case ["devices"]:
                return f"List of devices attached\n{DEVICE}\tdevice\n\n"
            case ["devices", "-l"]:
                return f"List of devices attached\n{DEVICE}  device model:Simulated\n\n"
            case ["pull", _, target]:
                shutil.copy(self.picture, target)
                return "1 file pulled.\n"
            case ["shell", "screencap", *_]:
                return ""
            case ["shell", "dumpsys", "window"]:
                return f"  mCurrentFocus=Window{{1 u0 {PACKAGE}/{PACKAGE}.Main}}\n"
            case ["shell", "ime", "list", "-s"]:
                return f"{OTHER_KEYBOARD}\n{KEYBOARD}\n"
            case ["shell", "settings", "get", "secure", "default_input_method"]:
                return self._state["keyboard"] + "\n"
            case ["shell", "ime", "set", name]:
                self._state["keyboard"] = name
                self._save()
                return f"Input method {name} selected\n"
            case ["shell", "am", "broadcast", *options]:
                return self._broadcast(options)
            case ["shell", "input", "tap", x, y]:
                self.act("tap", at=(int(x), int(y)))
            case ["shell", "input", "swipe", x0, y0, x1, y1, *_]:
                self.act("swipe", start=(int(x0), int(y0)), end=(int(x1), int(y1)))
            case ["shell", "input", "keyevent", key]:
                self.act("back" if key == BACK_KEY else "key")
            case ["shell", "monkey", *_]:
                self.act("launch")
            case _:
                raise ValueError(f"adb: unknown call {shlex.join(arguments)}")
        return ""

    def _broadcast(self, arguments: list[str]) -> str:
        if "ADB_CLEAR_TEXT" in arguments:
            return "Broadcast completed: result=0\n"
        text = base64.b64decode(arguments[-1]).decode() if arguments[-2:-1] == ["msg"] else ""
        # The client first sends an empty text to see that the keyboard works.
        if text:
            self.act("type", text=text)
        return "Broadcast completed: result=0\n"

    def _save(self) -> None:
        (self.folder / STATE).write_text(json.dumps(self._state))


def _is_right(step: dict[str, Any], kind: str, values: dict[str, Any]) -> bool:
    if step["kind"] != kind:
        return False
    if kind == "tap":
        x0, y0, x1, y1 = step["box"]
        x, y = values["at"]
        # The centre of the pixel.
        return x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1
    if kind == "swipe":
        return _direction(step["start"], step["end"]) == _direction(values["start"], values["end"])
    return kind == "back" or step["text"] == values["text"]


def _direction(start: Any, end: Any) -> tuple[bool, bool]:
    """Return the axis and the sign of a swipe."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    return abs(dx) > abs(dy), (dx if abs(dx) > abs(dy) else dy) > 0


def put_on_path(folder: str | Path) -> dict[str, str]:
    """Write the script `adb` for a phone, and return the environment in which it is found.

    Args:
      folder: folder of the phone.
    """
    folder = Path(folder)
    script = folder / "bin" / "adb"
    script.parent.mkdir(exist_ok=True)
    command = shlex.join([sys.executable, str(Path(__file__).resolve())])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, FOLDER_VARIABLE: str(folder)}


def main(arguments: list[str]) -> int:
    """Answer a call of `adb` on the phone of the environment."""
    if arguments[:1] == ["-s"]:
        arguments = arguments[2:]
    try:
        sys.stdout.write(Phone(os.environ[FOLDER_VARIABLE]).adb(arguments))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
