"""Table (k): intents by a full text encoder, and by distilled encoders of half its depth.

    python -m experiments.tables.intent --preset=quick --intent_dir=CLINC150
    python -m experiments.tables.intent --preset=full --intent_dir=CLINC150

The claim: 94.2 % for the full encoder and 91.7 % for the distilled one. It names neither data nor
encoder, and such encoders start from weights pretrained on billions of words, which this table does
not have. The table trains a BERT of --layers layers on CLINC150's 150 intents, and on texts without
an intent, from the training texts alone. Encoders with half the layers follow. Each learns from
labels only, or also from the teacher's predictions (alpha 0.9; temperature 1, since higher ones
flatten 151 classes). Some start from every second layer of the teacher, like DistilBERT. In the
second group of rows, --labels texts per class have a label and the rest have none, and the teacher
has learned from the same labels or from all.

Training masks one token in ten; student and teacher read the same masked tokens. Each arm uses the
learning rate and steps of the grid that are best on every fifth training text, with seeds, labels
and teachers of the tuning only. Differences between arms are paired by seed. Accuracy is measured
on texts with an intent of the folder's test part. Without a test part, it is measured on the dev
part.
"""

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from experiments.nano.phone_screens import metrics
from experiments.tables import arms, learning, measure, table
from experiments.tables.arms import Arm, Result, Setting
from experiments.tables.learning import Examples, Teacher, Training, Variables
from experiments.tables.table import Row
from glm_edge import params as boxes
from glm_edge.cli.console import launch
from glm_edge.cli.corpora import read_text
from glm_edge.compress import prune
from glm_edge.configs import TextConfig
from glm_edge.errors import DataError
from glm_edge.models.text import TextEncoder

FLAGS = flags.FLAGS
NAME = "intent"
ALPHA, TEMPERATURE, BATCH = 0.9, 1.0, 32
ALONE, DISTILLED = "labels alone", "distilled"
LAYERS_ALONE, LAYERS = "teacher's layers, labels alone", "teacher's layers, distilled"
SAME, ALL = "distilled, teacher of the same labels", "distilled, teacher of all labels"
# Arms of all labels, and of a few per class.
COMPLETE, FEW = (ALONE, DISTILLED, LAYERS_ALONE, LAYERS), (ALONE, SAME, ALL)
# Pairs of arms whose difference is a row.
GAINS = ((ALONE, DISTILLED), (LAYERS_ALONE, LAYERS), (ALONE, LAYERS_ALONE), (ALONE, SAME))
GAINS += ((ALONE, ALL),)
FULL, HALF = 94.2, 91.7
TEACHER_STEPS = {"quick": 1400, "full": 5000}
STEPS = {"quick": (400,), "full": (1500, 4000)}
RATES = {"quick": (2e-3, 4e-3), "full": (1e-3, 2e-3, 4e-3)}
SHAPES = {"quick": (4, 64), "full": (6, 128)}
SEEDS = {"quick": 5, "full": 5}
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

    @property
    def train(self) -> Examples:
        """Training texts."""
        return _examples(self.train_tokens, self.train_labels)

    @property
    def test(self) -> Examples:
        """Test texts."""
        return _examples(self.test_tokens, self.test_labels)

    def for_tuning(self) -> "Intents":
        """Split the training texts: every fifth takes the role of a test text."""
        tests = np.arange(len(self.train_labels)) % 5 == 4
        tokens, labels = self.train_tokens, self.train_labels
        return Intents(
            f"{self.name}, tuning",
            self.vocabulary,
            self.classes,
            tokens[~tests],
            labels[~tests],
            tokens[tests],
            labels[tests],
            np.ones(int(tests.sum()), bool),
        )


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
    arms.define_flags()
    flags.DEFINE_integer("labels", 10, "Labels per class of the second group of arms.", 1)
    flags.DEFINE_integer("seeds", None, "Number of students of each kind; default: 5.", 2)
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads; JAX uses all available cores.", 1)


