"""A model as a list of stages, run one after the other on all calibration batches.

Transforms collect statistics and replace weights one stage at a time, so that memory contains one
layer and its statistics. The stages of a GLM are `vision/front`, `vision/layers/<i>`, `vision/end`,
the same for `speech`, `embed`, `decoder/layers/<i>` and `head`. Any other module is one stage,
`model`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress import batches
from glm_edge.compress.calibration import Called
from glm_edge.compress.readings import Reading, watched
from glm_edge.compress.timing import timed
from glm_edge.models.glm import DecoderLayer
from glm_edge.models.multimodal import (
    MultimodalGLM,
    image_groups,
    in_reading_order,
    place_features,
    sounding,
    sounding_first,
)
from glm_edge.models.speech import SpeechEncoder, SpeechLayer
from glm_edge.models.vision import VisionEncoder, VisionLayer
from glm_edge.params.tree import nested

State = dict[str, Any]
Leaves = dict[str, Any]


class Statistic(NamedTuple):
    """A reduction of the input rows of a weight.

    Attributes:
      measure: function `measure(rows, valid)` of rows float32 [N, in] and bool [N], False at
        padding, whose rows are zero; None without padding. Returns a pytree. It is traced inside
        the compiled stage.
      join: function that combines the results of two batches.
    """

    measure: Callable[[Array, Array | None], Any]
    join: Callable[[Any, Any], Any]


def count_valid(rows: Array, valid: Array | None) -> Array:
    """Count the rows that are not padding, as float32."""
    return jnp.float32(rows.shape[0]) if valid is None else jnp.sum(valid, dtype=jnp.float32)


def _column_sums(rows: Array, valid: Array | None) -> dict[str, Array]:
    return {"sum": jnp.sum(jnp.abs(rows), axis=0), "count": count_valid(rows, valid)}


def _range(rows: Array, valid: Array | None) -> dict[str, Array]:
    low, high = rows, rows
    if valid is not None:
        low = jnp.where(valid[:, None], rows, jnp.inf)
        high = jnp.where(valid[:, None], rows, -jnp.inf)
    return {"low": low.min(axis=0), "high": high.max(axis=0)}


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


@jax.jit
def _join_ranges(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    return {"low": jnp.minimum(a["low"], b["low"]), "high": jnp.maximum(a["high"], b["high"])}


def _rows(rows: Array, valid: Array | None) -> Array:
    return rows


def _marked(rows: Array, valid: Array | None) -> dict[str, Array]:
    return {"rows": rows, "valid": jnp.ones(len(rows), bool) if valid is None else valid}


@jax.jit
def _stack(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda one, other: jnp.concatenate([one, other]), a, b)


def _abs_max(rows: Array, valid: Array | None) -> Array:
    return jnp.max(jnp.abs(rows), axis=0)


ABS_SUM = Statistic(_column_sums, _add)
"""`{"sum": sum of |x| [in], "count": rows}`."""
ABS_MAX = Statistic(_abs_max, jnp.maximum)
"""Largest `|x|` per column, [in]."""
RANGE = Statistic(_range, _join_ranges)
"""`{"low": [in], "high": [in]}`."""
ROWS = Statistic(_rows, _stack)
"""All rows, [N, in]; padding rows are zero, which does not change sums of products."""
MARKED_ROWS = Statistic(_marked, _stack)
"""`{"rows": [N, in], "valid": bool [N]}`; rows that are not valid are zero."""


def _all_rows(state: State) -> Array | None:
    return None


def _rows_of_tokens(state: State) -> Array | None:
    """Mark the rows [B * T] of tokens that are not padding."""
    return state["valid"].reshape(-1) if "valid" in state else None


def _rows_of_sound(state: State) -> Array | None:
    """Mark the rows [N * M] of speech features that the decoder reads."""
    return state["sounding"].reshape(-1) if "sounding" in state else None


@dataclass(frozen=True)
class Stage:
    """One step of a model.

    Attributes:
      name: name such as `decoder/layers/3`.
      root: path of the module's parameters in the model's tree, empty for the complete tree.
      owns: path prefixes of the parameters of this stage; stages do not share parameters.
      module: module that runs the stage.
      forward: function `forward(bound module, state)` that returns the next state.
      reads: entry of a state without which a batch skips the stage.
      borrows: paths of parameters of earlier stages that this stage reads too.
      counted: maps a state to bool [N], the rows that count in statistics of weights with N input
        rows, or to None if all rows count.
    """

    name: str
    root: str
    owns: tuple[str, ...]
    module: nn.Module
    forward: Callable[[Any, State], State]
    reads: str = "tokens"
    borrows: tuple[str, ...] = ()
    counted: Callable[[State], Array | None] = _rows_of_tokens

    @property
    def of_tokens(self) -> bool:
        """True if rows are tokens, which may be padding."""
        return self.counted is _rows_of_tokens

    def holds(self, path: str) -> bool:
        """Test for a parameter of this stage."""
        return any(path.startswith(prefix) for prefix in self.owns)

    def run(self, leaves: Leaves, states: Iterable[State]) -> list[State]:
        """Run every batch with the entry `reads`; other batches pass unchanged.

        Args:
          leaves: parameters by full path, including borrowed ones.
          states: states of the batches.

        Returns:
          The states after the stage.
        """
        params = self._params(leaves)
        return [
            timed("forward", _run, self.module, self.forward, params, state)[0]
            if self.reads in state
            else state
            for state in states
        ]

    def collect(
        self,
        leaves: Leaves,
        states: Iterable[State],
        statistic: Statistic,
        paths: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Reduce the input rows of each weight over all batches.

        Args:
          leaves: parameters by full path, including borrowed ones.
          states: states before the stage.
          statistic: the reduction.
          paths: paths of the weights; None selects all. Unselected statistics are not computed.

        Returns:
          Joined results by path of the weight.
        """
        params = self._params(leaves)
        total: dict[str, Any] = {}
        start = len(self.root) + 1 if self.root else 0
        wanted = None if paths is None else tuple(sorted(path[start:] for path in paths))
        for state in states:
            if self.reads not in state:
                continue
            measured = timed(
                "forward",
                _run,
                self.module,
                self.forward,
                params,
                state,
                statistic.measure,
                wanted,
                self.counted,
            )[1]
            for path, values in measured.items():
                path = f"{self.root}/{path}" if self.root else path
                for value in values:
                    total[path] = statistic.join(total[path], value) if path in total else value
        return total

    def watch(self, leaves: Leaves, state: State, note: Callable[[Reading], None]) -> None:
        """Run one batch abstractly, and pass the reading of each layer to a function.

        Args:
          leaves: parameters by full path, including borrowed ones.
          state: state of one batch before the stage.
          note: function of a reading with its full path.
        """
        prefix = f"{self.root}/" if self.root else ""

        def run(params: Any, state: State) -> Any:
            with watched(lambda reading: note(reading._replace(path=prefix + reading.path))):
                return advance(self.module, self.forward, params, state)

        if self.reads in state:
            jax.eval_shape(run, self._params(leaves), state)

    def readers(self, leaves: Leaves, state: State) -> list[tuple[str, ...]]:
        """Group the weights that read the same rows, in the order of computation.

        Args:
          leaves: parameters by full path, including borrowed ones.
          state: state of one batch before the stage.

        Returns:
          Paths of each group.
        """
        # Arrays are kept alive, so that their ids stay unique.
        groups: dict[Any, tuple[Any, list[str]]] = {}

        def see(reading: Reading) -> None:
            if reading.rows is not None:
                group = groups.setdefault((id(reading.x), reading.kind), (reading.x, []))
                group[1].append(reading.path)

        self.watch(leaves, state, see)
        return [tuple(dict.fromkeys(paths)) for _, paths in groups.values()]

    def unseen(self, leaves: Leaves, states: Iterable[State]) -> dict[str, str]:
        """Return the reason by path of each weight whose inputs cannot be recorded."""
        reasons: dict[str, str] = {}
        watched_paths: set[str] = set()

        def see(reading: Reading) -> None:
            if reading.rows is not None:
                watched_paths.add(reading.path)
            else:
                reasons.setdefault(reading.path, reading.reason)

        for state in states:
            if self.reads in state:
                self.watch(leaves, state, see)
                break
        return {path: reason for path, reason in reasons.items() if path not in watched_paths}

    def _params(self, leaves: Leaves) -> Any:
        start = len(self.root) + 1 if self.root else 0
        return nested(
            {path[start:]: leaf for path, leaf in leaves.items() if path.startswith(self.root)}
        )


