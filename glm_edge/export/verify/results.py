"""Results of the comparison of an exported model with its JAX model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge import params as boxes
from glm_edge.errors import ExportError

# Minimum agreement for a file with the same arithmetic as JAX.
MIN_AGREEMENT = 0.99
# Minimum agreement of a LiteRT file, which rounds activations, with `float32`.
MIN_AGREEMENT_FLOAT32 = 0.97
MIN_TOKENS = 1000
# Minimum turns of a conversation with a bundle's engine.
MIN_TURNS = 3
# A different graph has a distance of about 1; rounding of activations one of a few hundredths.
SIGNATURE_LIMIT = 0.25


@dataclass(frozen=True)
class Verification:
    """The distance between the predictions of a file and those of its JAX model.

    Attributes:
      agreement: fraction of counted positions with the same top-1 token, teacher-forced.
      tokens: counted positions.
      max_abs_error: largest difference of a logit at them; None if the runtime returns no logits.
      mean_kl: mean KL(JAX || file) in nats at them; None if the runtime returns no logits.
      free_running_agreement: fraction of greedily generated tokens that are equal.
      free_running_tokens: number of generated tokens.
      compute: arithmetic of the JAX model.
      threshold: required agreement.
      usual_threshold: default of the required agreement.
      turns: number of turns of the conversation with a bundle's engine; None for other formats.
      signatures: by name, the distance between a signature's outputs and those of its JAX function
        on the same random inputs, as a fraction of the latter's norm. For a step without logits,
        the distance is that of the next step, which reads its cache.
    """

    agreement: float
    tokens: int
    max_abs_error: float | None
    mean_kl: float | None
    free_running_agreement: float | None
    free_running_tokens: int
    compute: str
    threshold: float
    usual_threshold: float
    turns: int | None = None
    signatures: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if the agreement reaches the threshold and every signature matches JAX."""
        return self.agreement >= self.threshold and not self.other_signatures

    @property
    def verified(self) -> bool:
        """True if the comparison passed and was large enough to mark the file as verified."""
        return self.passed and not self.shortfalls

    @property
    def shortfalls(self) -> list[str]:
        """Reasons why the comparison is too small to mark a file as verified."""
        reasons = []
        if not self.threshold >= self.usual_threshold:
            reasons.append(f"the default threshold is {self.usual_threshold:.2%}")
        if self.tokens < MIN_TOKENS:
            reasons.append(f"only {self.tokens} of at least {MIN_TOKENS:,} tokens were compared")
        if self.turns is not None and self.turns < MIN_TURNS:
            reasons.append(
                f"the cache fits {self.turns} turns of a conversation, fewer than {MIN_TURNS}"
            )
        return reasons

    @property
    def other_signatures(self) -> list[str]:
        """Signatures that differ from their JAX functions by more than rounding explains."""
        return [name for name, error in self.signatures.items() if not error <= SIGNATURE_LIMIT]

    def __str__(self) -> str:
        line = f"{self.agreement:.2%} of {self.tokens} top-1 tokens equal JAX's ({self.compute})"
        if self.max_abs_error is not None:
            line += f", max |error| {self.max_abs_error:.3g}, mean KL {self.mean_kl:.3g} nats"
        if self.signatures:
            worst = max(self.signatures.values())
            line += f", {len(self.signatures)} signatures within {worst:.2g} of JAX's"
        if self.free_running_agreement is not None:
            free = f"{self.free_running_agreement:.2%} of {self.free_running_tokens}"
            line += f", free-running {free}"
        return f"{'passed' if self.passed else 'failed'}: {line}; {self.reason}"

    @property
    def reason(self) -> str:
        """The condition of a pass, or the reasons of a failure or of an unmarked file."""
        asked = f"threshold {self.threshold:.2%}"
        if self.verified:
            return asked
        if self.passed:
            return f"{asked}; not marked as verified: {', and '.join(self.shortfalls)}"
        reasons = []
        if not self.agreement >= self.threshold:
            reasons.append(
                f"{asked} (rounding changes the order of nearly equal scores, which random tokens "
                "or weights cause: compare on text that the model knows)"
            )
        if self.other_signatures:
            names = ", ".join(self.other_signatures)
            reasons.append(f"{names} differ from JAX by more than {SIGNATURE_LIMIT:g}")
        return "; ".join(reasons)


def compute_of(params: Any) -> str:
    """Return LiteRT's arithmetic for parameters: `int8_static` if they have static grids.

    Args:
      params: parameters with the stored values.

    Returns:
      `int8_static` or `int8_dynamic`.
    """
    leaves = boxes.path_items(params)
    static = any(getattr(leaf, "input_scale", None) is not None for _, leaf in leaves)
    return "int8_static" if static else "int8_dynamic"


def threshold_of(compute: str, float32: bool = False) -> float:
    """Return the minimum agreement of a file with a JAX model.

    Args:
      compute: arithmetic of the JAX model.
      float32: whether the file computes without rounding activations.

    Returns:
      The fraction of equal top-1 tokens.
    """
    if float32 or compute != "float32":
        return MIN_AGREEMENT
    return MIN_AGREEMENT_FLOAT32


def conclude(
    path: str | Path,
    compute: str,
    threshold: float | None,
    check: bool,
    float32: bool = False,
    **measured: Any,
) -> Verification:
    """Build the result of a comparison.

    Args:
      path: path of the file, for messages.
      compute: arithmetic of the JAX model.
      threshold: minimum agreement; None uses the default.
      check: whether to raise if the comparison fails.
      float32: whether the file computes without rounding activations.
      **measured: remaining fields of `Verification`.

    Returns:
      The result.

    Raises:
      ExportError: the comparison fails.
    """
    usual = threshold_of(compute, float32)
    result = Verification(
        compute=compute,
        threshold=usual if threshold is None else threshold,
        usual_threshold=usual,
        **measured,
    )
    if check and not result.passed:
        raise ExportError(f"{path}: {result}")
    return result