def main(argv: Sequence[str]) -> None:
    layers, width = SHAPES[FLAGS.preset]
    layers, width = FLAGS.layers or layers, FLAGS.hidden_size or width
    if layers % 2 or width % 32:
        raise DataError("--layers must be even, and --hidden_size a multiple of 32")
    directory = table.prepare(argv)
    data = load(FLAGS.intent_dir, FLAGS.vocabulary, FLAGS.tokens)
    steps = FLAGS.teacher_steps or TEACHER_STEPS[FLAGS.preset]
    learner = Learner(directory, TextEncoder(config_of(data, layers, width)), steps)
    few = FLAGS.labels * data.classes
    compared = {
        (group, kind): Arm(
            functools.partial(learner.accuracy, data.for_tuning(), kind, group),
            functools.partial(learner.accuracy, data, kind, group),
        )
        for group, kinds in ((None, COMPLETE), (few, FEW))
        for kind in kinds
    }
    seeds = table.seeds(SEEDS)
    results = arms.compare(compared, arms.grid_from_flags(STEPS, RATES), seeds)
    full, taught = learner.taught(data.train, FLAGS.seed)
    hits = hits_of(full, taught, data)
    outside = {"full": float(np.mean(hits[~data.scored]))} if not data.scored.all() else {}
    half, begun = learner.start((full, taught))
    for key, result in results.items() if outside else ():
        runs = [learner.trained(data, key[1], key[0], result.setting, seed) for seed in seeds]
        rates = [np.mean(hits_of(*run, data)[~data.scored]) for run in runs]
        outside[title(*key)] = float(np.mean(rates))
    sides = {"full": (full, taught["params"]), "half": (half, begun["params"])}
    seconds = measure.encoder_times(sides, FLAGS.tokens, ROUNDS[FLAGS.preset], FLAGS.threads)
    counts = {name: boxes.count(params) for name, (_, params) in sides.items()}
    table.publish(
        NAME,
        "Intents by a full and a half-depth text encoder: claimed 94.2 % and 91.7 %",
        [*rows_of(hits, results, data, outside), *cost_rows(counts, seconds)],
        (
            "intent_dir", "layers", "hidden_size", "vocabulary", "tokens", "teacher_steps",
            "steps", "rates", "labels", "seeds", "threads",
        ),
        {
            "full": percent(hits, data.scored),
            "arms": {title(*key): result.to_json() for key, result in results.items()},
            "alpha": ALPHA,
            "temperature": TEMPERATURE,
            "data": data.name,
            "test_texts": len(data.scored),
            "seconds": seconds,
        },
    )  # fmt: skip


class Learner(NamedTuple):
    """Everything that an arm needs besides its setting and seed.

    Attributes:
      directory: directory of the table.
      full: the full encoder.
      teacher_steps: training steps of the full encoder.
    """

    directory: Path
    full: TextEncoder
    teacher_steps: int

    def taught(self, examples: Examples, seed: int) -> Teacher:
        """Train the full encoder on the labels of some texts."""
        training = Training(self.teacher_steps, 2e-3, BATCH)
        variables = learning.trained(
            self.directory,
            "full",
            self.full,
            learning.labelled(examples),
            training,
            seed,
            augment=hide,
        )
        return self.full, variables

    def start(self, teacher: Teacher) -> Teacher:
        """Return an encoder of half the depth with every second layer of the teacher."""
        every_second = prune.depth(tuple(range(1, self.full.config.num_layers, 2)))
        half, begun, _ = every_second(teacher[0], teacher[1]["params"])
        return half, {"params": begun}

    def trained(
        self, data: Intents, kind: str, labels: int | None, setting: Setting, seed: int
    ) -> Teacher:
        """Train an encoder of half the depth.

        Args:
          data: the texts, or those for tuning.
          kind: kind of training, such as `ALONE`.
          labels: number of labels, or None for all.
          setting: steps and learning rate.
          seed: seed of labels, initial variables, order and hidden words.

        Returns:
          The encoder and its variables.
        """
        examples = data.train
        if labels is not None:
            examples = learning.few_labels(examples, labels, seed)
        training = Training(*setting, BATCH)
        # All students of the measurement have one teacher of all labels.
        teacher = self.taught(data.train, FLAGS.seed)
        half, begun = self.start(teacher)
        if kind in (ALONE, LAYERS_ALONE):
            examples = learning.labelled(examples)
        else:
            training = training._replace(alpha=ALPHA, temperature=TEMPERATURE)
        if kind == SAME:
            teacher = self.taught(examples, seed)
        variables = learning.trained(
            self.directory,
            "half",
            half,
            examples,
            training,
            seed,
            start=begun if kind in (LAYERS_ALONE, LAYERS) else None,
            teacher=teacher if training.alpha else None,
            augment=hide,
        )
        return half, variables

    def accuracy(
        self, data: Intents, kind: str, labels: int | None, setting: Setting, seed: int
    ) -> float:
        """Train as `trained`, and return the accuracy on texts with an intent in percent."""
        student = self.trained(data, kind, labels, setting, seed)
        return percent(hits_of(*student, data), data.scored)


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