def advance(module: nn.Module, forward: Callable[..., State], params: Any, state: State) -> State:
    """Run the module of a stage, or the function of its `Calibration`."""
    if isinstance(forward, Through):
        return forward(params, state)
    result: Any = module.apply({"params": params}, state, method=forward)
    return result


@dataclass(frozen=True)
class Through:
    """A forward function that runs a complete model by the functions of its `Calibration`."""

    model: Called

    def __call__(self, params: Any, state: State) -> State:
        output = self.model.run(params, state)
        # A loss is not an output that can be compared.
        if self.model.apply is None:
            return state
        return {**state, "x": self.model.logits_of(output)}


@functools.partial(jax.jit, static_argnames=("module", "forward", "measure", "wanted", "counted"))
def _run(
    module: nn.Module,
    forward: Callable[..., State],
    params: Any,
    state: State,
    measure: Callable[[Array, Array | None], Any] | None = None,
    wanted: tuple[str, ...] | None = None,
    counted: Callable[[State], Array | None] = _all_rows,
) -> tuple[State, dict[str, list[Any]]]:
    if measure is None:
        return advance(module, forward, params, state), {}
    # Without the state as a result, XLA removes computations that the statistic does not need.
    return {}, measured(module, forward, params, state, measure, wanted, counted)[1]


