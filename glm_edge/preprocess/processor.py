"""Conversion of conversations with images, videos and recordings to model inputs."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge.configs.stop_tokens import read_stop_tokens
from glm_edge.errors import CheckpointError, ConfigError, DataError
from glm_edge.gguf_file import GGUFFile, find_gguf
from glm_edge.preprocess import chat, gguf_tokenizer, media, native_config, processor_config
from glm_edge.preprocess.audio import prepare_recording
from glm_edge.preprocess.inputs import Inputs
from glm_edge.preprocess.processing import AudioProcessing, ImageProcessing, VideoProcessing
from glm_edge.preprocess.tokenizer_files import TOKENIZER, read_tokenizer
from glm_edge.preprocess.tokens import decode, marked_ids, special_tokens
from glm_edge.preprocess.vision import prepare_image, prepare_video
from glm_edge.writers import no_directory

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def conversations_of(messages: Any) -> Sequence[Sequence[Any]]:
    """Convert one message, one conversation or several to a list of conversations.

    Args:
      messages: one message, a list of messages, or a list of such lists.

    Returns:
      The conversations.

    Raises:
      DataError: `messages` has another type, or there is no conversation.
    """
    if isinstance(messages, Mapping):
        return [[messages]]
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise DataError(
            f"messages: pass a list of {{'role': ..., 'content': ...}}, not a "
            f"{type(messages).__name__}"
        )
    if not messages:
        raise DataError("messages: there is no conversation")
    conversations = [messages] if isinstance(messages[0], Mapping) else messages
    for index, conversation in enumerate(conversations):
        if isinstance(conversation, str) or not isinstance(conversation, Sequence):
            raise DataError(
                f"messages[{index}]: must be a list of {{'role': ..., 'content': ...}}, not a "
                f"{type(conversation).__name__}"
            )
    return conversations


def _gguf_fields(file: GGUFFile, family: str | None, template: str | None) -> dict[str, Any]:
    """Read the fields of a processor from a GGUF file."""
    template = template or gguf_tokenizer.chat_template(file)
    if template is None:
        if family is None:
            raise ConfigError(f"{file.path}: has no chat template; pass template= or family=")
        template = chat.family_template(family)
    pads = [gguf_tokenizer.token_id(file, name) for name in ("padding", "eos")]
    return {
        "tokenizer": gguf_tokenizer.read_gguf_tokenizer(file),
        "template": template,
        "pad_token_id": next((pad for pad in pads if pad is not None), 0),
        "stop_token_ids": gguf_tokenizer.stop_tokens(file),
        "variables": gguf_tokenizer.named_tokens(file),
    }


@dataclass(frozen=True)
class Processor:
    """A processor that converts conversations to model inputs, in the format of training.

        processor = ge.Processor.from_checkpoint("path/to/checkpoint")
        inputs = processor([{"role": "user", "content": "What is on the screen?"}])

    Attributes:
      tokenizer: a `tokenizers.Tokenizer`.
      template: Jinja source of the chat template.
      image: parameters of image preprocessing; None for a model without images.
      video: parameters of video preprocessing, or None.
      audio: parameters of audio preprocessing, or None.
      image_token: placeholder of an image feature.
      video_token: placeholder that a template writes for a video.
      audio_token: placeholder of a speech feature.
      pad_token_id: token that pads rows on the left.
      stop_token_ids: tokens that end an answer.
      variables: further variables of the template, such as `bos_token`.
    """

    tokenizer: Any
    template: str
    image: ImageProcessing | None = None
    video: VideoProcessing | None = None
    audio: AudioProcessing | None = None
    image_token: str = "<|image|>"
    video_token: str = "<|video|>"
    audio_token: str = "<|pad|>"
    pad_token_id: int = 0
    stop_token_ids: tuple[int, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_checkpoint(
        cls, directory: str | Path, family: str | None = None, template: str | None = None
    ) -> "Processor":
        """Read a checkpoint's config.json, tokenizer.json and optional processor files.

        Args:
          directory: checkpoint directory in the format of Hugging Face or of this library, or a
            GGUF file.
          family: one of `glm_edge.preprocess.chat.FAMILIES`, whose template is used if the
            checkpoint has none. None infers the family from config.json.
          template: Jinja source that overrides the checkpoint's and the family's template.

        Returns:
          The processor.

        Raises:
          CheckpointError: a file is missing or damaged.
          ConfigError: a field has an unsupported value, or files are inconsistent.
        """
        directory = Path(directory)
        file = find_gguf(directory)
        if file is not None:
            return cls(**_gguf_fields(GGUFFile(file), family, template))
        if not os.path.isdir(directory):
            raise CheckpointError(no_directory(directory))
        where = str(directory / "config.json")
        config = processor_config.read_json(directory / "config.json")
        ours = config.get("format") == native_config.FORMAT
        if not ours and "model_type" not in config:
            raise CheckpointError(
                f"{where}: is missing, or neither a glm_edge checkpoint ('format': "
                f"{native_config.FORMAT!r}) nor a Hugging Face one ('model_type')"
            )
        tokenizer = read_tokenizer(directory / TOKENIZER)
        names = processor_config.read_json(directory / "tokenizer_config.json")
        if ours:
            shape = native_config.read_config(config, where)
            encoders = native_config.read_encoders(directory, shape, tokenizer)
            config = {"pad_token_id": shape.pad_token_id, "eos_token_id": list(shape.eos_token_ids)}
        else:
            encoders = processor_config.read_encoders(directory, config, tokenizer)
        template = template or chat.checkpoint_template(directory)
        if template is None:
            family = family or processor_config.read_family(config)
            if family is None:
                kind = config.get("model_type", native_config.FORMAT)
                raise ConfigError(
                    f"{directory}: has no chat template, and this library has none for model_type "
                    f"{kind!r}; pass template= or family="
                )
            template = chat.family_template(family)
        tokens = {name: processor_config.token_text(names.get(name)) for name in NAMED_TOKENS}
        return cls(
            tokenizer=tokenizer,
            template=template,
            **encoders,
            pad_token_id=processor_config.read_pad_token_id(config, names, tokenizer),
            stop_token_ids=read_stop_tokens(directory, *processor_config.sections(config)),
            variables={name: token for name, token in tokens.items() if token is not None},
        )

    def __call__(
        self,
        messages: Sequence[Any],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        special_tokens_in_text: bool = False,
        **variables: Any,
    ) -> Inputs:
        """Prepare a batch.

        Args:
          messages: one message, one conversation or several; see
            `glm_edge.preprocess.chat.render`. A part `{"type": "image", "image": …}` contains an
            array, a path or a data URL. A part without a value consumes the next of `images`.
            Parts of types `video` and `audio` work in the same way.
          images: [height, width, C] in 0..1 or uint8, paths or Pillow images, in reading order.
          videos: `Video` or `(frames, fps)`, in reading order.
          audio: samples at the model's rate, `(samples, rate)`, or paths of WAV files.
          tools: JSON schemas of functions that the model may call.
          add_generation_prompt: opens the assistant's turn at the end.
          special_tokens_in_text: True converts names of special tokens to those tokens everywhere,
            as most libraries do. False encodes them as ordinary text in messages, tools and
            variables. An assistant's content and reasoning keep
            `glm_edge.preprocess.sandbox.marks.ANSWER_TOKENS`, such as `<think>`.
          **variables: further variables of the template.

        Returns:
          The inputs.

        Raises:
          DataError: messages, images or recordings are malformed, too few or too many, or the
            chat template fails or exceeds its limits of time or memory.
        """
        conversations = conversations_of(messages)
        supplied = {"image": images, "video": videos, "audio": audio}
        shown: list[np.ndarray] = []
        chunks: list[tuple[np.ndarray, np.ndarray]] = []
        rows = []
        for conversation, items in zip(
            conversations, media.gather(conversations, supplied), strict=True
        ):
            placeholders = []
            for kind, value in items:
                arrays, placeholder = getattr(self, f"_prepare_{kind}")(value)
                if kind == "audio":
                    chunks.append(arrays)
                else:
                    shown.append(arrays)
                placeholders.append((kind, placeholder))
            rendered = chat.render_marked(
                self.template,
                conversation,
                tools,
                add_generation_prompt,
                variables,
                self.variables,
                () if special_tokens_in_text else special_tokens(self.tokenizer).names,
            )
            text = self._expand(rendered.text, placeholders)
            rows.append(marked_ids(self.tokenizer, text, rendered.marks.reveal(text)))
        length = max(map(len, rows))
        tokens = np.full((len(rows), length), self.pad_token_id, np.int32)
        valid = np.zeros((len(rows), length), bool)
        for index, row in enumerate(rows):
            tokens[index, length - len(row) :] = row
            valid[index, length - len(row) :] = True
        if not length:
            raise DataError("messages: the chat template wrote nothing")
        speech = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
        mel, frames = speech or (None, None)
        return Inputs(tokens, valid=valid, images=shown or None, audio=mel, audio_frames=frames)

    def render(
        self,
        messages: Sequence[chat.Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render one conversation, with one placeholder per image, video and recording."""
        values = {**self.variables, **variables}
        return chat.render(self.template, messages, tools, add_generation_prompt, **values)

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode generated tokens [T] up to, and without, the first stop token.

        The text keeps other special tokens, such as `<think>`.
        """
        ids = [int(token) for token in tokens]
        stops = [index for index, token in enumerate(ids) if token in self.stop_token_ids]
        return decode(self.tokenizer, ids[: min(stops, default=len(ids))])

    def _prepare_image(self, value: Any) -> tuple[np.ndarray, str]:
        if self.image is None:
            raise DataError("messages contain an image; this model reads no images")
        image = prepare_image(media.open_image(value), self.image)
        return image, self.image_token * self.image.num_tokens(image)

    def _prepare_video(self, value: Any) -> tuple[np.ndarray, str]:
        if self.video is None:
            raise DataError("messages contain a video; this model's sampling of videos is unknown")
        frames, seconds = prepare_video(media.open_video(value), self.video)
        features = self.image_token * self.video.num_tokens(frames)
        return frames, "".join(
            f"<|begin_of_image|>{features}<|end_of_image|>{int(second)}" for second in seconds
        )

    def _prepare_audio(self, value: Any) -> tuple[tuple[np.ndarray, np.ndarray], str]:
        if self.audio is None:
            raise DataError("messages contain a recording; this model reads no audio")
        samples = media.open_recording(value, self.audio.sample_rate)
        mel, audio_frames = prepare_recording(samples, self.audio)
        if self.audio.silence:
            audio_frames = np.full_like(audio_frames, mel.shape[1])
        return (mel, audio_frames), self.audio_token * self.audio.num_tokens(audio_frames)

    def _expand(self, text: str, placeholders: list[tuple[str, str]]) -> str:
        """Repeat each placeholder of the template to the count of its features."""
        kinds = {}
        if self.audio is not None:
            kinds[self.audio_token] = "audio"
        if self.video is not None:
            kinds[self.video_token] = "video"
        if self.image is not None:
            kinds[self.image_token] = "image"
            if self.image.sizing != "smart":
                # Templates for a fixed image size may write all placeholders of an image.
                features = self.image.num_tokens(np.empty((*self.image.fixed_size, 0)))
                text = text.replace(self.image_token * features, self.image_token)
        if not kinds:
            return text
        pattern = re.compile("|".join(map(re.escape, kinds)))
        written = [kinds[token] for token in pattern.findall(text)]
        asked = [kind for kind, _ in placeholders]
        if written != asked:
            raise DataError(
                f"the chat template wrote placeholders for {written or 'nothing'}, messages "
                f"contain {asked or 'nothing'}; it must write one per item, in order"
            )
        remaining = iter(placeholders)
        return pattern.sub(lambda _: next(remaining)[1], text)
