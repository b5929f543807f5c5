"""Messages of a request as messages of a `glm_edge.Processor`."""

from typing import Any

from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.fields import Fields
from glm_edge.serve.http.limits import Limits
from glm_edge.serve.http.media import read_image, read_recording

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CALLS = 128


class MessageReader:
    """A reader of one conversation, which counts its parts and characters."""

    def __init__(self, limits: Limits) -> None:
        """Start a conversation.

        Args:
          limits: of the service.
        """
        self._limits = limits
        self._characters = self._parts = self._images = self._recordings = 0

    def read(self, messages: list[Any]) -> list[dict[str, Any]]:
        """Check messages, and decode their images and recordings.

        Args:
          messages: JSON values.

        Returns:
          Messages whose media are contents, never names of files.

        Raises:
          ApiError: a message is malformed or exceeds a limit.
        """
        return [
            self._message(Fields(message, f"messages[{index}]"))
            for index, message in enumerate(messages)
        ]

    def _message(self, fields: Fields) -> dict[str, Any]:
        role = fields.choice("role", ROLES)
        if role is None:
            raise fields.refused("role", "is missing")
        message: dict[str, Any] = {"role": "system" if role == "developer" else role}
        content = fields.take("content")
        if isinstance(content, list):
            where = fields.path("content")
            parts = [self._part(Fields(x, f"{where}[{i}]")) for i, x in enumerate(content)]
            message["content"] = parts
        elif isinstance(content, str):
            message["content"] = self._text(content)
        elif content is not None or role in ("system", "developer", "user"):
            raise fields.refused("content", "must be a string or a list of parts")
        calls = fields.items("tool_calls", MAX_CALLS)
        if calls and role != "assistant":
            raise fields.refused("tool_calls", "only an assistant calls tools")
        if calls:
            where = fields.path("tool_calls")
            message["tool_calls"] = [
                self._call(Fields(call, f"{where}[{i}]")) for i, call in enumerate(calls)
            ]
        for name in ("name", "tool_call_id", "reasoning_content"):
            text = fields.text(name)
            # Few templates read the id of a call, and none needs it.
            if text and name != "tool_call_id":
                message[name] = self._text(text)
        # Fields of the API's own answers, which clients send back.
        fields.ignore("refusal", "annotations", "function_call", "audio")
        fields.finish()
        if len(message) == 1:
            raise fields.refused("content", "is missing")
        return message

    def _call(self, fields: Fields) -> dict[str, Any]:
        fields.choice("type", ("function",))
        fields.ignore("id", "index")
        function = fields.object("function")
        if function is None:
            raise fields.refused("function", "is missing")
        fields.finish()
        name, arguments = function.text("name"), function.text("arguments")
        function.finish()
        if not name:
            raise function.refused("name", "is missing")
        values = {"name": self._text(name), "arguments": self._text(arguments or "{}")}
        return {"type": "function", "function": values}

    def _part(self, fields: Fields) -> dict[str, Any]:
        self._parts = self._counted("parts", self._parts + 1)
        kinds = ("text", "refusal", "image_url", "input_audio")
        kind = fields.choice("type", kinds)
        if kind is None:
            raise fields.refused("type", f"must be one of {', '.join(kinds)}")
        fields.ignore("prompt_cache_breakpoint")
        if kind in ("text", "refusal"):
            text = fields.text(kind)
            fields.finish()
            if text is None:
                raise fields.refused(kind, "is missing")
            return {"type": "text", "text": self._text(text)}
        part = self._image(fields) if kind == "image_url" else self._recording(fields)
        fields.finish()
        return part

    def _image(self, fields: Fields) -> dict[str, Any]:
        self._images = self._counted("images", self._images + 1)
        image = fields.object("image_url")
        url = None if image is None else image.text("url")
        if image is None or url is None:
            raise fields.refused("image_url", "must be an object with a 'url'")
        # The model's preprocessing decides the resolution.
        image.choice("detail", ("auto", "low", "high", "original"))
        image.finish()
        return {"type": "image", "image": read_image(url, image.path("url"), self._limits)}

    def _recording(self, fields: Fields) -> dict[str, Any]:
        self._recordings = self._counted("recordings", self._recordings + 1)
        recording = fields.object("input_audio")
        data = None if recording is None else recording.text("data")
        if recording is None or data is None:
            raise fields.refused("input_audio", "must be an object with 'data' and 'format'")
        recording.choice("format", ("wav",))
        recording.finish()
        samples = read_recording(data, recording.path("data"), self._limits)
        return {"type": "audio", "audio": samples}

    def _text(self, text: str) -> str:
        self._characters = self._counted("characters", self._characters + len(text))
        return text

    def _counted(self, name: str, count: int) -> int:
        limit = getattr(self._limits, name)
        if count > limit:
            raise ApiError(f"messages: more than {limit} {name}", "messages")
        return count
