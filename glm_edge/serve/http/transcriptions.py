"""`/v1/audio/transcriptions`: a recording in a form, its words as the answer."""

from collections.abc import Sequence
from typing import Any

from glm_edge.errors import require
from glm_edge.generate.sampling import Sampling
from glm_edge.serve.http.answers import OMIT, Answer, AnswerForm, Piece
from glm_edge.serve.http.errors import ApiError
from glm_edge.serve.http.fields import Fields
from glm_edge.serve.http.formats import Gathered
from glm_edge.serve.http.media import check_recording
from glm_edge.serve.http.prepare import Prepared
from glm_edge.serve.http.service import Service
from glm_edge.serve.requests import Request

# The instruction of GLM-ASR's processor.
INSTRUCTION = "Please transcribe this audio into text"
MAX_FIELDS = 20
MAX_FIELD_CHARACTERS = 10_000
FORMATS = ("json", "text")


class TranscriptionFormat:
    """The shape of a transcription."""

    def __init__(self, seconds: float, as_text: bool) -> None:
        """Start a response.

        Args:
          seconds: duration of the recording.
          as_text: answers in plain text.
        """
        self._usage = {"type": "duration", "seconds": round(seconds, 3)}
        self._as_text, self._text = as_text, ""

    def begin(self, count: int) -> list[dict[str, Any]]:
        """Return no chunks."""
        return []

    def piece(self, index: int, piece: Piece, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the words of a piece."""
        self._text += piece.content
        if not piece.content:
            return []
        return [{"type": "transcript.text.delta", "delta": piece.content}]

    def finish(self, index: int, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return all words."""
        return [{"type": "transcript.text.done", "text": self._text, "usage": self._usage}]

    def end(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return no chunks."""
        return []

    def complete(
        self, answers: Sequence[Answer], gathered: Sequence[Gathered]
    ) -> dict[str, Any] | str:
        """Return the words without the white space around them."""
        text = gathered[0].content.strip()
        return text if self._as_text else {"text": text, "usage": self._usage}


def prepare_transcription(service: Service, raw: bytes, content_type: str) -> Prepared:
    """Prepare a request of `/v1/audio/transcriptions`.

    Args:
      service: the service.
      raw: the body, a form.
      content_type: of the body, with its boundary.

    Returns:
      The request.

    Raises:
      GlmEdgeError: the form is malformed, or the model does not transcribe.
    """
    if not service.transcribes:
        raise ApiError(
            f"model: {service.names[0]} does not transcribe; it answers spoken instructions as "
            "input_audio parts of /v1/chat/completions",
            "model",
            code="unsupported",
        )
    texts, recording = read_form(raw, content_type)
    fields = Fields(texts)
    service.model_named(fields.text("model"))
    stream = fields.choice("stream", ("true", "false")) == "true"
    response_format = fields.choice("response_format", FORMATS) or "json"
    instruction = fields.text("prompt") or INSTRUCTION
    temperature = _temperature(fields)
    for name, fault in (
        ("language", "the model finds the language itself"),
        ("timestamp_granularities[]", "the model gives no times"),
    ):
        if name in fields:
            raise fields.refused(name, fault)
    fields.choice("chunking_strategy", ("auto",))
    fields.finish()
    if recording is None:
        raise ApiError("file: is missing", "file")
    samples, rate = check_recording(recording, "file", service.limits)
    parts = [{"type": "audio", "audio": (samples, rate)}, {"type": "text", "text": instruction}]
    request = Request(
        inputs=service.processor([{"role": "user", "content": parts}]),
        max_new_tokens=service.engine.backend.capacity,
        sampling=Sampling(temperature=temperature),
        stop_tokens=service.stop_tokens,
    )
    return Prepared(
        requests=[request],
        forms=[AnswerForm(tokenizer=service.processor.tokenizer, thinking=OMIT)],
        format=TranscriptionFormat(len(samples) / rate, response_format == "text"),
        stream=stream,
    )


def read_form(raw: bytes, content_type: str) -> tuple[dict[str, str], bytes | None]:
    """Parse a form with one file.

    Args:
      raw: the body.
      content_type: with the boundary.

    Returns:
      `(texts, file)`: fields by name, and the content of `file` or None.

    Raises:
      ApiError: the form is malformed or has too many fields.
      MissingExtraError: python-multipart is not installed.
    """
    parser = require("python_multipart", extra="serve")
    boundary = parser.multipart.parse_options_header(content_type)[1].get(b"boundary")
    if not boundary or len(boundary) > 200:
        raise ApiError("content-type: has no boundary")
    texts: dict[str, str] = {}
    files: list[Any] = []

    def on_field(field: Any) -> None:
        name, value = field.field_name or b"", field.value or b""
        if len(texts) >= MAX_FIELDS or len(value) > MAX_FIELD_CHARACTERS:
            raise ApiError("body: has too many or too long fields")
        texts[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")

    def on_file(file: Any) -> None:
        if files or file.field_name != b"file":
            raise ApiError("file: must be the only file of the form", "file")
        files.append(file)

    # Files stay in memory, whose limit is that of the body.
    config = {"MAX_MEMORY_FILE_SIZE": len(raw) + 1}
    form = parser.FormParser(
        "multipart/form-data", on_field, on_file, boundary=boundary, config=config
    )
    try:
        form.write(raw)
        form.finalize()
    except parser.exceptions.FormParserError as error:
        raise ApiError(f"body: is not a form: {error}") from error
    content = None
    if files:
        files[0].file_object.seek(0)
        content = files[0].file_object.read()
    return texts, content


def _temperature(fields: Fields) -> float:
    text = fields.text("temperature") or "0"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise fields.refused("temperature", f"must be a number in 0..2, got {text!r:.60}")
    return value
