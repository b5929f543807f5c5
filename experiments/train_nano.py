"""Trains nano, the shipped multimodal checkpoint, on screens, speech and text.

    python -m experiments.train_nano --out_dir=runs/nano --text=train.txt \\
        --digits_dir=mnist --speech_dir=fsdd --holdout_speakers=lucas

Writes `<stage>.csv` (curves), `curve.png`, and `checkpoint/`, which `ge.load` opens.

There are four stages. On one core, the vision tower learns the element in each cell of a screen. On
the other core, the embedding learns from text, and then the speech encoder learns digits. Finally,
the complete model with a new decoder learns to answer questions about screens, together with text.
Every stage has a budget of wall-clock minutes (68 in total for the shipped model) and saves its
state each minute. The same command with the same --out_dir resumes it.
"""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from tokenizers import Tokenizer

import glm_edge as ge
from experiments.common.figures import training_curve
from experiments.nano import objectives, stages
from experiments.nano.batches import ScreenBatches, fit, speech_batches, text_batches
from experiments.nano.phone_screens import digits, generator, speech
from experiments.nano.text.tokenizer import load as read_tokenizer
from glm_edge import configs
from glm_edge import params as params_lib
from glm_edge.cli.console import launch
from glm_edge.cli.corpora import encode_text, pydoc_topics, read_text
from glm_edge.errors import DataError
from glm_edge.models.multimodal import MultimodalGLM

FLAGS = flags.FLAGS
flags.DEFINE_string("out_dir", None, "Directory of the run; an existing run is resumed.")
flags.DEFINE_string("text", None, "UTF-8 training text.")
flags.DEFINE_bool("pydoc", True, "Also train on the calibration half of CPython's help topics.")
flags.DEFINE_string("held_out_text", None, "UTF-8 file of held-out text, whose loss is logged.")
flags.DEFINE_string(
    "digits_dir", None, "Folder of MNIST files, used together with scikit-learn's digits."
)
flags.DEFINE_string("speech_dir", None, "Folder of spoken digits.")
flags.DEFINE_list(
    "holdout_speakers", [], "Speakers of --speech_dir that are only used for the measurement."
)
flags.DEFINE_string(
    "tokenizer",
    str(Path(ge.__file__).parent / "assets/nano/tokenizer.json"),
    "Path of the model's tokenizer.json.",
)
flags.DEFINE_string("init_from", None, "Checkpoint with the initial weights of the joint stage.")
flags.DEFINE_float("vision_minutes", 30.0, "Minutes of the vision stage, on one core.")
flags.DEFINE_float("text_minutes", 22.0, "Minutes of the text stage, on the other core.")
flags.DEFINE_float("speech_minutes", 8.0, "Minutes of the speech stage, after the text.")
flags.DEFINE_float("joint_minutes", 43.0, "Minutes of the joint stage, on all cores.")
flags.DEFINE_integer("seed", 0, "Seed of weights and all random values.")
flags.DEFINE_list("stages", ["vision", "text", "speech", "joint"], "Stages to run or resume.")

TEXT_LENGTH = 256
CURRICULUM = (
    (0.12, ("written", "mixed", "written")),
    (0.3, ("written", "mixed", "written", "text")),
    (1.0, ("written", "spoken", "text")),
)
LANES = (("vision",), ("text", "speech"))
ENCODER_RATE = {"vision": 0.3, "speech": 0.3}


def initial_params(config: configs.GLMConfig, seed: int) -> dict[str, Any]:
    """Draw random weights; scale the decoder's branches by `1 / sqrt(2 layers)`."""
    model = MultimodalGLM(config)
    init = jax.jit(functools.partial(model.init, tokens=jnp.zeros((1, 4), jnp.int32)))
    params = init(jax.random.key(seed))["params"]
    scale = (2 * config.decoder.num_layers) ** -0.5
    for layer in params["decoder"]["layers"].values():
        for branch in (layer["attention"]["o_proj"], layer["mlp"]["down_proj"]):
            branch["weight"] = scale * branch["weight"]
    return params


