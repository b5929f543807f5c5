"""Results of comparing an exported model with its JAX model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge import params as boxes
from glm_edge.errors import ExportError

# Where a file multiplies as JAX does, nearly every token is the same.
MIN_AGREEMENT = 0.99
# LiteRT rounds activations, which `float32` does not.
MIN_AGREEMENT_FLOAT32 = 0.97
MIN_TOKENS = 1000
# Of a conversation with a bundle's engine.
MIN_TURNS = 3
# Another graph is off by about 1; rounding activations alone costs a few hundredths.
SIGNATURE_LIMIT = 0.25


@dataclass(frozen=True)
class Verification:
    """The distance of a file's predictions from those of its JAX model.

    Attributes:
      agreement: fraction of counted positions with the same top-1 token, teacher-forced.
      tokens: counted positions.
      max_abs_error: largest difference of a logit at them; None where a runtime gives no logits.
      mean_kl: mean of KL(JAX || file) in nats at them; None likewise.
      free_running_agreement: fraction of greedily generated tokens that are the same.
      free_running_tokens: tokens generated.
      compute: how the JAX model multiplied.
      threshold: the agreement asked for.
      usual_threshold: the agreement asked for where the caller names none.
      turns: of the conversation with a bundle's engine; None where none is asked for.
      signatures: by name, the distance of a signature's outputs from those of its JAX function for
        the same random inputs, as a fraction of the latter's norm. A step without logits is judged
        by those of the next one, which reads its cache.
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
        """True when the agreement reaches the threshold and every signature is JAX's function."""
        return self.agreement >= self.threshold and not self.other_signatures

    @property
    def verified(self) -> bool:
        """True when the comparison passed and was enough to mark the file as verified."""
        return self.passed and not self.shortfalls

    @property
    def shortfalls(self) -> list[str]:
        """Reasons why the comparison is too small to mark a file as verified."""
        reasons = []
        if not self.threshold >= self.usual_threshold:
            reasons.append(f"the threshold is usually {self.usual_threshold:.2%}")
        if self.tokens < MIN_TOKENS:
            reasons.append(f"{self.tokens} of at least {MIN_TOKENS:,} tokens were compared")
        if self.turns is not None and self.turns < MIN_TURNS:
            reasons.append(
                f"the cache is too small for a conversation of {MIN_TURNS} turns, it took "
                f"{self.turns}"
            )
        return reasons

    @property
    def other_signatures(self) -> list[str]:
        """Signatures that are further from their JAX functions than rounding explains."""
        return [name for name, error in self.signatures.items() if not error <= SIGNATURE_LIMIT]

    def __str__(self) -> str:
        line = f"{self.agreement:.2%} of {self.tokens} top-1 tokens as in JAX ({self.compute})"
        if self.max_abs_error is not None:
            line += f", max |error| {self.max_abs_error:.3g}, mean KL {self.mean_kl:.3g} nats"
        if self.signatures:
            worst = max(self.signatures.values())
            line += f", {len(self.signatures)} signatures within {worst:.2g} of their functions"
        if self.free_running_agreement is not None:
            free = f"{self.free_running_agreement:.2%} of {self.free_running_tokens}"
            line += f", free-running {free}"
        return f"{'passed' if self.passed else 'failed'}: {line}; {self.reason}"

    @property
    def reason(self) -> str:
        """The condition that was met, the conditions that were not, or why no file is marked."""
        asked = f"at least {self.threshold:.2%} must agree"
        if self.verified:
            return asked
        if self.passed:
            return f"{asked}; not marked as verified: {', and '.join(self.shortfalls)}"
        reasons = []
        if not self.agreement >= self.threshold:
            reasons.append(
                f"{asked} (scores that nearly tie differ by rounding, as random tokens or weights "
                "give them: compare on text that the model knows)"
            )
        if self.other_signatures:
            names = ", ".join(self.other_signatures)
            reasons.append(
                f"{names} compute something else than in JAX, by more than {SIGNATURE_LIMIT:g}"
            )
        return "; ".join(reasons)


def compute_of(params: Any) -> str:
    """Names how LiteRT multiplies with parameters: on static grids where they have some."""
    leaves = boxes.path_items(params)
    static = any(getattr(leaf, "input_scale", None) is not None for _, leaf in leaves)
    return "int8_static" if static else "int8_dynamic"


def threshold_of(compute: str, float32: bool = False) -> float:
    """Returns the least agreement of a file with a JAX model.

    Args:
      compute: of the JAX model.
      float32: the file rounds no activations.
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
    """Makes the result of a comparison.

    Args:
      path: of the file, for messages.
      compute: of the JAX model.
      threshold: least agreement; None takes the usual one.
      check: raise when the comparison fails.
      float32: the file rounds no activations.
      **measured: the other fields of `Verification`.

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