def measured(
    module: nn.Module,
    forward: Callable[..., State],
    params: Any,
    state: State,
    measure: Callable[[Array, Array | None], Any],
    wanted: tuple[str, ...] | None,
    counted: Callable[[State], Array | None],
) -> tuple[State, dict[str, list[Any]]]:
    """Run the module of a stage, and reduce the input rows of its weights.

    Args:
      module: module of the stage.
      forward: see `Stage`.
      params: parameters of the module.
      state: state of one batch before the stage.
      measure: see `Statistic`.
      wanted: paths of the weights within the module; None selects all.
      counted: see `Stage`.

    Returns:
      The state after the stage, and the results by path, one per call of the layer.
    """
    readings: list[Reading] = []
    with watched(readings.append):
        after = advance(module, forward, params, state)
    # A module that runs several times has several inputs.
    rows: dict[str, list[Array]] = {}
    # `reading.rows()` of a convolution runs its layer again, outside of the watched context.
    for reading in readings:
        if reading.rows is not None and (wanted is None or reading.path in wanted):
            x = reading.rows()
            rows.setdefault(reading.path, []).append(x.reshape(-1, x.shape[-1]))
    valid = counted(after if counted is _rows_of_sound else state)

    def reduce(x: Array) -> Any:
        x = x.astype(jnp.float32)
        if valid is None or valid.shape[0] != x.shape[0]:
            return measure(x, None)
        return measure(jnp.where(valid[:, None], x, 0.0), valid)

    return after, {path: [reduce(x) for x in calls] for path, calls in rows.items()}