def load_tokenizer() -> Tokenizer:
    """Return the tokenizer of the flag --tokenizer."""
    return read_tokenizer(FLAGS.tokenizer)


def screen_batches(split: str, seed: int) -> ScreenBatches:
    """Return the screens of one split; splits have disjoint images, speakers and seeds."""
    config = configs.preset("nano")
    sources = [digits.sklearn_digits(split)]
    if FLAGS.digits_dir:
        sources.append(digits.mnist_folder(FLAGS.digits_dir, split))
    drawers = [generator.ScreenGenerator(images) for images in sources]
    rng = generator.random_stream(split, seed)
    spoken = [clip for group in utterances(split) for clip in group]
    return ScreenBatches(config, load_tokenizer(), drawers, spoken, rng)


@functools.cache
def utterances(split: str) -> tuple[list[speech.Utterance], ...]:
    """Return real and synthetic recordings of one split; splits have disjoint speakers."""
    recorded = []
    if FLAGS.speech_dir:
        parts = speech.split_speakers(speech.fsdd_folder(FLAGS.speech_dir), FLAGS.holdout_speakers)
        recorded = parts[0 if split == "train" else 1]
    synthetic = speech.synthesize_digits(FLAGS.seed, speech.VOICES[split])
    return tuple(group for group in (recorded, synthetic) if group)


def tokens_of(path: str) -> np.ndarray:
    """Return token ids of a text file."""
    return encode_text(load_tokenizer(), read_text(path))


def text_to_learn() -> np.ndarray:
    """Return the token ids of all training text."""
    tokens = [tokens_of(FLAGS.text)]
    if FLAGS.pydoc:
        tokens.append(encode_text(load_tokenizer(), pydoc_topics("calibration")))
    return np.concatenate(tokens)


