"""Common options of transforms that quantize weights."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from glm_edge.compress.layerwise.runner import LayerwiseTransform
from glm_edge.compress.options import Options
from glm_edge.compress.quantize.solvers.gptq_solver import MOST_DAMPING
from glm_edge.compress.quantize.solvers.scales import SCALES
from glm_edge.compress.quantize.solvers.shrinkage import CROSS_VALIDATE
from glm_edge.compress.transform import Transform, check_pattern
from glm_edge.errors import BoxError, RecipeError
from glm_edge.kernels.quantization import INTEGERS
from glm_edge.params import Format

_WIDTHS = tuple(INTEGERS.values())
MOST_SWEEPS = 10_000


@dataclass(frozen=True)
class QuantizeConfig:
    """A format of weights, and the choice of their scales.

    Attributes:
      format: format of the weights.
      scale: method that chooses scales, see `glm_edge.quantize.rtn`.
      fallback_bits: per-channel width for a matrix whose columns do not divide into groups; None
        raises RecipeError for it.
    """

    format: Format
    scale: str = "max"
    fallback_bits: int | None = None

    def check(self, transform: str) -> None:
        """Check the options; raise RecipeError for an invalid one."""
        if self.scale not in SCALES:
            raise RecipeError(
                f"{transform}: scale must be one of {', '.join(SCALES)}, not {self.scale!r}"
            )
        if self.scale == "extreme" and not (
            self.format.symmetric and self.format.qtype in INTEGERS
        ):
            raise RecipeError(
                f"{transform}: scale='extreme' is for symmetric integers; {self.format} needs max "
                "or mse"
            )
        if self.fallback_bits is not None:
            check_bits(transform, "fallback_bits", self.fallback_bits)

    def format_of(self, path: str, columns: int) -> Format:
        """Return the format of one parameter, or the fallback.

        Args:
          path: path of the parameter for messages.
          columns: count of inputs of its matrix.

        Returns:
          The format.

        Raises:
          RecipeError: columns do not divide into groups, and there is no fallback.
        """
        try:
            self.format.num_groups(columns)
        except BoxError as error:
            if self.fallback_bits is not None:
                return Format(f"int{self.fallback_bits}", None, self.format.symmetric)
            raise RecipeError(
                f"{path}: {error}; choose a divisor, or fallback_bits=8 for per-channel "
                "quantization of such a matrix"
            ) from error
        return self.format

    def check_groups(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse matrices whose columns do not divide into groups.

        Args:
          sizes: `(out, in)` of each matrix by path.

        Raises:
          RecipeError: columns do not divide into groups, and there is no fallback.
        """
        if not self.format.plain:
            for path, (_, columns) in sizes.items():
                self.format_of(path, columns)


@dataclass(frozen=True, kw_only=True, repr=False)
class SolverOptions(Options):
    """Options of the solver of GPTQ and SparseGPT, which compensates errors column by column.

    Attributes:
      act_order: processes columns by decreasing input energy; groups stay together.
      damping: fraction of the Hessian's mean diagonal that is added to its diagonal (`percdamp` of
        the paper). The solver multiplies it by ten until the matrix has a Cholesky factor.
      sequential: within a layer, collects the inputs of a matrix again after the matrices before it
        are compressed; False collects once per layer.
      propagate: in 0..1, fraction of the input error that weights compensate for before they are
        compressed; 0 ignores input errors.
      refit: fits scales, and zero points between levels, by least squares after rounding.
      sweeps: passes of coordinate descent over the codes.
      shrinkage: fraction in 0..1 by which the Hessian moves to its diagonal before the solve. Few
        bits fit the correlations of the calibration text; shrinkage loses less on other texts.
        `cross-validate` chooses it per matrix, by the output error on the domain that a trial
        omits, see `glm_edge.compress.domains`. It is 0 where fewer than two domains are named.

    Raises:
      RecipeError: an option is out of range.
    """

    act_order: bool = True
    damping: float = 0.01
    sequential: bool = True
    propagate: float = 0.5
    refit: bool = True
    sweeps: int = 3
    shrinkage: float | str = CROSS_VALIDATE

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        shrinkage = self.shrinkage
        named = shrinkage == CROSS_VALIDATE
        if not named and (isinstance(shrinkage, str) or not 0 <= shrinkage <= 1):
            raise RecipeError(
                f"{name}: shrinkage must be in 0..1 or {CROSS_VALIDATE!r}, not {shrinkage!r:.60}"
            )
        for option, high in (("damping", MOST_DAMPING), ("propagate", 1)):
            value = getattr(self, option)
            if not 0 <= value <= high:
                raise RecipeError(f"{name}: {option} must be in 0..{high:g}, not {value!r}")
        check_passes(name, sweeps=self.sweeps)

    @property
    def needs(self) -> str:
        """`both` models if input errors are compensated, otherwise `inputs`."""
        return "both" if self.propagate > 0 else "inputs"


def check_passes(name: str, **passes: int) -> None:
    """Check that every option is a count of passes, zero allowed; raise RecipeError otherwise."""
    for option, count in passes.items():
        if not 0 <= count <= MOST_SWEEPS:
            raise RecipeError(
                f"{name}: {option} must be a whole number of 0 to {MOST_SWEEPS}, not {count!r}"
            )


def check_bits(transform: str, option: str, bits: Any) -> None:
    """Check that an option is the width of an integer format; raise RecipeError otherwise."""
    if not isinstance(bits, int) or bits not in _WIDTHS:
        known = f"{', '.join(map(str, _WIDTHS[:-1]))} or {_WIDTHS[-1]}"
        raise RecipeError(f"{transform}: {option} must be {known}, not {bits!r:.60}")


def parse_format(transform: str, format: Any) -> Format:
    """Read the option `format` of a transform.

    Args:
      transform: name of the transform for messages.
      format: format string or `Format`.

    Returns:
      The format.

    Raises:
      RecipeError: the option is not a valid format.
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
      format: format of the weights, a string such as `int4-g32` or a `Format`; the docstring of
        `glm_edge.params.Format` explains the strings.
      where: regular expression searched in each path; None selects every matrix that is not yet
        quantized.
      scale: `max` maps the largest magnitude to the largest level; `mse` uses the fraction of it
        with the least squared error; `fit` alternates rounding with the least-squares scale and
        zero point; `extreme` maps the signed extreme to `-2^(bits-1)` (symmetric
        integers only; phone kernels refuse negative scales).
      fallback_bits: per-channel width for a matrix whose columns do not divide into groups; None
        raises RecipeError for it.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`), if
        the model does not show it.
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
        """Format and choice of scales."""
        return QuantizeConfig(parse_format(self.name, self.format), self.scale, self.fallback_bits)


@dataclass(frozen=True, kw_only=True, repr=False)
class Quantizer(WeightTransform, LayerwiseTransform):
    """A transform that quantizes weights stage by stage."""

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse matrices whose columns do not divide into groups."""
        self.config.check_groups(sizes)