def stages(model: nn.Module | Called) -> tuple[Stage, ...]:
    """Split a model into stages, in the order of computation.

    Args:
      model: Linen module, or a `Called`.

    Returns:
      The stages.
    """
    if isinstance(model, Called):
        return (Stage("model", "", ("",), model.model, Through(model), "batch", (), _all_rows),)
    if not isinstance(model, MultimodalGLM):
        return (Stage("model", "", ("",), model, _whole_model),)
    config = model.config
    in_order: list[Stage] = []
    layers: list[nn.Module]
    width = config.decoder.hidden_size
    if config.vision is not None:
        tower = VisionEncoder(config.vision, width, model.compute)
        windows = [
            None if index in config.vision.global_layers else config.vision.window
            for index in range(config.vision.num_layers)
        ]
        layers = [
            VisionLayer(config.vision, window, _first_alike(config.vision, i), model.compute)
            for i, window in enumerate(windows)
        ]
        in_order += _encoder("vision", "images", tower, layers, _vision_functions)
    if config.speech is not None:
        encoder = SpeechEncoder(config.speech, width, model.compute)
        layers = [
            SpeechLayer(config.speech, _first_alike(config.speech, i), model.compute)
            for i in range(config.speech.num_layers)
        ]
        in_order += _encoder("speech", "audio", encoder, layers, _speech_functions)
    in_order.append(Stage("embed", "", ("embed/",), model, _embed))
    for index in range(config.decoder.num_layers):
        root = f"decoder/layers/{index}"
        layer = DecoderLayer(config.decoder, _first_alike(config.decoder, index), model.compute)
        in_order.append(Stage(root, root, (f"{root}/",), layer, _decode))
    tied = ("embed/weight",) if config.decoder.tie_embeddings else ()
    in_order.append(Stage("head", "", ("decoder/norm/", "head/"), model, _predict, "tokens", tied))
    return tuple(in_order)


def _first_alike(part: Any, index: int) -> int:
    """Return the first layer of equal widths, so that both share a compiled program."""
    widths = [(part.heads(i), part.kv_heads(i), part.neurons(i)) for i in range(index + 1)]
    return widths.index(widths[index])


def _encoder(
    name: str, reads: str, encoder: nn.Module, layers: list[nn.Module], functions: Mapping[str, Any]
) -> list[Stage]:
    # An encoder declares all its tables when any part is called, so the last stage needs them too.
    tables = tuple(f"{name}/{table}" for table in functions["tables"])
    front = (*(f"{name}/{part}/" for part in functions["front_owns"]), *tables)
    encoder_stages = [
        Stage(f"{name}/front", name, front, encoder, functions["front"], reads, (), _all_rows)
    ]
    for index, layer in enumerate(layers):
        root = f"{name}/layers/{index}"
        encoder_stages.append(
            Stage(root, root, (f"{root}/",), layer, functions["layer"], reads, (), _all_rows)
        )
    end = tuple(f"{name}/{part}/" for part in functions["end_owns"])
    counted = _rows_of_sound if name == "speech" else _all_rows
    encoder_stages.append(
        Stage(f"{name}/end", name, end, encoder, functions["end"], reads, tables, counted)
    )
    return encoder_stages


def _images(images: Any, config: Any) -> list[Array]:
    """List the images by size: one array for an array, or one per size of a list."""
    if isinstance(images, list | tuple):
        return image_groups(images, config)[0]
    return [images.reshape(-1, *images.shape[-3:])]


def _grids(state: State, config: Any) -> list[tuple[int, int]]:
    return [config.grid_of(group.shape[-3:-1]) for group in _images(state["images"], config)]


def _vision_front(encoder: VisionEncoder, state: State) -> State:
    groups = _images(state["images"], encoder.config)
    angles = [encoder.angles(grid) for grid in _grids(state, encoder.config)]
    # One entry per image size.
    return {**state, "x": [encoder.embed(group)[0] for group in groups], "angle": angles}


def _vision_layer(layer: VisionLayer, state: State) -> State:
    parts = zip(state["x"], state["angle"], _grids(state, layer.config), strict=True)
    return {**state, "x": [layer(x, angle, grid) for x, angle, grid in parts]}


def _vision_end(encoder: VisionEncoder, state: State) -> State:
    parts = zip(state["x"], _grids(state, encoder.config), strict=True)
    features = [encoder.head(encoder.norm(x), grid) for x, grid in parts]
    if isinstance(state["images"], list | tuple):
        order = image_groups(state["images"], encoder.config)[1]
        return _encoded(state, "images", "vision", in_reading_order(features, order))
    return _encoded(state, "images", "vision", _by_row(state, features[0]))