def train_vision(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> None:
    """Train the vision tower to predict the element in each cell."""
    model = MultimodalGLM(configs.preset("nano"), compute="bfloat16")

    def loss(state, batch, rng):
        del rng
        _, features = model.apply(
            {"params": state["params"]}, batch["images"], method=objectives.vision_features
        )
        value = objectives.dense_loss(state["heads"], features, batch)
        correct = jnp.argmax(features @ state["heads"]["class"].T, axis=-1) == batch["cell_class"]
        present = batch["cell_class"] > 0
        accuracy = jnp.sum(correct & present) / jnp.maximum(jnp.sum(present), 1)
        return value, {"loss": value, "cell_accuracy": accuracy}

    def dense_batches(split: str, seed: int):
        source = screen_batches(split, seed)
        while True:
            yield source.draw_cells(16)

    held_out = [batch for batch, _ in zip(dense_batches("eval", 991), range(8), strict=False)]
    measure = jax.jit(lambda state, batch: loss(state, batch, None)[1]["cell_accuracy"])

    def evaluate(state):
        return {"eval.cell_accuracy": float(np.mean([measure(state, b) for b in held_out]))}

    state = {
        "params": {"vision": params["vision"]},
        "heads": {name: heads[name] for name in ("class", "offset", "centre")},
    }
    stages.run_stage(
        "vision",
        directory,
        FLAGS.vision_minutes,
        2e-3,
        state,
        stages.make_optimizer(0.02, lambda name: 1.0),
        {"cells": (dense_batches("train", FLAGS.seed + 1), loss)},
        ((1.0, ("cells",)),),
        evaluate,
    )


def train_text(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> None:
    """Train embedding and decoder on text."""
    del heads
    model = MultimodalGLM(configs.preset("nano"), compute="bfloat16")

    def loss(state, tokens, rng, dropout=0.1):
        value = model.apply(
            {"params": state["params"]}, tokens, rng, dropout, method=objectives.text_loss
        )
        return value, {"loss": value}

    measure = jax.jit(lambda state, tokens: loss(state, tokens, None)[0])

    def evaluate(state):
        if not FLAGS.held_out_text:
            return {}
        held_out = tokens_of(FLAGS.held_out_text)[: 32 * 8 * (TEXT_LENGTH + 1)]
        windows = held_out[: len(held_out) // 257 * 257].reshape(-1, TEXT_LENGTH + 1)
        return {"eval.loss": float(np.mean([measure(state, windows[i::8]) for i in range(8)]))}

    stages.run_stage(
        "text",
        directory,
        FLAGS.text_minutes,
        3e-3,
        {"params": {name: params[name] for name in ("embed", "decoder")}},
        stages.make_optimizer(0.1, lambda name: 1.0),
        {"text": (text_batches(text_to_learn(), 16, TEXT_LENGTH, FLAGS.seed + 2), loss)},
        ((1.0, ("text",)),),
        evaluate,
    )


def train_speech(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> None:
    """Train the speech encoder to recognise the spoken digit."""
    config = configs.preset("nano")
    model = MultimodalGLM(config, compute="bfloat16")
    length = config.speech.num_frames * config.speech.hop_length

    def loss(state, batch, rng):
        samples, spoken = batch
        features = model.apply(
            {"params": state["params"]}, samples, rng, method=objectives.speech_features
        )
        value = objectives.digit_loss(state["heads"], features, spoken)
        scores = features.mean(axis=-2) @ state["heads"]["digit"].T
        return value, {"loss": value, "accuracy": jnp.mean(scores.argmax(-1) == spoken)}

    measure = jax.jit(lambda state, batch: loss(state, batch, None)[1]["accuracy"])

    def evaluate(state):
        rates = {}
        for group in utterances("eval"):
            samples = np.stack([fit(u.samples, length) for u in group]).astype(np.float32)
            spoken = np.array([u.digit for u in group])
            for speaker in sorted({u.speaker for u in group}):
                of_speaker = np.array([u.speaker == speaker for u in group])
                rates[f"eval.{speaker}"] = float(
                    measure(state, (samples[of_speaker], spoken[of_speaker]))
                )
        return rates

    groups = utterances("train")
    shares = (0.7, 0.3) if len(groups) == 2 else (1.0,)
    batches = speech_batches(groups, shares, 48, length, FLAGS.seed + 3)
    state = {"params": {"speech": params["speech"]}, "heads": {"digit": heads["digit"]}}
    stages.run_stage(
        "speech",
        directory,
        FLAGS.speech_minutes,
        1.5e-3,
        state,
        stages.make_optimizer(0.05, lambda name: 1.0),
        {"speech": (batches, loss)},
        ((1.0, ("speech",)),),
        evaluate,
        evaluate_every=1.0,
    )


def train_joint(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> dict[str, Any]:
    """Train the complete model on questions about screens, mixed with text."""
    config = configs.preset("nano")
    model = MultimodalGLM(config, compute="bfloat16")
    train, held_out = screen_batches("train", FLAGS.seed + 4), screen_batches("eval", 992)
    first_x = load_tokenizer().token_to_id("[5,")
    shapes = {"written": (6, 8, 0), "mixed": (6, 4, 4), "spoken": (6, 0, 8)}

    def questions(source: ScreenBatches, shape: tuple[int, int, int]):
        while True:
            yield source.draw(*shape)

    def screen_task(shape):
        layout = train.layout(*shape[1:])

        def loss(state, batch, rng):
            return objectives.screen_loss(
                model, {"params": state["params"]}, state["heads"], batch, layout, first_x, rng
            )

        return loss

    def text_task(state, tokens, rng):
        value = model.apply(
            {"params": state["params"]}, tokens, rng, 0.1, method=objectives.text_loss
        )
        return value, {"loss": value}

    tasks = {name: (questions(train, shape), screen_task(shape)) for name, shape in shapes.items()}
    tokens = text_to_learn()
    tasks["text"] = (text_batches(tokens, 16, TEXT_LENGTH, FLAGS.seed + 5), text_task)
    measured = {
        name: [held_out.draw(*shape) for _ in range(8)]
        for name, shape in shapes.items()
        if name != "mixed"
    }

    @functools.partial(jax.jit, static_argnums=2)
    def taps(state, batch, name):
        layout = train.layout(*shapes[name][1:])
        logits, _ = model.apply(
            {"params": state["params"]}, batch, layout, None, method=objectives.screen_logits
        )
        return objectives.taps_in_box(logits, batch, first_x, config.vision.image_size)

    def evaluate(state):
        rates = {}
        for name, batches in measured.items():
            inside, asked = zip(*[taps(state, batch, name) for batch in batches], strict=True)
            inside, asked = np.concatenate(inside), np.concatenate(asked)
            rates[f"eval.tap.{name}"] = float(inside.sum() / asked.sum())
        return rates

    return stages.run_stage(
        "joint",
        directory,
        FLAGS.joint_minutes,
        1e-3,
        {"params": params, "heads": heads},
        stages.make_optimizer(0.05, lambda name: ENCODER_RATE.get(name, 1.0)),
        tasks,
        CURRICULUM,
        evaluate,
        evaluate_every=2.5,
    )["params"]


def run_apart(lane: list[str], core: int) -> subprocess.Popen:
    """Run stages in a separate process, on one core if the system supports it."""
    stage_flag = f"--stages={','.join(lane)}"
    command = [sys.executable, "-m", "experiments.train_nano", *sys.argv[1:], stage_flag]

    def pin() -> None:
        if hasattr(os, "sched_setaffinity"):
            available = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {available[core % len(available)]})

    return subprocess.Popen(command, preexec_fn=pin)


def trained_parts(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> None:
    """Copy the weights of the first stages into the complete model's parameters, in place."""
    templates = {
        "vision": {
            "params": {"vision": params["vision"]},
            "heads": {name: heads[name] for name in ("class", "offset", "centre")},
        },
        "text": {"params": {name: params[name] for name in ("embed", "decoder")}},
        "speech": {"params": {"speech": params["speech"]}, "heads": {"digit": heads["digit"]}},
    }
    for stage, template in templates.items():
        path = directory / f"{stage}.safetensors"
        if not path.exists():
            raise DataError(f"{path}: missing; the {stage} stage has not run")
        state = stages.restore(path, template)
        # The residuals of a decoder that was first trained on text are so large that they mask
        # positions.
        state["params"].pop("decoder", None)
        params.update(state["params"])
        heads.update(state.get("heads", {}))


def save_checkpoint(directory: Path, params: dict[str, Any]) -> None:
    """Write the trained model in bfloat16 with its tokenizer."""
    model = MultimodalGLM(configs.preset("nano"))
    path = directory / "checkpoint"
    extras = {"tokenizer.json": Path(FLAGS.tokenizer)}
    ge.save(model, params_lib.cast(params, jnp.bfloat16), path, overwrite=True, extras=extras)
    logging.info("wrote %s", path)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.INFO)
    directory = Path(FLAGS.out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    config = configs.preset("nano")
    params = initial_params(config, FLAGS.seed)
    heads = objectives.init_heads(
        jax.random.key(FLAGS.seed + 1), config.decoder.hidden_size, generator.NUM_CLASSES
    )
    lanes = [[stage for stage in lane if stage in FLAGS.stages] for lane in LANES]
    if FLAGS.init_from:
        lanes = []
    if "joint" in FLAGS.stages:
        children = [run_apart(lane, core) for core, lane in enumerate(lanes) if lane]
        if any(child.wait() for child in children):
            sys.exit("a stage failed; its message is above")
    else:
        train = {"vision": train_vision, "text": train_text, "speech": train_speech}
        for stage in itertools.chain(*lanes):
            train[stage](directory, params, heads)
        return
    if FLAGS.init_from:
        _, params = ge.load(FLAGS.init_from, dtype="float32")
    else:
        trained_parts(directory, params, heads)
    save_checkpoint(directory, train_joint(directory, params, heads))
    measured = [directory / f"{stage}.csv" for stage in ("vision", "text", "speech", "joint")]
    training_curve([path for path in measured if path.exists()], directory / "curve.png")


if __name__ == "__main__":
    flags.mark_flags_as_required(["out_dir", "text"])
    launch(main)
