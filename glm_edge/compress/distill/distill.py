"""Distillation: a student learns to predict what its teacher predicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
import optax

from glm_edge import params as boxes
from glm_edge.compress.distill.loop import DistillOptions, TrainOptions, as_teacher, train
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import ARRAYS, Context, Result, Transform, check_pattern, register
from glm_edge.errors import RecipeError
from glm_edge.params.patterns import compiled
from glm_edge.params.tree import Params


@register("distill")
class Distill(Transform):
    """Trains a (pruned) student on its teacher's predictions and on the labels.

    The loss is `alpha * T^2 * KL(teacher at T || student at T) + (1 - alpha) * cross-entropy`,
    averaged over the predictions that `loss_mask` weighs. Masks and quantized weights stay as they
    are; what trains is what `glm_edge.params.partition` gives, in float32.

    Any module learns whose logits are [B, T, V], predictions of the next token at every position;
    the labels are the tokens themselves. A classifier, with logits [B, N], learns from a
    `glm_edge.Calibration`: its `apply` gives the logits, of which every one counts alike, and its
    `loss` the labels' part, which `alpha=1` does without. A teacher is run by the same functions.

    Under `glm_edge.params.sharding.on(mesh)`, with parameters on that mesh, training runs on all
    its devices: parameters, gradients and the optimizer's moments are cut alike.

        recipe = ge.chain(ge.prune.depth(layers=1), ge.distill(train=ge.TrainOptions(steps=200)))
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      teacher: `(model, params)`; None is the model that the chain was given.
      train: steps, learning rate and the like, see `glm_edge.TrainOptions`.
      temperature: `T`, softens both predictions.
      alpha: weight of the teacher, in 0..1; the rest is the labels'.
      where: regular expression searched in each path; what it matches trains, such as
        `^(decoder|embed|head)/` to leave the encoders as they are. None trains everything.
        Encoders that student and teacher share and that do not train are run once for both.
      hidden: weight of the squared distance between the outputs of layers, relative to the
        teacher's squared norm. Where widths differ, a linear projection trains along and is
        dropped.
      attention: weight of the divergence between attention, in nats; where numbers of heads
        differ, their means are compared.
      layers: the teacher's layer for each of the student's, from 0; None spaces them evenly.
      vocabulary: the teacher's token for each of the student's, as vocabulary pruning leaves them;
        the teacher reads these tokens and is asked about no others. None is one vocabulary.
      mixture: share of batches of each kind, such as `{"text": 2, "images": 1, "audio": 1}`; None
        takes them as they come.
      beta: 0 is the divergence above; 1 is the reverse, `KL(student || teacher)`; between them it
        is the generalized Jensen-Shannon divergence (see the second reference).
      on_policy: share of the batches that the student goes on with itself: it samples what follows
        each prompt, and the teacher's predictions there are the only lesson (`alpha` is 1).
      prompt: tokens of each row that the student goes on from; None is all before the first that
        `loss_mask` teaches. Placeholders of images and audio stay in any case.
      sampling_temperature: of what the student writes; 0 takes the likeliest token.

    Raises:
      RecipeError: an option has no meaning; on call, there is no teacher, it predicts another
        vocabulary, student or teacher is a classifier without `Calibration`, everything is frozen,
        or a layer or a token is named that a model lacks.
      TrainingError: the loss or its gradient is not finite; the error holds the step, and the
        parameters before it.
      DataError: calibration is missing or not a batch, or lacks a kind of `mixture`.
      OutputError: `state_dir` cannot be written, or holds the state of other arguments.

    References:
      Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531.
      On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649.
    """

    needs_model: ClassVar[bool] = True

    teacher: tuple[nn.Module, Params] | None = field(default=None, kw_only=False, metadata=ARRAYS)
    train: TrainOptions = TrainOptions()
    temperature: float = 2.0
    alpha: float = 0.9
    where: str | None = None
    hidden: float = 0.0
    attention: float = 0.0
    layers: Sequence[int] | None = None
    vocabulary: Sequence[int] | None = None
    mixture: Mapping[str, float] | Sequence[tuple[str, float]] | None = None
    beta: float = 0.0
    on_policy: float = 0.0
    prompt: int | None = None
    sampling_temperature: float = 1.0

    def __post_init__(self) -> None:
        self._set(
            teacher=as_teacher(self.name, self.teacher),
            train=TrainOptions.of(self.name, self.train),
            layers=_whole_numbers("layers", self.layers),
            vocabulary=_whole_numbers("vocabulary", self.vocabulary),
            mixture=_shares(self.mixture),
        )
        super().__post_init__()
        check_pattern(self.name, "where", self.where)
        self._options.check(self.name)

    @property
    def _options(self) -> DistillOptions:
        return DistillOptions(**{name: getattr(self, name) for name in DistillOptions._fields})

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        if self.teacher is None and context.original[1] is params:
            raise RecipeError(
                "distill: the model would be its own teacher; pass teacher=(model, params), or put "
                "distill after a transform in a chain"
            )
        teacher = self.teacher or context.original
        trainable, frozen = split(params, self.where)
        trained, curve, notes = train(
            self.name,
            model,
            trainable,
            frozen,
            teacher,
            self.train,
            context,
            options=self._options,
        )
        healed = boxes.combine(trained, frozen)
        row = row_of(self.name, f"trained {self.train.steps} steps", trainable, trained)
        notes += _widened(trainable)
        return model, healed, Report.of([row], params, healed, curve=curve, notes=notes)


distill = Distill


def _widened(trainable: Params) -> tuple[str, ...]:
    """Says that narrower types did not stay."""
    narrow = [leaf for leaf in jax.tree.leaves(trainable) if leaf.dtype.itemsize < 4]
    if not narrow:
        return ()
    types = ", ".join(sorted({str(leaf.dtype) for leaf in narrow}))
    return (
        f"distill: {len(narrow)} arrays of {types} were trained and are float32 now; "
        f"glm_edge.params.cast(params, '{narrow[0].dtype}') stores what trains in it again",
    )


def _whole_numbers(option: str, values: Any) -> tuple[int, ...] | None:
    if values is None:
        return None
    array = np.asarray(values)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < 0:
        raise RecipeError(f"distill: {option} must be whole numbers, none negative")
    return tuple(array.tolist())


def _shares(mixture: Any) -> tuple[tuple[str, float], ...] | None:
    if mixture is None:
        return None
    try:
        pairs = [(str(kind), float(share)) for kind, share in dict(mixture).items()]
    except (TypeError, ValueError) as error:
        raise RecipeError(f"distill: mixture must hold shares by kind, not {mixture!r}") from error
    if not pairs:
        raise RecipeError("distill: mixture names no kind")
    return tuple(sorted(pairs))


def split(params: Params, where: str | None) -> tuple[Params, Params]:
    """As `glm_edge.params.partition`, with what `where` does not match on the frozen side.

    Raises:
      RecipeError: the pattern matches nothing that can train.
    """
    trainable, frozen = boxes.partition(params)
    if not jax.tree.leaves(trainable):
        raise RecipeError("distill: nothing left to train: every parameter is stored in integers")
    if where is None:
        return trainable, frozen
    excluded = _keep(trainable, lambda path: not compiled(where).search(path))
    trainable = _keep(trainable, lambda path: compiled(where).search(path))
    if not jax.tree.leaves(trainable):
        raise RecipeError(f"distill: where={where!r} matches no parameter that can train")
    return trainable, boxes.combine(excluded, frozen)


def _keep(tree: Params, wanted: Callable[[str], bool]) -> Params:
    """The tree with None in place of the arrays at other paths."""
    return boxes.map_with_path(
        lambda path, leaf: leaf if wanted(path) else jax.tree.map(lambda _: None, leaf), tree
    )


def row_of(transform: str, action: str, before: Params, after: Params) -> Row:
    """One line for all trained arrays: how far they moved."""
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    moved, norm = (float(part) for part in _distance(old, new))
    stored = sum(array.nbytes for array in old)
    size = sum(array.size for array in old)
    return Row(
        transform,
        f"{len(old)} arrays",
        action,
        1.0,
        8 * stored / size,
        stored,
        stored,
        moved / norm if norm else 0.0,
    )


@jax.jit
def _distance(old: list[jax.Array], new: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Norms of what lists of arrays differ by, and of the first."""
    return optax.tree.norm(optax.tree.sub(new, old)), optax.tree.norm(old)
