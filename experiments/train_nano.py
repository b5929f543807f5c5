"""Trains nano, the shipped multimodal checkpoint, on screens, dialogues, speech and text.

    python -m experiments.train_nano --out_dir=runs/nano --text=train.txt \\
        --digits_dir=mnist --speech_dir=fsdd

Writes `<stage>.csv` (curves), `curve.png`, `training.json` (command, commit, machine, people), and
`checkpoint/`, which `ge.load` opens.

There are four stages. On one core, the vision tower learns the element in each cell of a screen. On
the other core, the embedding learns from text, and then the speech encoder learns digits. Finally,
the complete model with a new decoder learns to answer questions about screens, together with text.
Every stage has a budget of steps, which its rates and data depend on, and saves its state each
minute. The same command with the same --out_dir resumes it.

The exam's wordings, screens and voices, and the people of --holdout_speakers, are in no batch and
in no measurement of the training. `experiments.evaluate` measures them afterwards.
"""

import dataclasses
import functools
import itertools
import json
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
from experiments.common.provenance import provenance_of
from experiments.nano import digit_training, objectives, stages
from experiments.nano.batches import ScreenBatches, text_batch
from experiments.nano.phone_screens import digits, generator, speech
from experiments.nano.text.tokenizer import load as read_tokenizer
from glm_edge import configs
from glm_edge import params as params_lib
from glm_edge.cli.console import launch, refuse_arguments
from glm_edge.cli.corpora import encode_text, pydoc_topics, read_text
from glm_edge.errors import DataError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.writers import write_json

STAGES = ("vision", "text", "speech", "joint")

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
    "holdout_speakers", [], "People of --speech_dir that the training does not use at all."
)
flags.DEFINE_list("voices", ["espeak", "flite"], "Kinds of synthetic voices to learn from.")
flags.DEFINE_string(
    "tokenizer",
    str(Path(ge.__file__).parent / "assets/nano/tokenizer.json"),
    "Path of the model's tokenizer.json.",
)
flags.DEFINE_string("init_from", None, "Checkpoint with the initial weights of the joint stage.")
flags.DEFINE_integer("vision_steps", 5000, "Steps of the vision stage, on one core.", 1)
flags.DEFINE_integer("text_steps", 500, "Steps of the text stage, on the other core.", 1)
flags.DEFINE_integer(
    "speech_steps", digit_training.DigitTraining().steps, "Steps of the speech stage.", 1
)
flags.DEFINE_integer("joint_steps", 8000, "Steps of the joint stage, on all cores.", 1)
flags.DEFINE_integer("seed", 0, "Seed of weights and all random values.")
flags.DEFINE_integer("core", None, "Index of the only core to use; default: all cores.", 0)
flags.DEFINE_list("stages", list(STAGES), "Stages to run or resume.")

CONTEXT = 2048
TEXT_LENGTH, TEXT_ROWS = 256, 16
# Screens per batch, and written, spoken and dialogue questions per screen.
QUESTIONS = {
    "written": (6, 8, 0, 0),
    "mixed": (6, 4, 4, 0),
    "spoken": (6, 0, 8, 0),
    "dialogue": (6, 2, 0, 3),
}
ALL_TASKS = ("written", "spoken", "dialogue", "text", "dialogue", "spoken", "dialogue", "text")
CURRICULUM = (
    (0.1, ("written", "mixed", "written")),
    (0.25, ("written", "mixed", "dialogue", "text", "dialogue")),
    # A step of a long window takes as much time as five others, so it is every sixteenth.
    (1.0, (*ALL_TASKS, *ALL_TASKS[:-2], "long", ALL_TASKS[-1])),
)
# Probability of random words in an instruction to tap.
NOISE = 0.25
ASSETS = Path(ge.__file__).parent / "assets/nano"
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


def nano_config() -> configs.GLMConfig:
    """Return the configuration of the model."""
    config = configs.preset("nano")
    decoder = dataclasses.replace(config.decoder, max_position_embeddings=CONTEXT)
    return dataclasses.replace(config, decoder=decoder)


