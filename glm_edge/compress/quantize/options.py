"""Options that transforms which round weights have in common."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from glm_edge.compress.quantize.solvers.scales import SCALES
from glm_edge.compress.transform import check_pattern
from glm_edge.errors import BoxError, RecipeError
from glm_edge.kernels.grid import INTEGERS
from glm_edge.params import Format
from glm_edge.params.formats import default_scale_dtype

_WIDTHS = tuple(INTEGERS.values())


@dataclass(frozen=True)
class QuantizeConfig:
    """What a weight is rounded to.

    Attributes:
      format: of the weight.
      scale: how scales are chosen, see `glm_edge.quantize.rtn`.
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None refuses
        such a matrix.
    """

    format: Format
    scale: str = "max"
    fallback_bits: int | None = None

    @classmethod
    def of(
        cls, transform: str, options: Mapping[str, Any], without: Container[str] = ()
    ) -> "QuantizeConfig":
        """Reads and checks the options of a transform; those it does not know are left.

        Args:
          transform: name, for messages.
          options: `bits`, `group_size`, `symmetric`, `where`, `scale`, `scale_dtype`, `zero_dtype`,
            `qtype` and `fallback_bits`, as `glm_edge.quantize.rtn` and `hqq` explain them.
          without: qtypes that the transform cannot round to.

        Raises:
          RecipeError: one has no meaning.
        """
        get = options.get
        format = _format(transform, get("bits"), options)
        if format.qtype in without:
            raise RecipeError(f"{transform} cannot round to {format}; quantize.rtn can")
        check_pattern(transform, "where", get("where"))
        check_pattern(transform, "stacked", get("stacked"))
        scale, fallback_bits = get("scale", "max"), get("fallback_bits")
        if scale not in SCALES:
            raise RecipeError(
                f"{transform}: scale must be one of {', '.join(SCALES)}, not {scale!r}"
            )
        if scale == "extreme" and (not format.symmetric or format.qtype not in INTEGERS):
            raise RecipeError(
                f"{transform}: scale='extreme' is for symmetric integers; {format} takes max or mse"
            )
        if fallback_bits is not None:
            _format(transform, fallback_bits, {})
        return cls(format, scale, fallback_bits)

    def format_of(self, path: str, columns: int) -> Format:
        """The format of one parameter: the wanted one, or the fallback.

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


def _format(transform: str, bits: Any, options: Mapping[str, Any]) -> Format:
    qtype, group_size = options.get("qtype"), options.get("group_size")
    if qtype is None and (not isinstance(bits, int) or bits not in _WIDTHS):
        known = f"{', '.join(map(str, _WIDTHS[:-1]))} or {_WIDTHS[-1]}"
        raise RecipeError(
            f"{transform}: bits must be {known}, not {bits!r}; other formats go by qtype="
        )
    try:
        return Format(
            qtype or f"int{bits}",
            group_size,
            options.get("symmetric", True),
            options.get("scale_dtype") or default_scale_dtype(group_size),
            options.get("zero_dtype", "int8"),
        )
    except BoxError as error:
        raise RecipeError(f"{transform}: {error}") from error


def check_groups(
    transform: str, sizes: Mapping[str, tuple[int, int]], options: Mapping[str, Any]
) -> None:
    """Refuses matrices whose columns are not whole groups.

    Args:
      transform: name, for messages.
      sizes: `(out, in)` of the matrices by path.
      options: of the transform.

    Raises:
      RecipeError: one does not fit, and there is no fallback.
    """
    rounding = QuantizeConfig.of(transform, options)
    if rounding.format.plain:
        return
    for path, (_, columns) in sizes.items():
        rounding.format_of(path, columns)


def spelled_out(values: dict[str, Any], *objects: str) -> dict[str, Any]:
    """The arguments of a factory, `locals()`, as options of its transform."""
    return {name: value for name, value in values.items() if name not in objects}
