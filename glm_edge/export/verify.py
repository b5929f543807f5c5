"""Comparing an exported model, run in its runtime, with the JAX model of the same integers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge import params as boxes
from glm_edge.errors import DataError, ExportError
from glm_edge.export import container
from glm_edge.export.integers import check_weights
from glm_edge.export.package import write_description
from glm_edge.export.package_model import PackageModel
from glm_edge.export.runtime import JaxModel, LiteRTModel, PhoneModel
from glm_edge.models.multimodal import MultimodalGLM

# Where a file multiplies as JAX does, nearly every token is the same.
ALIKE = 0.99
# LiteRT rounds activations, which `float32` does not.
ROUNDED = {"float32": 0.97}
MIN_TOKENS = 1000


@dataclass(frozen=True)
class Window:
    """One text, with what its placeholders stand for, to compare two models on.

    Attributes:
      tokens: int [T].
      image: [height, width, channels], or None.
      audio: log-mel [num_frames, mel_bins], or None.
      counted: bool [T], False where the prediction made at a position is left out, as where the
        answer's grammar forces the next token; None counts every position.
      prompt_length: tokens that free-running generation starts from; None takes half.
    """

    tokens: np.ndarray
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    counted: np.ndarray | None = None
    prompt_length: int | None = None


@dataclass(frozen=True)
class Verification:
    """How far a file's predictions are from those of its JAX model.

    Attributes:
      agreement: fraction of counted positions with the same likeliest token, teacher-forced.
      tokens: counted positions.
      max_abs_error: largest difference of a logit at them; None where a runtime gives no logits.
      mean_kl: mean of KL(JAX || file) in nats at them; None likewise.
      free_running_agreement: fraction of greedily generated tokens that are the same.
      free_running_tokens: tokens generated.
      compute: how the JAX model multiplied.
      threshold: the agreement asked for.
    """

    agreement: float
    tokens: int
    max_abs_error: float | None
    mean_kl: float | None
    free_running_agreement: float | None
    free_running_tokens: int
    compute: str
    threshold: float

    @property
    def passed(self) -> bool:
        """True when the agreement reaches the threshold."""
        return self.agreement >= self.threshold

    def __str__(self) -> str:
        line = f"{self.agreement:.2%} of {self.tokens} top-1 tokens as in JAX ({self.compute})"
        if self.max_abs_error is not None:
            line += f", max |error| {self.max_abs_error:.3g}, mean KL {self.mean_kl:.3g} nats"
        if self.free_running_agreement is None:
            return line
        free = f"{self.free_running_agreement:.2%} of {self.free_running_tokens}"
        return f"{line}, free-running {free}"


def verify(
    path: str | Path,
    model: MultimodalGLM,
    params: Any,
    windows: Iterable[Window] | None = None,
    threshold: float | None = None,
    compute: str | None = None,
    free_running: int = 8,
    max_new_tokens: int = 32,
    seed: int = 0,
    check: bool = True,
    isolated: bool = True,
) -> Verification:
    """Runs an exported file against the JAX model of the same integers.

    A `.tflite` file runs in LiteRT. The graphs of a directory run in onnxruntime or MNN, in float32
    on dequantized weights, after its integers and scales were found to be the model's bit for bit
    (of MNN, those that products read).

    Args:
      path: the file, or the directory of ONNX or MNN graphs.
      model: that it was traced from.
      params: as the file holds them: `ExportedModel.params` or `Package.params`.
      windows: texts to compare on; None draws random ones with at least 1,000 positions.
      threshold: least agreement; None takes 0.99, but 0.97 of a `.tflite` file, which rounds
        activations, against `float32`.
      compute: how the JAX model multiplies; None takes `int8_static` where the parameters have
        static grids, which the file then has, and else `int8_dynamic`. ONNX and MNN graphs are
        compared with `float32` alone.
      free_running: windows that are also continued greedily from their first tokens.
      max_new_tokens: of each continuation.
      seed: of random windows.
      check: raise when the agreement is below the threshold.
      isolated: run the file in a process of its own, so that a damaged one can crash nothing else;
        False is faster, for a `.tflite` file that was just written. Directories always run so.

    Returns:
      The comparison. When it passes, the file's description is marked as verified.

    Raises:
      ExportError: the agreement is below the threshold, no position is counted, the file is
        damaged, or is one of another model.
      DataError: a window does not fit the cache, or counts other positions than it has.
    """
    package = Path(path).is_dir()
    phone = PackageModel(path) if package else LiteRTModel(path, isolated=isolated)
    if phone.config != model.config:
        raise ExportError(f"{path}: holds another model than {model.config.name}")
    if package:
        check_weights(phone.read_weights(), params, path)
    if phone.float32 and compute not in (None, "float32"):
        raise ExportError(
            f"{path}: is run in float32, so that {compute} would compare other sums; right would "
            "be compute='float32'"
        )
    if compute is None:
        compute = "float32" if phone.float32 else compute_of(params)
    reference = JaxModel(
        model.clone(compute=compute),
        params,
        phone.prefill_lengths,
        phone.cache_slots,
        phone.prefill_logits,
    )
    windows = list(windows) if windows is not None else random_windows(phone, seed)
    same, errors, divergences = [], [], []
    attended_slots = phone.attended_slots
    for index, window in enumerate(windows):
        # Every second text goes through the signatures that look at all slots.
        phone.attended_slots = [] if index % 2 else attended_slots
        counted = _counted(window)
        content = (window.tokens, window.image, window.audio)
        # The file first: a damaged one fails before JAX compiles anything.
        found = phone.score(*content)[counted]
        if not np.isfinite(found).all():
            raise ExportError(f"{path}: gives scores that are not finite")
        expected = reference.score(*content)[counted]
        same.append(expected.argmax(-1) == found.argmax(-1))
        errors.append(np.abs(expected - found).max(initial=0.0))
        divergences.append(_kl(expected, found))
    phone.attended_slots = attended_slots
    same = np.concatenate(same) if same else np.zeros(0, bool)
    if not same.size:
        raise ExportError(f"{path}: nothing to verify on: no window counts a position")
    free = [_free_running(reference, phone, w, max_new_tokens) for w in windows[:free_running]]
    equal, generated = (sum(counts) for counts in zip(*free, strict=True)) if free else (0, 0)
    result = Verification(
        agreement=float(same.mean()),
        tokens=int(same.size),
        max_abs_error=float(max(errors)),
        mean_kl=float(np.concatenate(divergences).mean()),
        free_running_agreement=equal / generated if generated else None,
        free_running_tokens=generated,
        compute=compute,
        threshold=threshold_of(compute, phone.float32) if threshold is None else threshold,
    )
    if result.passed and package:
        write_description(phone.path, {**phone.description, "verified": True})
    elif result.passed:
        container.mark_verified(path)
    elif check:
        raise ExportError(f"{path}: {result}; at least {result.threshold:.2%} must agree")
    return result


def compute_of(params: Any) -> str:
    """How LiteRT multiplies with parameters: on static grids where they have some."""
    leaves = boxes.path_items(params)
    static = any(getattr(leaf, "input_scale", None) is not None for _, leaf in leaves)
    return "int8_static" if static else "int8_dynamic"


def threshold_of(compute: str, float32: bool = False) -> float:
    """Least agreement with a JAX model that multiplies so, of a file that rounds activations.

    Args:
      compute: of the JAX model.
      float32: the file rounds none.
    """
    return ALIKE if float32 else ROUNDED.get(compute, ALIKE)


def random_windows(model: PhoneModel, seed: int) -> list[Window]:
    """Random texts of at least 1,000 positions together, a third each with image and speech."""
    rng = np.random.default_rng(seed)
    config, slots = model.config, model.cache_slots
    length = min(max(model.prefill_lengths, default=32), slots)
    placeholders = {config.image_token_id, config.audio_token_id} - {None}
    ordinary = np.setdiff1d(np.arange(config.decoder.vocab_size), list(placeholders))
    windows, total = [], 0
    while total < MIN_TOKENS:
        tokens = rng.choice(ordinary, length).astype(np.int32)
        image = audio = None
        kind = len(windows) % 3
        vision, speech = config.vision, config.speech
        if kind == 1 and vision is not None and vision.num_tokens + length <= slots:
            tokens = np.concatenate([np.full(vision.num_tokens, config.image_token_id), tokens])
            image = rng.random((*vision.image_size, vision.channels), np.float32)
        if kind == 2 and speech is not None and speech.num_tokens + length <= slots:
            tokens = np.concatenate([np.full(speech.num_tokens, config.audio_token_id), tokens])
            audio = rng.normal(size=(speech.num_frames, speech.mel_bins)).astype(np.float32)
        windows.append(Window(tokens.astype(np.int32), image, audio))
        total += len(tokens)
    return windows


def _counted(window: Window) -> np.ndarray:
    if window.counted is None:
        return np.ones(len(window.tokens), bool)
    if np.shape(window.counted) != (len(window.tokens),):
        raise DataError(
            f"counted has shape {np.shape(window.counted)}; {len(window.tokens)} tokens need one "
            "bool each"
        )
    return np.asarray(window.counted, bool)


def _free_running(
    reference: PhoneModel, phone: PhoneModel, window: Window, max_new_tokens: int
) -> tuple[int, int]:
    length = window.prompt_length or max(1, len(window.tokens) // 2)
    room = min(max_new_tokens, phone.cache_slots - length)
    if room < 1:
        return 0, 0
    prompt = (window.tokens[:length], window.image, window.audio)
    expected = reference.generate(*prompt, max_new_tokens=room)
    found = phone.generate(*prompt, max_new_tokens=room)
    return sum(a == b for a, b in zip(expected, found, strict=False)), len(expected)


def _kl(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