def screen_batches(split: str) -> ScreenBatches:
    """Return the screens of "train" or "calibration", which share no image and no voice."""
    sources = [digits.sklearn_digits(split)]
    if FLAGS.digits_dir:
        sources.append(digits.mnist_folder(FLAGS.digits_dir, split))
    drawers = [generator.ScreenGenerator(images) for images in sources]
    if split == "train":
        spoken = [clip for group in utterances().values() for clip in group]
        return ScreenBatches(nano_config(), load_tokenizer(), drawers, spoken, NOISE)
    # No person: who is measured while training is not unheard.
    spoken = []
    if "espeak" in FLAGS.voices:
        spoken = speech.synthesize_digits(FLAGS.seed, speech.VOICES[split])
    return ScreenBatches(nano_config(), load_tokenizer(), drawers, spoken)


def people() -> list[speech.Utterance]:
    """Return the recordings of the people to learn from."""
    if not FLAGS.speech_dir:
        return []
    recorded = speech.fsdd_folder(FLAGS.speech_dir)
    if not FLAGS.holdout_speakers:
        return recorded
    return speech.split_speakers(recorded, FLAGS.holdout_speakers)[0]


@functools.cache
def utterances() -> dict[str, list[speech.Utterance]]:
    """Return the recordings to learn from by kind: people, and synthetic voices."""
    groups = {"people": people()}
    if "espeak" in FLAGS.voices:
        groups["espeak"] = speech.synthesize_digits(FLAGS.seed, speech.VOICES["train"])
    if "flite" in FLAGS.voices:
        groups["flite"] = speech.synthesize_with_flite(FLAGS.seed)
    return {kind: group for kind, group in groups.items() if group}


def tokens_of(path: str) -> np.ndarray:
    """Return token ids of a text file."""
    return encode_text(load_tokenizer(), read_text(path))


def text_to_learn() -> np.ndarray:
    """Return the token ids of all training text."""
    tokens = [tokens_of(FLAGS.text)]
    if FLAGS.pydoc:
        tokens.append(encode_text(load_tokenizer(), pydoc_topics("calibration")))
    learned = np.concatenate(tokens)
    if len(learned) <= CONTEXT:
        raise DataError(
            f"{FLAGS.text}: has {len(learned)} tokens, fewer than a window of {CONTEXT}"
        )
    return learned


def windows_of(tokens: np.ndarray, rows: int, length: int) -> stages.Draw:
    """Return the function that draws batches of text."""
    return lambda rng: text_batch(rng, tokens, rows, length)


def train_vision(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> None:
    """Train the vision tower to predict the element in each cell."""
    model = MultimodalGLM(nano_config(), compute="bfloat16")

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

    train, monitored = screen_batches("train"), screen_batches("calibration")
    rng = generator.random_stream("calibration", FLAGS.seed)
    held_out = [monitored.draw_cells(rng, 16) for _ in range(8)]
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
        stages.Schedule(FLAGS.vision_steps, 2e-3, seed=FLAGS.seed),
        state,
        stages.make_optimizer(0.02, lambda name: 1.0),
        {"cells": (lambda rng: train.draw_cells(rng, 16), loss)},
        evaluate,
    )


def train_text(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> None:
    """Train embedding and decoder on text."""
    del heads
    model = MultimodalGLM(nano_config(), compute="bfloat16")

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
        stages.Schedule(FLAGS.text_steps, 3e-3, seed=FLAGS.seed, evaluate_every=100),
        {"params": {name: params[name] for name in ("embed", "decoder")}},
        stages.make_optimizer(0.1, lambda name: 1.0),
        {"text": (windows_of(text_to_learn(), TEXT_ROWS, TEXT_LENGTH), loss)},
        evaluate,
    )


