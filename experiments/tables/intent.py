"""Table (k): intents by a full text encoder, and by distilled encoders of half its depth.

    python -m experiments.tables.intent --preset=quick --intent_dir=CLINC150
    python -m experiments.tables.intent --preset=full --intent_dir=CLINC150

The claim: 94.2 % for the full encoder and 91.7 % for the distilled one. It names neither data nor
encoder, and such encoders start from weights pretrained on billions of words, which this table does
not have. The table trains a BERT of --layers layers on CLINC150's 150 intents, and on texts without
an intent, from the training texts alone. Three encoders with half the layers follow. One learns
from labels only, one also from the teacher's predictions (alpha 0.9, temperature 4), and one does
the same but starts from every second layer of the teacher, like DistilBERT. All three use the same
texts in the same order for the same number of steps; training masks one token in ten. Accuracy is
measured on texts with an intent of the folder's test part. Without a test part, it is measured on
the dev part, on which the presets were chosen.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from experiments.nano.phone_screens import metrics
from experiments.tables import learning, measure, table
from experiments.tables.learning import Classifier, Training, Variables
from experiments.tables.table import Row
from glm_edge import params as boxes
from glm_edge.cli.console import bar, launch
from glm_edge.cli.corpora import read_text
from glm_edge.compress import prune
from glm_edge.configs import TextConfig
from glm_edge.errors import DataError
from glm_edge.models.text import TextEncoder

FLAGS = flags.FLAGS
NAME = "intent"
HALVES = ("half", "half, distilled", "half, from the teacher's layers")
CLAIMS = {"full": 94.2} | dict.fromkeys(HALVES[1:], 91.7)
STEPS = {"quick": (1400, 800), "full": (5000, 4000)}
SHAPES = {"quick": (4, 64), "full": (6, 128)}
LEARNING = Training(0, learning_rate=2e-3, batch=32)
SEEDS = {"quick": 1, "full": 3}
ROUNDS = {"quick": 15, "full": 50}
NONE = "oos"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PAD, UNKNOWN = 0, 1
HIDDEN_WORDS = 0.1
ELSEWHERE = "not available: data (the claim names none) and pretrained weights"


class Intents(NamedTuple):
    """Texts as tokens [E, T] and classes [E]; `scored` is True for test texts with an intent."""

    name: str
    vocabulary: int
    classes: int
    train_tokens: np.ndarray
    train_labels: np.ndarray
    test_tokens: np.ndarray
    test_labels: np.ndarray
    scored: np.ndarray


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_string(
        "intent_dir",
        None,
        "Folder of CLINC150: data_full.json, or clinc150_train.tsv and clinc150_test.tsv or _dev.",
        required=True,
    )
    flags.DEFINE_integer(
        "layers", None, "Layers of the full encoder, an even number; default: 4, or 6 for full.", 2
    )
    flags.DEFINE_integer(
        "hidden_size",
        None,
        "Hidden size of all encoders, a multiple of 32; default: 64, or 128 for full.",
        32,
    )
    flags.DEFINE_integer("vocabulary", 4000, "Maximum vocabulary size.", 64)
    flags.DEFINE_integer("tokens", 20, "Tokens per text; longer texts are cut.", 4)
    flags.DEFINE_integer(
        "teacher_steps", None, "Training steps of the full encoder; default: the preset's.", 1
    )
    flags.DEFINE_integer(
        "student_steps", None, "Training steps of each student; default: the preset's.", 1
    )
    flags.DEFINE_integer(
        "seeds", None, "Number of students of each kind; default: 1, or 3 for full.", 1
    )
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads; JAX uses all available cores.", 1)


def main(argv: Sequence[str]) -> None:
    layers, width = SHAPES[FLAGS.preset]
    layers, width = FLAGS.layers or layers, FLAGS.hidden_size or width
    if layers % 2 or width % 32:
        raise DataError("--layers must be even, and --hidden_size a multiple of 32")
    directory = table.prepare(argv)
    teacher_steps, student_steps = STEPS[FLAGS.preset]
    data = load(FLAGS.intent_dir, FLAGS.vocabulary, FLAGS.tokens)
    full = TextEncoder(config_of(data, layers, width))
    alone = LEARNING._replace(steps=FLAGS.teacher_steps or teacher_steps)
    taught = trained(directory, "full", full, data, alone, FLAGS.seed)
    targets = learning.logits_of(Classifier(full, _apply), taught, data.train_tokens)
    every_second = prune.depth(tuple(range(1, layers, 2)))
    half, begun, _ = every_second(full, taught["params"])
    labels = LEARNING._replace(steps=FLAGS.student_steps or student_steps)
    teacher = labels._replace(alpha=0.9)
    trainings = (
        (labels, None, None),
        (teacher, None, targets),
        (teacher, {"params": begun}, targets),
    )
    hits: dict[str, list[np.ndarray]] = {"full": [hits_of(full, taught, data)]}
    for seed in bar("students")(table.seeds(SEEDS)):
        for kind, (training, start, learned) in zip(HALVES, trainings, strict=True):
            variables = trained(
                directory, f"{kind}_{seed}", half, data, training, seed, start, learned
            )
            hits.setdefault(kind, []).append(hits_of(half, variables, data))
    sides = {"full": (full, taught["params"]), "half": (half, variables["params"])}
    seconds = measure.encoder_times(sides, FLAGS.tokens, ROUNDS[FLAGS.preset], FLAGS.threads)
    counts = {name: boxes.count(params) for name, (_, params) in sides.items()}
    table.publish(
        NAME,
        "Intents by a full and a half-depth text encoder: claimed 94.2 % and 91.7 %",
        rows_of(hits, data, counts, seconds),
        (
            "intent_dir", "layers", "hidden_size", "vocabulary", "tokens", "teacher_steps",
            "student_steps", "seeds", "threads",
        ),
        {
            "accuracy": {
                kind: [percent(run, data.scored) for run in runs] for kind, runs in hits.items()
            },
            "data": data.name,
            "test_texts": len(data.scored),
            "seconds": seconds,
        },
    )  # fmt: skip


def config_of(data: Intents, layers: int, width: int) -> TextConfig:
    """Return the configuration of a BERT without segments for these texts."""
    return TextConfig(
        vocab_size=data.vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 32,
        intermediate_size=4 * width,
        max_position_embeddings=data.train_tokens.shape[1],
        type_vocab_size=0,
        num_labels=data.classes,
        pooler="tanh",
    )


def load(folder: str, vocabulary: int, length: int) -> Intents:
    """Read CLINC150, and train a tokenizer on its training texts.

    Args:
      folder: folder with `data_full.json`, or with `clinc150_train.tsv` and a test or dev part,
        whose lines after the first are a text, a tab and an intent.
      vocabulary: maximum vocabulary size.
      length: tokens per text.

    Returns:
      The data.

    Raises:
      DataError: a file is missing or has a different format, or the test part has unknown intents.
    """
    part, train, test = _parts(Path(folder))
    names = sorted({intent for _, intent in train})
    unknown = {intent for _, intent in test} - set(names)
    if unknown:
        raise DataError(
            f"{folder}: the {part} part has the intent {min(unknown)!r}, which training lacks"
        )
    tokenizer = tokenizer_of([text for text, _ in train], vocabulary, length)

    def arrays(rows: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        encoded = tokenizer.encode_batch([text for text, _ in rows])
        labels = [names.index(intent) for _, intent in rows]
        return np.array([row.ids for row in encoded], np.int32), np.array(labels, np.int32)

    scored = np.array([intent != NONE for _, intent in test])
    return Intents(
        f"CLINC150, {part} part",
        tokenizer.get_vocab_size(),
        len(names),
        *arrays(train),
        *arrays(test),
        scored,
    )


def _parts(folder: Path) -> tuple[str, list[tuple[str, str]], list[tuple[str, str]]]:
    data_path = folder / "data_full.json"
    if data_path.exists():
        try:
            scores = json.loads(read_text(data_path))
            rows = {
                part: [
                    (text, intent)
                    for name in (part, f"oos_{part}")
                    for text, intent in scores[name]
                ]
                for part in ("train", "test")
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{data_path}: not CLINC150's data_full.json ({error!r:.80})"
            ) from error
        return "test", rows["train"], rows["test"]
    part = "test" if (folder / "clinc150_test.tsv").exists() else "dev"
    return part, *(_lines(folder / f"clinc150_{name}.tsv") for name in ("train", part))


def _lines(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        raise DataError(f"{path}: missing; --intent_dir must contain it, or data_full.json")
    lines = read_text(path).replace("\r\n", "\n").rstrip("\n").split("\n")[1:]
    rows = [tuple(line.split("\t")) for line in lines]
    bad = next((index for index, row in enumerate(rows, start=2) if len(row) != 2), None)
    if bad or not rows:
        raise DataError(f"{path}: line {bad or 2} is not a text, a tab and an intent")
    return rows


def tokenizer_of(texts: Sequence[str], vocabulary: int, length: int) -> Tokenizer:
    """Train a byte-pair tokenizer of lower-case texts with BERT's framing and `length` tokens.

    The same texts produce the same tokenizer, which WordPiece's trainer does not guarantee.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS[UNKNOWN]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIALS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin, end = ((name, tokenizer.token_to_id(name)) for name in SPECIALS[2:])
    tokenizer.post_processor = processors.BertProcessing(end, begin)
    tokenizer.enable_padding(length=length, pad_id=PAD, pad_token=SPECIALS[PAD])
    tokenizer.enable_truncation(length)
    return tokenizer


