"""Bundles for LiteRT-LM: the model, its tokenizer, chat template and encoders in one file."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.errors import ExportError, OutputError, require
from glm_edge.export.common.signatures import Signature, check_model
from glm_edge.export.common.sizes import check_fixed, check_lengths
from glm_edge.export.common.weights import Conversion
from glm_edge.export.litertlm import signatures as lm_signatures
from glm_edge.export.litertlm.bundle import EXTRA, make_repeatable
from glm_edge.export.litertlm.chat_templates import answer_end, bundled_template
from glm_edge.export.litertlm.verify import verify_bundle
from glm_edge.export.tflite.export import write_signatures
from glm_edge.export.tflite.weights import to_tflite_weights
from glm_edge.export.verify.results import Verification
from glm_edge.export.verify.worker import TIMEOUT
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.preprocess import Processor
from glm_edge.writers import check_target, scratch_beside, write_stream

DECODER = "PREFILL_DECODE"
# Token counts of the prefill signatures that every bundle has.
SHORT_LENGTHS = (2, 16)


@dataclass(frozen=True)
class Bundle:
    """A written bundle, with its model and parameters.

    Attributes:
      path: path of the file.
      file_bytes: size of the file.
      sections: size in bytes of each `.tflite` section, by the runtime's name of it.
      prefill_lengths: token counts of the prefill signatures.
      cache_slots: number of cache slots.
      image_size: (height, width) to which the runtime stretches images, or None.
      conversions: parameters that are stored in a different form than in the model; changes of the
        chat template; and remaining differences in the engine.
      template: the chat template of the bundle.
      answer_end: token that replaces the last token of each answer in the context, as the engine
        feeds zeros for its embedding. None for a model that reads tokens, or without stop tokens.
      model: model that was traced.
      params: parameters with the values that the file stores.
      processor: processor that prepares the same conversations for JAX.
    """

    path: Path
    file_bytes: int
    sections: dict[str, int]
    prefill_lengths: tuple[int, ...]
    cache_slots: int
    image_size: tuple[int, int] | None
    conversions: tuple[Conversion, ...]
    template: str = field(repr=False)
    answer_end: int | None
    model: MultimodalGLM = field(repr=False)
    params: Params = field(repr=False)
    processor: Processor = field(repr=False)

    def verify(
        self,
        texts: Sequence[str] | None = None,
        prompts: int = 48,
        max_new_tokens: int = 32,
        threshold: float | None = None,
        compute: str | None = None,
        seed: int = 0,
        check: bool = True,
        timeout: float = TIMEOUT,
    ) -> Verification:
        """Compare the engine's answers with JAX's; see `litertlm.verify.verify_bundle`."""
        return verify_bundle(
            self,
            texts,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            threshold=threshold,
            compute=compute,
            seed=seed,
            check=check,
            timeout=timeout,
        )


def litertlm(
    model: MultimodalGLM,
    params: Params,
    processor: Processor | str | Path,
    path: str | Path,
    prefill_lengths: Iterable[int] = (128,),
    cache_slots: int | None = None,
    image_size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a model as a `.litertlm` bundle, which LiteRT-LM's engines and apps open.

    The runtime renders the chat template, tokenizes, and inserts an image or a recording at its
    placeholder. It differs from `Processor` as follows:

    * It stretches images to one size with its own resampling; an image of `image_size` is not
    changed.
    * It encodes a recording to the end, except for samples after the last full `hop_length`.
    * Names of special tokens in a user's text become special tokens.
    * It passes `content` to the template as parts, keeps the stop token of an answer, and feeds
      only the text that a message adds to the conversation. `litertlm.chat_templates` repairs the
      template where needed, or raises. `Bundle.conversions` lists the repairs.
    * A repair may rely on the stop token. An answer that a token limit truncates, or that another
      stop token ends, then lacks it in the next turn.
    * For a model that reads embeddings, it feeds a row of zeros for the last token of an answer
      (litert-lm 0.18.1). The graph replaces it with `Bundle.answer_end`, the stop token that the
      template writes. An answer that a token limit truncates therefore loses its last token in the
      next turn.

    For a model that reads embeddings, the file stores the embedding table twice if the head is tied
    to it.

        bundle = ge.export.litertlm(model, params, "path/to/checkpoint", "phone.litertlm")
        print(bundle.verify())

    Args:
      model: the model.
      params: its parameters, see `tflite.weights.to_tflite_weights`.
      processor: processor of the model, or a checkpoint directory that contains one.
      path: path of the file.
      prefill_lengths: token counts of the prefill signatures. Lengths 2 and 16 are added, so that a
        conversation can continue until the cache is full.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.
      image_size: (height, width) of images in pixels; None uses the vision encoder's size.
      overwrite: whether to replace an existing file.

    Returns:
      The bundle.

    Raises:
      ExportError: a parameter, the model or its chat template cannot be written; the message names
        a supported alternative.
      OutputError: the file already exists or cannot be written.
      CheckpointError: a file of the directory is missing or damaged.
      MissingExtraError: TensorFlow, LiteRT or LiteRT-LM's builder is not installed.
    """
    path = Path(path)
    # The sections are stored beside the bundle until it is complete.
    check_target(path, overwrite, None, 2 * boxes.stored_bytes(params))
    builder = require("litert_lm_builder.litertlm_builder", extra=EXTRA)
    if not isinstance(processor, Processor):
        processor = Processor.from_checkpoint(processor)
    config = model.config
    shapes = check_model(model, params)
    lengths, slots = check_lengths(config, prefill_lengths, cache_slots)
    lengths = with_short_lengths(lengths, slots)
    image_size = _check_encoders(model, processor, image_size)
    media = ["image"] * (config.vision is not None) + ["audio"] * (config.speech is not None)
    template, repairs = bundled_template(processor, media)
    weights = to_tflite_weights(params)
    end = answer_end(processor) if lm_signatures.takes_embeddings(config) else None

    reference = model.clone(compute="float32")
    end_row = None if end is None else lm_signatures.token_embedding(reference, params, end)
    sections = {DECODER: lm_signatures.decoder_signatures(reference, lengths, slots, end_row)}
    if lm_signatures.takes_embeddings(config):
        sections["EMBEDDER"] = [lm_signatures.embedder(reference)]
    if processor.image is not None and image_size is not None:
        vision = lm_signatures.vision_encoder(reference, processor.image, image_size)
        sections["VISION_ENCODER"] = [vision]
    if config.speech is not None and processor.audio is not None:
        speech = lm_signatures.speech_encoder(reference, processor.audio)
        sections["AUDIO_ENCODER_HW"] = [speech]
        sections["AUDIO_ADAPTER"] = [lm_signatures.speech_adapter(reference)]

    # Beside the target, on the disk whose free space was checked.
    try:
        with scratch_beside(path) as directory:
            sizes = {}
            bundle = builder.LitertLmFileBuilder()
            author = builder.Metadata("Authors", f"glm_edge {__version__}", builder.DType.STRING)
            bundle.add_system_metadata(author)
            metadata = directory / "metadata.pb"
            metadata.write_bytes(_metadata(model, processor, template, slots, image_size))
            bundle.add_llm_metadata(str(metadata))
            processor.tokenizer.save(str(directory / "tokenizer.json"))
            bundle.add_hf_tokenizer(str(directory / "tokenizer.json"))
            for section, signatures in sections.items():
                file = directory / f"{section.lower()}.tflite"
                read = {name: shape for name, shape in shapes.items() if _reads(signatures, name)}
                sizes[section] = write_signatures(signatures, read, weights, file)
                bundle.add_tflite_model(str(file), builder.TfLiteModelType[section])

            def build(stream: BinaryIO) -> None:
                bundle.build(stream)
                make_repeatable(stream)

            file_bytes = write_stream(path, build)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return Bundle(
        path=path,
        file_bytes=file_bytes,
        sections=sizes,
        prefill_lengths=tuple(lengths),
        cache_slots=slots,
        image_size=image_size,
        conversions=(*weights.conversions, *repairs),
        template=template,
        answer_end=end,
        model=model,
        params=weights.params,
        processor=processor,
    )