def train_speech(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> None:
    """Train the speech encoder to recognise the spoken digit."""
    encoder = digit_training.Encoder("nano", nano_config())
    options = digit_training.DigitTraining(steps=FLAGS.speech_steps)
    state = {"params": {"speech": params["speech"]}, "heads": {"digit": heads["digit"]}}
    digit_training.train("speech", directory, encoder, state, utterances(), options, FLAGS.seed)


def train_joint(directory: Path, params: dict[str, Any], heads: dict[str, Any]) -> dict[str, Any]:
    """Train the complete model on questions about screens, mixed with text."""
    config = nano_config()
    model = MultimodalGLM(config, compute="bfloat16")
    train, monitored = screen_batches("train"), screen_batches("calibration")
    first_x = load_tokenizer().token_to_id("[5,")
    dropout = digit_training.DigitTraining().dropout

    def screen_task(shape: tuple[int, ...]) -> tuple[stages.Draw, stages.Loss]:
        layout = train.layout(*shape[1:])

        def loss(state, batch, rng):
            variables, heads = {"params": state["params"]}, state["heads"]
            return objectives.screen_loss(
                model, variables, heads, batch, layout, first_x, rng, dropout
            )

        return lambda rng: train.draw(rng, *shape), loss

    def text_loss(state, tokens, rng):
        value = model.apply(
            {"params": state["params"]}, tokens, rng, 0.1, method=objectives.text_loss
        )
        return value, {"loss": value}

    shapes = {
        name: shape for name, shape in QUESTIONS.items() if not shape[2] or any(train.by_digit)
    }
    tasks = {name: screen_task(shape) for name, shape in shapes.items()}
    tokens = text_to_learn()
    tasks["text"] = (windows_of(tokens, TEXT_ROWS, TEXT_LENGTH), text_loss)
    tasks["long"] = (windows_of(tokens, 1, CONTEXT), text_loss)
    curriculum = tuple(
        (until, tuple(name for name in names if name in tasks)) for until, names in CURRICULUM
    )
    rng = generator.random_stream("calibration", FLAGS.seed + 1)
    # Written questions, which are easier, would hide how well dialogues are answered.
    measured_shapes = {**shapes, "dialogue": (6, 0, 0, 4)}
    measured = {
        name: [monitored.draw(rng, *shape) for _ in range(8)]
        for name, shape in measured_shapes.items()
        if not shape[2] or (name == "spoken" and any(monitored.by_digit))
    }

    @functools.partial(jax.jit, static_argnums=2)
    def taps(state, batch, name):
        layout = train.layout(*measured_shapes[name][1:])
        logits, _ = model.apply(
            {"params": state["params"]}, batch, layout, method=objectives.screen_logits
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
        stages.Schedule(FLAGS.joint_steps, 1e-3, curriculum, FLAGS.seed),
        {"params": params, "heads": heads},
        stages.make_optimizer(0.05, lambda name: ENCODER_RATE.get(name, 1.0)),
        tasks,
        evaluate,
    )["params"]


def run_apart(lane: list[str], core: int) -> subprocess.Popen:
    """Run stages in a separate process, on one core if the system supports it."""
    further = [f"--stages={','.join(lane)}", f"--core={core}"]
    command = [sys.executable, "-m", "experiments.train_nano", *sys.argv[1:], *further]
    return subprocess.Popen(command)


def use_core(core: int) -> None:
    """Run this process on one core; JAX then starts one thread."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {available[core % len(available)]})


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
    model = MultimodalGLM(nano_config())
    path = directory / "checkpoint"
    extras = {
        "tokenizer.json": Path(FLAGS.tokenizer),
        "chat_template.jinja": ASSETS / "chat_template.jinja",
    }
    ge.save(model, params_lib.cast(params, jnp.bfloat16), path, overwrite=True, extras=extras)
    logging.info("wrote %s", path)


def write_record(directory: Path) -> None:
    """Write what the checkpoint was made of."""
    names = ["seed", "vision_steps", "text_steps", "speech_steps", "joint_steps", "voices"]
    names += ["pydoc", "holdout_speakers"]
    paths = ("out_dir", "text", "held_out_text", "digits_dir", "speech_dir")
    placeholders = [f"--{name}={name.upper()}" for name in paths if FLAGS[name].value]
    record = provenance_of("train_nano", names, placeholders) | {
        "heard": sorted({u.speaker for group in utterances().values() for u in group}),
        "minutes": {
            stage: json.loads((directory / f"{stage}.json").read_text())["minutes"]
            for stage in STAGES
            if (directory / f"{stage}.json").exists()
        },
    }
    write_json(directory / "training.json", record)


def main(argv: list[str]) -> None:
    refuse_arguments(argv)
    logging.set_verbosity(logging.INFO)
    directory = Path(FLAGS.out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    if FLAGS.core is not None:
        use_core(FLAGS.core)
    config = nano_config()
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
    write_record(directory)
    measured = [directory / f"{stage}.csv" for stage in STAGES]
    training_curve([path for path in measured if path.exists()], directory / "curve.png")


if __name__ == "__main__":
    flags.mark_flags_as_required(["out_dir", "text"])
    launch(main)