def _speech_front(encoder: SpeechEncoder, state: State) -> State:
    items = state["audio"].reshape(-1, *state["audio"].shape[-2:])
    x = encoder.embed(items)[0]
    return {**state, "x": x, "angle": encoder.angles(x.shape[1])}


def _speech_layer(layer: SpeechLayer, state: State) -> State:
    return {**state, "x": layer(state["x"], state["angle"])}


def _speech_end(encoder: SpeechEncoder, state: State) -> State:
    features = encoder.head(encoder.norm(state["x"]))
    if "audio_frames" not in state:
        return _encoded(state, "audio", "speech", _by_row(state, features))
    frames, merge_size = state["audio_frames"], encoder.config.merge_size
    after = _encoded(state, "audio", "speech", sounding_first(features, frames, merge_size))
    return {**after, "sounding": sounding(features, frames, merge_size)}


def _by_row(state: State, features: Array) -> Array:
    return features.reshape(state["tokens"].shape[0], -1, features.shape[-1])


def _encoded(state: State, source: str, name: str, features: Array) -> State:
    others = {key: value for key, value in state.items() if key not in ("x", "angle", source)}
    return {**others, name: features}


_vision_functions = {
    "front": _vision_front,
    "layer": _vision_layer,
    "end": _vision_end,
    "front_owns": ("patch", "post_conv_norm"),
    "end_owns": ("norm", "pool", "merge", "projector"),
    "tables": ("position", "begin", "end", "row", "column"),
}
_speech_functions = {
    "front": _speech_front,
    "layer": _speech_layer,
    "end": _speech_end,
    "front_owns": ("conv1", "conv2"),
    "end_owns": ("norm", "linear_1", "linear_2"),
    "tables": ("position",),
}


def _embed(model: MultimodalGLM, state: State) -> State:
    tokens, x = state["tokens"], model.embed(state["tokens"])
    for name, token in (
        ("vision", model.config.image_token_id),
        ("speech", model.config.audio_token_id),
    ):
        if name in state:
            x = place_features(x, tokens == token, state[name])
    angle, mask, _ = model.decoder.prepare(x, state["positions"], state.get("mask"), None)
    return {**_padded(state), "tokens": tokens, "x": x, "angle": angle, "mask": mask}


def _decode(layer: DecoderLayer, state: State) -> State:
    x, _ = layer(state["x"], state["angle"], state["mask"], None, jnp.zeros((), jnp.int32))
    return {**state, "x": x}


def _predict(model: MultimodalGLM, state: State) -> State:
    x = model.predict(model.decoder.norm(state["x"]))
    return {**_padded(state), "tokens": state["tokens"], "x": x}


def _padded(state: State) -> State:
    return {"valid": state["valid"]} if "valid" in state else {}


def _whole_model(model: nn.Module, state: State) -> State:
    output = model(state["tokens"], **batches.inputs_of(model, state))
    return {**state, "x": output[0] if isinstance(output, tuple) else output}


def first_states(model: nn.Module | Called, calibration: Iterable[Any]) -> list[State]:
    """Build the states before the first stage.

    Args:
      model: model that reads the batches, or a `Called`.
      calibration: batches, see `glm_edge.compress.batches`.

    Returns:
      One state per batch.

    Raises:
      DataError: a batch is malformed.
    """
    states = []
    for batch in calibration:
        state = {k: v for k, v in batches.to_device(model, batch).items() if k != "loss_mask"}
        if isinstance(model, MultimodalGLM) and "positions" not in state:
            state["positions"] = _positions(model, state)
        states.append(state)
    return states


@functools.partial(jax.jit, static_argnames="model")
def _positions(model: MultimodalGLM, state: State) -> Array:
    return model.apply(
        {},
        state["tokens"],
        state.get("valid"),
        state.get("images"),
        method=MultimodalGLM.start_positions,
    )[0]