def _apply(
    model: TextEncoder, variables: Variables, tokens: Array, key: Array | None
) -> tuple[Array, Variables]:
    if key is not None:
        hidden = jax.random.bernoulli(key, HIDDEN_WORDS, tokens.shape)
        tokens = jnp.where(hidden & (tokens >= len(SPECIALS)), UNKNOWN, tokens)
    return model.apply(variables, tokens, tokens != PAD)[0], {}


def trained(
    directory: Path,
    name: str,
    model: TextEncoder,
    data: Intents,
    training: Training,
    seed: int,
    start: Variables | None = None,
    targets: np.ndarray | None = None,
) -> Variables:
    """Train an encoder, or load that of an earlier run; see `vision.trained`."""

    def make() -> Variables:
        begin = start
        if begin is None:
            begin = jax.jit(model.init)(jax.random.key(seed), data.train_tokens[:1])
        examples = data.train_tokens, data.train_labels
        return learning.train(Classifier(model, _apply), begin, *examples, training, seed, targets)

    examples = [data.name, learning.fingerprint((data.train_tokens, data.train_labels))]
    settings = learning.settings(model, examples, training, seed, start, targets)
    return learning.cached_training(directory, re.sub(r"\W+", "_", name), settings, make)


def hits_of(model: TextEncoder, variables: Variables, data: Intents) -> np.ndarray:
    """Return True for correctly classified test texts, bool [E]."""
    logits = learning.logits_of(Classifier(model, _apply), variables, data.test_tokens)
    return logits.argmax(-1) == data.test_labels


