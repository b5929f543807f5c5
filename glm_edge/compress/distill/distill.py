"""Distillation: a student is trained on the predictions of its teacher."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import ClassVar

import flax.linen as nn
import jax
import optax

from glm_edge import params as boxes
from glm_edge.compress.distill.classifier import is_classifier, variables_of
from glm_edge.compress.distill.loop import train
from glm_edge.compress.distill.options import (
    DistillOptions,
    IntermediateLosses,
    OnPolicy,
    as_teacher,
    shares,
    whole_numbers,
)
from glm_edge.compress.options import TrainOptions
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import (
    ARRAYS,
    Context,
    Result,
    Transform,
    check_params_alone,
    check_pattern,
    register,
)
from glm_edge.errors import RecipeError
from glm_edge.params.patterns import compiled
from glm_edge.params.tree import Params


@register("distill")
class Distill(Transform):
    """Trains a (pruned) student on its teacher's predictions and on the labels.

    The loss is `alpha * T^2 * KL(teacher at T || student at T) + (1 - alpha) * cross-entropy`, the
    mean over predictions weighted by `loss_mask`. Masks and quantized weights do not change. The
    trained parameters are those of `glm_edge.params.partition`, in float32.

    Any module can be trained whose logits are [B, T, V], predictions of the next token at every
    position; the tokens are the labels.

    A classifier, with logits [B, N], is a module with `num_classes` and a method
    `classify(batch, train)`, such as `glm_edge.models.cnn.CNN` and a `TextEncoder` with labels. Its
    batches are dicts of the inputs with `labels` [B] (-1 or none: the row learns from the teacher
    only) and `weights` [B], both optional. If it has collections such as `batch_stats`, `params`
    are its variables: training updates the student's, the teacher uses its own. Any other
    classifier trains with a `glm_edge.Calibration`. Its `apply` gives the logits, which all have
    equal weight, and its `loss` the labels' part, which `alpha=1` does not need. The teacher runs
    by the same functions.

    `glm_edge.Calibration(batches, augment=...)` varies each batch once for student and teacher.
    `alpha=0` fine-tunes on labels alone and needs no teacher.

    Under `glm_edge.params.sharding.on(mesh)`, with parameters on that mesh, training runs on all
    its devices. Parameters, gradients and the optimizer's moments are sharded alike.

        recipe = ge.chain(ge.prune.depth(layers=1), ge.distill(train=ge.TrainOptions(steps=200)))
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      teacher: `(model, params)`; None is the model that the chain was given, or no teacher if
        nothing weighs it (`alpha=0`).
      train: steps, learning rate and the like, see `glm_edge.TrainOptions`.
      temperature: `T`, softens both predictions.
      alpha: weight of the teacher, in 0..1; the labels have `1 - alpha`.
      beta: 0 is the divergence above; 1 is the reverse, `KL(student || teacher)`; a value between
        them is the generalized Jensen-Shannon divergence (see the second reference).
      where: regular expression searched in each path, of the parameters that train. For example,
        `^(decoder|embed|head)/` freezes the encoders. None trains everything. Encoders that student
        and teacher share and that do not train run once for both.
      intermediates: losses between layer outputs or attention weights, see
        `glm_edge.compress.IntermediateLosses`; None compares predictions only.
      vocabulary: teacher token per student token, as after vocabulary pruning. The teacher reads
        and predicts these tokens only. None is one vocabulary.
      mixture: share of batches per kind, such as `{"text": 2, "images": 1, "audio": 1}`; None keeps
        their order.
      on_policy: batches that the student continues by sampling, see `glm_edge.compress.OnPolicy`;
        None trains on calibration only.

    Raises:
      RecipeError: an option has no meaning; on call, there is no teacher, its vocabulary differs,
        one of student and teacher is a classifier, every parameter is frozen, or a model lacks a
        layer, a token or a collection.
      TrainingError: the loss or its gradient is not finite; the error holds the step, and the
        parameters before it.
      DataError: calibration is missing or not a batch, lacks a kind of `mixture`, or has no labels
        and `alpha` is 0.
      OutputError: `state_dir` cannot be written, or holds the state of other arguments.

    References:
      Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531.
      On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649.
    """

    needs_model: ClassVar[bool] = True
    takes_variables: ClassVar[bool] = True

    teacher: tuple[nn.Module, Params] | None = field(default=None, kw_only=False, metadata=ARRAYS)
    train: TrainOptions = TrainOptions()
    temperature: float = 2.0
    alpha: float = 0.9
    beta: float = 0.0
    where: str | None = None
    intermediates: IntermediateLosses | None = None
    vocabulary: Sequence[int] | None = None
    mixture: Mapping[str, float] | Sequence[tuple[str, float]] | None = None
    on_policy: OnPolicy | None = None

    def __post_init__(self) -> None:
        name = self.name
        self._set(
            teacher=as_teacher(name, self.teacher),
            train=TrainOptions.of(name, "train", self.train),
            vocabulary=whole_numbers(name, "vocabulary", self.vocabulary),
            mixture=shares(name, self.mixture),
        )
        if self.intermediates is not None:
            inside = IntermediateLosses.of(name, "intermediates", self.intermediates)
            self._set(intermediates=inside)
        if self.on_policy is not None:
            self._set(on_policy=OnPolicy.of(name, "on_policy", self.on_policy))
        super().__post_init__()
        check_pattern(name, "where", self.where)
        self._options.check(name)

    @property
    def _options(self) -> DistillOptions:
        names = (item.name for item in dataclasses.fields(DistillOptions))
        return DistillOptions(**{name: getattr(self, name) for name in names})

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        teacher = self._teacher(params, context)
        weights = params
        collections: Params = {}
        if is_classifier(model):
            weights, collections = variables_of(params)
        else:
            check_params_alone(self.name, params)
        trainable, frozen = split(weights, self.where)
        trained = train(
            self.name,
            model,
            trainable,
            frozen,
            teacher,
            self.train,
            context,
            options=self._options,
            collections=collections,
        )
        healed = boxes.combine(trained.trainable, frozen)
        if weights is not params:
            healed = {"params": healed, **trained.collections}
        row = row_of(self.name, f"trained {self.train.steps} steps", trainable, trained.trainable)
        notes = trained.notes + _widened(trainable)
        return model, healed, Report.of([row], params, healed, curve=trained.curve, notes=notes)

    def _teacher(self, params: Params, context: Context) -> tuple[nn.Module, Params] | None:
        """Return the teacher, or None if the loss has no term of it."""
        if self.teacher is not None:
            return self.teacher
        if not self._options.needs_teacher:
            return None
        if context.original[1] is params:
            raise RecipeError(
                "distill: the model would be its own teacher; pass teacher=(model, params), or put "
                "distill after a transform in a chain"
            )
        return context.original


distill = Distill


def _widened(trainable: Params) -> tuple[str, ...]:
    """Note that arrays of narrower types became float32."""
    narrow = [leaf for leaf in jax.tree.leaves(trainable) if leaf.dtype.itemsize < 4]
    if not narrow:
        return ()
    types = ", ".join(sorted({str(leaf.dtype) for leaf in narrow}))
    return (
        f"distill: {len(narrow)} arrays of {types} were trained and are float32 now; "
        f"glm_edge.params.cast(params, '{narrow[0].dtype}') casts trainable arrays back",
    )


def split(params: Params, where: str | None) -> tuple[Params, Params]:
    """Split parameters as `glm_edge.params.partition`, freezing those that `where` does not match.

    Args:
      params: of the student.
      where: regular expression searched in each path; None matches every one.

    Returns:
      `(trainable, frozen)`.

    Raises:
      RecipeError: the pattern matches no parameter that can train.
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
    """Replace the arrays at other paths by None."""
    return boxes.map_with_path(
        lambda path, leaf: leaf if wanted(path) else jax.tree.map(lambda _: None, leaf), tree
    )


def row_of(transform: str, action: str, before: Params, after: Params) -> Row:
    """Make one row for all trained arrays, with their relative change."""
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
    """Compute the norm of the difference of two lists of arrays, and of the first list."""
    return optax.tree.norm(optax.tree.sub(new, old)), optax.tree.norm(old)
