"""Comparison of an exported model, run in its runtime, with the JAX model of the same codes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_edge import params as boxes
from glm_edge.configs import GLMConfig, SpeechConfig, VisionConfig
from glm_edge.errors import DataError, ExportError
from glm_edge.export.common.directory import write_description
from glm_edge.export.common.sizes import DECODE, attended_by, step_name
from glm_edge.export.common.weights import check_weights
from glm_edge.export.tflite.file import mark_verified
from glm_edge.export.verify.graph_directory import GraphDirectoryRunner
from glm_edge.export.verify.jax_runner import JaxRunner
from glm_edge.export.verify.litert_runner import LiteRTRunner
from glm_edge.export.verify.results import MIN_TOKENS, Verification, compute_of, conclude
from glm_edge.export.verify.runner import SignatureRunner
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params


@dataclass(frozen=True)
class Window:
    """A text with the image and audio of its placeholders, on which two models are compared.

    Attributes:
      tokens: token ids, int [T].
      image: pixels [height, width, channels], or None.
      audio: log-mel [num_frames, mel_bins], or None.
      counted: bool [T], False for positions whose prediction is ignored, such as those where the
        answer's grammar forces the next token. None counts every position.
      prompt_length: number of tokens from which free-running generation starts; None uses half.
      max_new_tokens: most tokens that free-running generation adds.
    """

    tokens: np.ndarray
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    counted: np.ndarray | None = None
    prompt_length: int | None = None
    max_new_tokens: int = 32


def verify(
    path: str | Path,
    model: MultimodalGLM,
    params: Params,
    windows: Iterable[Window] | None = None,
    threshold: float | None = None,
    compute: str | None = None,
    free_running: int = 8,
    seed: int = 0,
    check: bool = True,
    isolated: bool = True,
) -> Verification:
    """Run an exported file and compare it with the JAX model of the same codes.

    A `.tflite` file runs in LiteRT. The graphs of a directory run in onnxruntime or MNN, in float32
    on dequantized weights. Before that, its codes and scales are compared with the model's bit for
    bit (for MNN, those of products). Both models predict each token of the texts from the same
    preceding tokens (`agreement`), some texts are continued greedily, and each signature runs once
    on random inputs.

    Args:
      path: path of the file, or of the directory of ONNX or MNN graphs.
      model: model that was traced.
      params: parameters with the stored values, `ExportedModel.params` or `Package.params`.
      windows: texts for the comparison; None draws random ones with at least 1,000 positions in
        total.
      threshold: minimum agreement. None uses 0.99, or 0.97 for a `.tflite` file, which rounds
        activations, against `float32`.
      compute: arithmetic of the JAX model. None uses `int8_static` if the parameters, and so the
        file, have static grids, and otherwise `int8_dynamic`. ONNX and MNN graphs are compared with
        `float32` only.
      free_running: number of windows that are also continued greedily from their first tokens.
      seed: seed of random windows.
      check: whether to raise if the agreement is below the threshold.
      isolated: whether to run the file in a separate process, so that a damaged file can crash only
        that process. False is faster, for a `.tflite` file that was just written. Directories
        always run in a separate process.

    Returns:
      The comparison. If it passes the default threshold on at least 1,000 positions, the file's
      description is marked as verified. Otherwise `Verification.shortfalls` lists the reasons.

    Raises:
      ExportError: the agreement is below the threshold, a signature differs from JAX, no position
        is counted, the file is damaged, or it contains a different model.
      DataError: a window does not fit the cache, or its `counted` does not have its shape.
    """
    directory = Path(path).is_dir()
    runner: GraphDirectoryRunner | LiteRTRunner
    runner = GraphDirectoryRunner(path) if directory else LiteRTRunner(path, isolated=isolated)
    if runner.config != model.config:
        raise ExportError(f"{path}: contains a different model than {model.config.name}")
    if isinstance(runner, GraphDirectoryRunner):
        shapes = {name: tuple(leaf.shape) for name, leaf in boxes.path_items(params)}
        check_weights(runner.read_weights(shapes), params, path)
    if runner.float32 and compute not in (None, "float32"):
        raise ExportError(
            f"{path}: runs in float32, so a comparison with {compute} is not meaningful; use "
            "compute='float32'"
        )
    if compute is None:
        compute = "float32" if runner.float32 else compute_of(params)
    reference = JaxRunner(
        model.clone(compute=compute),
        params,
        runner.prefill_lengths,
        runner.cache_slots,
        runner.prefill_logits,
        runner.forced_lengths,
    )
    windows = list(windows) if windows is not None else random_windows(runner, seed)
    hits, errors, divergences = [], [], []
    for index, window in enumerate(windows):
        counted = _counted(window)
        content = (window.tokens, window.image, window.audio)
        # The file runs first, so that a damaged one fails before JAX compiles anything. Every
        # second text runs through the signatures that attend to all slots.
        run = runner.looking_at_all_slots() if index % 2 else runner
        logits = run.score(*content)[counted]
        if not np.isfinite(logits).all():
            raise ExportError(f"{path}: its logits are not finite")
        expected = reference.score(*content)[counted]
        hits.append(expected.argmax(-1) == logits.argmax(-1))
        errors.append(np.abs(expected - logits).max(initial=0.0))
        divergences.append(_kl(expected, logits))
    distances = signature_distances(reference, runner, seed)
    same = np.concatenate(hits) if hits else np.zeros(0, bool)
    if not same.size:
        raise ExportError(f"{path}: no window counts a position; set counted for at least one")
    free = [_free_running(reference, runner, w) for w in windows[:free_running]]
    equal, generated = (sum(counts) for counts in zip(*free, strict=True)) if free else (0, 0)
    result = conclude(
        path,
        compute,
        threshold,
        check,
        runner.float32,
        agreement=float(same.mean()),
        tokens=int(same.size),
        max_abs_error=float(max(errors)),
        mean_kl=float(np.concatenate(divergences).mean()),
        free_running_agreement=equal / generated if generated else None,
        free_running_tokens=generated,
        signatures=distances,
    )
    if result.verified and directory:
        write_description(Path(path), {**runner.description, "verified": True})
    elif result.verified:
        mark_verified(path)
    return result


def signature_distances(
    reference: SignatureRunner, runner: SignatureRunner, seed: int = 0
) -> dict[str, float]:
    """Measure the distance between each signature of a file and its JAX function.

    Args:
      reference: runner of the JAX functions.
      runner: runner of the file.
      seed: seed of the inputs.

    Returns:
      Distance by signature, as in `Verification.signatures`.
    """
    rng, config, distances = np.random.default_rng(seed), runner.config, {}
    if config.vision is not None:
        image = _random_image(config.vision, rng)
        features = reference.encode_images(image)
        distances["vision"] = _distance(features, runner.encode_images(image))
    if config.speech is not None:
        audio = _random_audio(config.speech, rng)
        features = reference.encode_audio(audio)
        distances["speech"] = _distance(features, runner.encode_audio(audio))
    for length in runner.lengths:
        name = "embed" if length == 1 else f"embed_{length}"
        tokens = rng.choice(_ordinary_tokens(config), (1, length)).astype(np.int32)
        rows = reference.run(name, tokens=tokens)["embeddings"]
        distances[name] = _distance(rows, runner.run(name, tokens=tokens)["embeddings"])
        expected = _logits_of_steps(reference, rows[0], None)
        attended_slots = attended_by(length, runner.attended_slots, runner.forced_lengths)
        for attended in (None, *attended_slots):
            logits = _logits_of_steps(runner, rows[0], attended)
            distances[step_name(length, attended)] = _distance(expected, logits)
    return distances


def _logits_of_steps(runner: SignatureRunner, rows: np.ndarray, attended: int | None) -> np.ndarray:
    """Run the signature for these rows, and then one decoding step if a slot is free."""
    length = len(rows)
    inputs = runner.step_inputs(rows, 0, length, attended)
    cache = runner.run(step_name(length, attended), **inputs, **runner.empty_cache())
    logits = [cache.pop("logits")[0]] if "logits" in cache else []
    if length < runner.cache_slots:
        inputs = runner.step_inputs(rows[-1:], length, 1)
        logits.append(runner.run(DECODE, **inputs, **cache)["logits"][0])
    return np.concatenate(logits)


def _distance(expected: np.ndarray, measured: np.ndarray) -> float:
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(expected - measured) / np.linalg.norm(expected))


def random_windows(runner: SignatureRunner, seed: int) -> list[Window]:
    """Draw texts with at least 1,000 positions in total, a third each with image and speech.

    Args:
      runner: runner whose model and cache the windows fit.
      seed: seed of the random values.

    Returns:
      The windows.
    """
    rng = np.random.default_rng(seed)
    config, slots = runner.config, runner.cache_slots
    length = min(max(runner.prefill_lengths, default=32), slots)
    ordinary = _ordinary_tokens(config)
    windows: list[Window] = []
    total = 0
    while total < MIN_TOKENS:
        tokens = rng.choice(ordinary, length).astype(np.int32)
        image = audio = None
        kind = len(windows) % 3
        vision, speech = config.vision, config.speech
        if kind == 1 and vision is not None and vision.num_tokens + length <= slots:
            tokens = np.concatenate([np.full(vision.num_tokens, config.image_token_id), tokens])
            image = _random_image(vision, rng)
        if kind == 2 and speech is not None and speech.num_tokens + length <= slots:
            tokens = np.concatenate([np.full(speech.num_tokens, config.audio_token_id), tokens])
            audio = _random_audio(speech, rng)
        windows.append(Window(tokens.astype(np.int32), image, audio))
        total += len(tokens)
    return windows


def _ordinary_tokens(config: GLMConfig) -> np.ndarray:
    """List the tokens that are not placeholders."""
    placeholders = {config.image_token_id, config.audio_token_id} - {None}
    return np.setdiff1d(np.arange(config.decoder.vocab_size), list(placeholders))


def _random_image(vision: VisionConfig, rng: np.random.Generator) -> np.ndarray:
    return rng.random((*vision.image_size, vision.channels), np.float32)


def _random_audio(speech: SpeechConfig, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(speech.num_frames, speech.mel_bins)).astype(np.float32)


def _counted(window: Window) -> np.ndarray:
    if window.counted is None:
        return np.ones(len(window.tokens), bool)
    if np.shape(window.counted) != (len(window.tokens),):
        raise DataError(
            f"counted: shape {np.shape(window.counted)}, expected one bool for each of "
            f"{len(window.tokens)} tokens"
        )
    return np.asarray(window.counted, bool)


def _free_running(
    reference: SignatureRunner, runner: SignatureRunner, window: Window
) -> tuple[int, int]:
    length = window.prompt_length or max(1, len(window.tokens) // 2)
    count = min(window.max_new_tokens, runner.cache_slots - length)
    if count < 1:
        return 0, 0
    prompt = (window.tokens[:length], window.image, window.audio)
    expected = reference.generate(*prompt, max_new_tokens=count)
    generated = runner.generate(*prompt, max_new_tokens=count)
    return sum(a == b for a, b in zip(expected, generated, strict=False)), len(expected)


def _kl(expected: np.ndarray, measured: np.ndarray) -> np.ndarray:
    log_p, log_q = _log_softmax(expected), _log_softmax(measured)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