def percent(hits: np.ndarray, chosen: np.ndarray) -> float:
    """Compute the hits among the chosen texts in percent."""
    return 100.0 * float(np.mean(hits[chosen]))


def rows_of(
    hits: dict[str, list[np.ndarray]],
    data: Intents,
    counts: dict[str, int],
    seconds: dict[str, list[float]],
) -> list[Row]:
    """Return the table's rows.

    Args:
      hits: hits of every seed on the test texts, by kind of encoder.
      data: data of the measurement.
      counts: number of parameters by encoder.
      seconds: seconds by engine and encoder.
    """
    # All seeds classify the same texts, so their mean is one value per text.
    mean = {kind: np.mean(runs, axis=0) for kind, runs in hits.items()}
    rows = []
    for kind, runs in hits.items():
        scores = [percent(run, data.scored) for run in runs]
        rate = metrics.bootstrap(mean[kind][data.scored])
        note = f"{data.name}, {len(runs)} seed(s), {table.interval(rate)}; claim on different data"
        spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
        rows.append(
            Row(f"top-1, {kind}", "%", CLAIMS.get(kind), float(np.mean(scores)), spread, note)
        )
    for title, first, second, claim in (
        (
            "lost by half the depth, distilled",
            HALVES[1],
            "full",
            CLAIMS["full"] - CLAIMS[HALVES[1]],
        ),
        (
            "lost by half the depth, from the teacher's layers",
            HALVES[2],
            "full",
            CLAIMS["full"] - CLAIMS[HALVES[2]],
        ),
        ("gain of distillation", HALVES[0], HALVES[1], None),
        ("gain of the teacher's layers", HALVES[1], HALVES[2], None),
    ):
        pair = (mean[kind][data.scored] for kind in (first, second))
        rate = metrics.paired_difference(*pair)
        note = f"paired by text, {table.interval(rate)}"
        rows.append(Row(title, "points", claim, 100.0 * rate.value, note=note))
    if not data.scored.all():
        for kind in hits:
            scores = 100.0 * float(np.mean(mean[kind][~data.scored]))
            note = f"{int(np.sum(~data.scored))} texts without an intent"
            rows.append(Row(f"recognised as without intent, {kind}", "%", None, scores, note=note))
    rows += [Row(f"parameters, {kind}", "M", None, n / 1e6) for kind, n in counts.items()]
    for engine, title in measure.ENGINES.items():
        base = seconds[f"{engine} full"]
        for kind in counts:
            millis = measure.median_ms(seconds[f"{engine} {kind}"])
            rows.append(Row(f"latency, {kind}, {title}", "ms", None, millis))
        low, middle, high = measure.ratio_quartiles(seconds[f"{engine} half"], base)
        note = f"quartiles {low:.2f} - {high:.2f}"
        rows.append(Row(f"half over full, {title}", "x", None, middle, note=note))
    rows.append(Row("top-1, full, the claim's data", "%", CLAIMS["full"], None, note=ELSEWHERE))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