def _examples(tokens: np.ndarray, labels: np.ndarray) -> Examples:
    return {"tokens": tokens, "valid": tokens != PAD, "labels": labels}


def hide(key: Array, batch: dict[str, Array]) -> dict[str, Array]:
    """Mask one token in ten of a batch, except for special tokens."""
    tokens = batch["tokens"]
    hidden = jax.random.bernoulli(key, HIDDEN_WORDS, tokens.shape)
    return {
        **batch,
        "tokens": jnp.where(hidden & (tokens >= len(SPECIALS)), UNKNOWN, tokens),
    }


def hits_of(model: TextEncoder, variables: Variables, data: Intents) -> np.ndarray:
    """Return True for correctly classified test texts, bool [E]."""
    return learning.logits_of(model, variables, data.test).argmax(-1) == data.test_labels


def percent(hits: np.ndarray, chosen: np.ndarray) -> float:
    """Compute the hits among the chosen texts in percent."""
    return 100.0 * float(np.mean(hits[chosen]))


def title(labels: int | None, kind: str) -> str:
    """Return the name of an arm."""
    group = "all labels" if labels is None else f"{labels} labels, the rest unlabelled"
    return f"half, {group}: {kind}"


def rows_of(
    full: np.ndarray,
    results: Mapping[tuple[int | None, str], Result],
    data: Intents,
    outside: Mapping[str, float],
) -> list[Row]:
    """Return the rows of accuracies and their differences.

    Args:
      full: hits of the full encoder on the test texts.
      results: results by number of labels and kind.
      data: data of the measurement.
      outside: fraction of texts without an intent that are recognised, by encoder.
    """
    rate = metrics.bootstrap(full[data.scored].astype(float))
    note = f"{data.name}, {table.interval(rate)}; claim on different data"
    rows = [Row("top-1, full", "%", FULL, 100.0 * rate.value, note=note)]
    for (labels, kind), result in results.items():
        claim = HALF if labels is None and kind in (DISTILLED, LAYERS) else None
        rows.append(arms.accuracy_row(title(labels, kind), result, claim))
    for labels in dict.fromkeys(labels for labels, _ in results):
        for base, kind in GAINS:
            if (labels, base) in results and (labels, kind) in results:
                pair = (results[labels, base].accuracies, results[labels, kind].accuracies)
                rows.append(arms.gain_row(f"gain over {base}, {title(labels, kind)}", *pair))
    for kind in (DISTILLED, LAYERS):
        accuracies = results[None, kind].accuracies
        lost = 100.0 * rate.value - statistics.fmean(accuracies)
        spread = statistics.stdev(accuracies)
        rows.append(Row(f"lost by half the depth, {kind}", "points", FULL - HALF, lost, spread))
    texts = f"{int(np.sum(~data.scored))} texts without an intent"
    rows += [
        Row(f"recognised as without intent, {kind}", "%", None, 100.0 * share, note=texts)
        for kind, share in outside.items()
    ]
    return rows


def cost_rows(counts: Mapping[str, int], seconds: Mapping[str, list[float]]) -> list[Row]:
    """Return the rows of sizes and times.

    Args:
      counts: number of parameters by encoder.
      seconds: seconds by engine and encoder.
    """
    rows = [Row(f"parameters, {kind}", "M", None, n / 1e6) for kind, n in counts.items()]
    for engine, name in measure.ENGINES.items():
        base = seconds[f"{engine} full"]
        for kind in counts:
            millis = measure.median_ms(seconds[f"{engine} {kind}"])
            rows.append(Row(f"latency, {kind}, {name}", "ms", None, millis))
        low, middle, high = measure.ratio_quartiles(seconds[f"{engine} half"], base)
        note = f"quartiles {low:.2f} - {high:.2f}"
        rows.append(Row(f"half over full, {name}", "x", None, middle, note=note))
    rows.append(Row("top-1, full, the claim's data", "%", FULL, None, note=ELSEWHERE))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
