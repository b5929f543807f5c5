"""Options that transforms which round weights have in common."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from glm_edge.compress.layerwise.runner import LayerwiseTransform
from glm_edge.compress.options import Options
from glm_edge.compress.quantize.solvers.gptq_solver import MOST_DAMPING
from glm_edge.compress.quantize.solvers.scales import SCALES
from glm_edge.compress.transform import Transform, check_pattern
from glm_edge.errors import BoxError, RecipeError
from glm_edge.kernels.quantization import INTEGERS
from glm_edge.params import Format

_WIDTHS = tuple(INTEGERS.values())
MOST_SWEEPS = 10_000


@dataclass(frozen=True)
class QuantizeConfig:
    """A format for weights, and how their scales are chosen.

    Attributes:
      format: of the weight.
      scale: how scales are chosen, see `glm_edge.quantize.rtn`.
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None refuses
        such a matrix.
    """

    format: Format
    scale: str = "max"
    fallback_bits: int | None = None

    def check(self, transform: str) -> None:
        """Raises RecipeError where an option of a transform has no meaning."""
        if self.scale not in SCALES:
            raise RecipeError(
                f"{transform}: scale must be one of {', '.join(SCALES)}, not {self.scale!r}"
            )
        if self.scale == "extreme" and not (
            self.format.symmetric and self.format.qtype in INTEGERS
        ):
            raise RecipeError(
                f"{transform}: scale='extreme' is for symmetric integers; {self.format} takes max "
                "or mse"
            )
        if self.fallback_bits is not None:
            check_bits(transform, "fallback_bits", self.fallback_bits)

    def format_of(self, path: str, columns: int) -> Format:
        """Returns the format of one parameter: the wanted one, or the fallback.

        Args:
          path: of the parameter, for messages.
          columns: inputs of its matrix.

        Raises:
          RecipeError: its columns are not whole groups and there is no fallback.
        """
        try:
            self.format.num_groups(columns)
        except BoxError as error:
            if self.fallback_bits is not None:
                return Format(f"int{self.fallback_bits}", None, self.format.symmetric)
            raise RecipeError(
                f"{path}: {error}; choose a divisor, or fallback_bits=8 to round such a matrix per "
                "channel"
            ) from error
        return self.format

    def check_groups(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Refuses matrices whose columns are not whole groups.

        Args:
          sizes: `(out, in)` of the matrices by path.

        Raises:
          RecipeError: one does not fit, and there is no fallback.
        """
        if not self.format.plain:
            for path, (_, columns) in sizes.items():
                self.format_of(path, columns)


@dataclass(frozen=True, kw_only=True, repr=False)
class SolverOptions(Options):
    """Options of the solver of GPTQ and SparseGPT, which compensates errors column by column.

    Attributes:
      act_order: takes columns by decreasing input energy; groups stay whole.
      damping: fraction of the mean diagonal of the Hessian that is added to its diagonal. Where the
        sum has no Cholesky factor, the solver raises it tenfold until it has one.
      sequential: within a layer, collects the inputs of a matrix again after the matrices before it
        are compressed; False collects once per layer.
      propagate: in 0..1, fraction of the error of the inputs that the weights compensate first. At
        0, only the weights' own errors count.
      refit: fits scales by least squares after rounding.
      sweeps: passes of coordinate descent over the codes.

    Raises:
      RecipeError: an option is out of range.
    """

    act_order: bool = True
    damping: float = 0.01
    sequential: bool = True
    propagate: float = 0.5
    refit: bool = True
    sweeps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for option, high in (("damping", MOST_DAMPING), ("propagate", 1)):
            value = getattr(self, option)
            if not 0 <= value <= high:
                raise RecipeError(f"{name}: {option} must be in 0..{high:g}, not {value!r}")
        check_passes(name, sweeps=self.sweeps)

    @property
    def needs(self) -> str:
        """Models whose inputs are collected: both to compensate the error of inputs."""
        return "both" if self.propagate > 0 else "inputs"


def check_passes(name: str, **passes: int) -> None:
    """Raises RecipeError unless every option is a number of passes, zero allowed."""
    for option, count in passes.items():
        if not 0 <= count <= MOST_SWEEPS:
            raise RecipeError(
                f"{name}: {option} must be a whole number of 0 to {MOST_SWEEPS}, not {count!r}"
            )


def check_bits(transform: str, option: str, bits: Any) -> None:
    """Raises RecipeError unless an option is the width of an integer format."""
    if not isinstance(bits, int) or bits not in _WIDTHS:
        known = f"{', '.join(map(str, _WIDTHS[:-1]))} or {_WIDTHS[-1]}"
        raise RecipeError(f"{transform}: {option} must be {known}, not {bits!r:.60}")


def parse_format(transform: str, format: Any) -> Format:
    """Reads the option `format` of a transform.

    Raises:
      RecipeError: it is no format.
    """
    if isinstance(format, Format):
        return format
    try:
        return Format.parse(format)
    except BoxError as error:
        raise RecipeError(f"{transform}: {error}") from error


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightTransform(Transform):
    """Base of the transforms that round weights to a format.

    Attributes:
      format: of the weights, a string such as `int4-g32` or a `Format`; the docstring of
        `glm_edge.params.Format` explains the strings.
      where: regular expression searched in each path; None rounds every matrix that is not yet
        quantized.
      scale: how scales are chosen: `max`, the largest magnitude lands on the largest level; `mse`,
        the fraction of it that gives the least squared error; `extreme`, the signed extreme lands
        on `-2^(bits-1)` (symmetric integers only; scales may be negative, which phone kernels
        refuse).
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None raises
        there.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`),
        where the model itself does not show it.
    """

    unsupported: ClassVar[tuple[str, ...]] = ()

    format: Format | str = field(default=Format("int4"), kw_only=False)
    where: str | None = None
    scale: str = "mse"
    fallback_bits: int | None = None
    stacked: str | None = None

    def __post_init__(self) -> None:
        format = parse_format(self.name, self.format)
        self._set(format=format)
        super().__post_init__()
        if format.qtype in self.unsupported:
            raise RecipeError(f"{self.name} cannot round to {self.format}; quantize.rtn can")
        check_pattern(self.name, "where", self.where)
        check_pattern(self.name, "stacked", self.stacked)
        self.config.check(self.name)

    @functools.cached_property
    def config(self) -> QuantizeConfig:
        """The format, and how scales are chosen."""
        return QuantizeConfig(parse_format(self.name, self.format), self.scale, self.fallback_bits)


@dataclass(frozen=True, kw_only=True, repr=False)
class Quantizer(WeightTransform, LayerwiseTransform):
    """A transform that rounds weights stage by stage."""

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Refuses matrices whose columns are not whole groups."""
        self.config.check_groups(sizes)