def with_short_lengths(lengths: Sequence[int], cache_slots: int) -> list[int]:
    """Add short prefill signatures to the requested ones.

    The runtime rejects a message of any length if fewer slots are free than the shortest signature
    has tokens. The middle length processes a typical message in few calls.

    Args:
      lengths: token counts of the prefill signatures, ascending.
      cache_slots: number of cache slots.

    Returns:
      All token counts, ascending.
    """
    least = min(lengths, default=cache_slots + 1)
    return [*(length for length in SHORT_LENGTHS if length < min(least, cache_slots)), *lengths]


def _reads(signatures: Iterable[Signature], path: str) -> bool:
    return any(path.split("/")[0] in signature.subtrees for signature in signatures)


def _check_encoders(
    model: MultimodalGLM, processor: Processor, image_size: tuple[int, int] | None
) -> tuple[int, int] | None:
    config = model.config
    for name, encoder in (("image", config.vision), ("audio", config.speech)):
        if encoder is not None and getattr(processor, name) is None:
            raise ExportError(
                f"{config.name}: the model reads {name}, but its processor does not prepare it"
            )
    if config.vision is None:
        return None
    if config.vision.boundary_embeddings and config.decoder.mrope_section:
        raise ExportError(
            f"{config.name}: boundary_embeddings are not supported with three-dimensional positions"
        )
    check_fixed("image_size", config.vision.image_size if image_size is None else image_size)
    height, width = config.vision.image_size if image_size is None else image_size
    config.vision.grid_of((height, width))
    return height, width


def _metadata(
    model: MultimodalGLM,
    processor: Processor,
    template: str,
    cache_slots: int,
    image_size: tuple[int, int] | None,
) -> bytes:
    protocol = require("litert_lm_builder.runtime.proto.llm_metadata_pb2", extra=EXTRA)
    metadata = protocol.LlmMetadata(
        max_num_tokens=cache_slots,
        jinja_prompt_template=template,
        supports_thinking=False,
        supports_function_calling=False,
    )
    for token in processor.stop_token_ids:
        metadata.stop_tokens.add().token_ids.ids.append(token)
    generic = metadata.llm_model_type.generic_model
    generic.SetInParent()
    placeholders = []
    if image_size is not None:
        generic.image_enabled, generic.add_image_end = True, False
        generic.image_tensor_height, generic.image_tensor_width = image_size
        generic.image_token_regex = _repeated(processor.image_token)
        placeholders.append(generic.image_token_regex)
    if model.config.speech is not None and (audio := processor.audio) is not None:
        generic.audio_enabled, generic.add_audio_end = True, False
        generic.skip_mel_spectrogram_extraction = True
        generic.audio_sample_rate_hz, generic.audio_num_channels = audio.sample_rate, 1
        generic.audio_frame_length = generic.audio_hop_length = audio.hop_length
        generic.audio_input_scale = 1.0
        generic.audio_token_regex = _repeated(processor.audio_token)
        placeholders.append(generic.audio_token_regex)
    if placeholders:
        generic.delimiter_regex = f"({'|'.join(placeholders)})"
    return metadata.SerializeToString()


def _repeated(token: str) -> str:
    # A template for images of a fixed size may write every placeholder itself.
    return f"(?:{re.escape(token)})+"
