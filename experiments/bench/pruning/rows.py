"""Rows of the pruning table as data: one `Method` per row."""

from typing import Any

from experiments.bench.peers.methods import ALONE, DECODER, OURS, REFERENCE, Method

RESTATED = "sparsity"
HALF, TWO_OF_FOUR, SMALLER = "50 %", "2:4", "30 %"
TRAINS = r"^(decoder|embed|head)/"
DISTILLED = "distilled"
NOTHING = "nothing removed, trained likewise"
# Fractions to remove from each decoder layer, which remove at least 30 % of its parameters.
HEADS, NEURONS = 0.25, 0.345
# Share of screens in healing after a removal, which affects taps more than text.
MIXTURE = {"text": 3, "images": 1, "audio": 1}
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)


def methods(steps: int, sparse_steps: int) -> tuple[Method, ...]:
    """Return all rows.

    Beside each distilled row is a row of labels alone, and beside these the same trainings of the
    model without pruning. All have the same batches, steps and schedule.

    Args:
      steps: training steps after a removal.
      sparse_steps: training steps under a mask.
    """
    pruned = structured()
    return (
        Method("fp32", REFERENCE, kind="none"),
        Method("fp32 again", REFERENCE, kind="none"),
        *_restated(),
        *_masked(),
        *_healed(f"sparsegpt {HALF}", half(), heal(sparse_steps)),
        *_healed(f"sparsegpt {TWO_OF_FOUR}", sparse("2:4"), heal(sparse_steps)),
        _ours(f"heads and neurons {SMALLER}", pruned),
        *_healed(f"heads and neurons {SMALLER}", pruned, heal(steps, mixture=MIXTURE)),
        *_healed(NOTHING, None, heal(steps, mixture=MIXTURE)),
    )


def heal(steps: int, **options: Any) -> dict[str, Any]:
    """Return the distillation that heals."""
    return {
        "steps": steps,
        "learning_rate": 1e-3,
        "temperature": 1.0,
        "alpha": 0.9,
        "where": TRAINS,
        "compute": "float32",
        **options,
    }


def structured(**options: Any) -> dict[str, Any]:
    """Make a recipe that removes heads and neurons."""
    fractions = {"heads": HEADS, "neurons": NEURONS, "neuron_multiple": 1, "max_batches": 16}
    return {"name": "prune.structured", "options": {**fractions, **options}}


def sparse(shape: str, **options: Any) -> dict[str, Any]:
    """Return glm_edge's SparseGPT."""
    return {"name": "prune.sparsegpt", "options": {"shape": shape, "where": DECODER, **options}}


def half() -> dict[str, Any]:
    """Return a recipe that prunes half of all weights: measured allocation, then compensation."""
    shares = {"sparsity": 0.5, "score": "wanda", "allocation": "measured", "levels": LEVELS}
    steps = [
        {"name": "prune.mask", "options": {**shares, "where": DECODER}},
        sparse("unstructured", sparsity=0.0),
    ]
    return {"name": "chain", "options": {"transforms": steps}}


def _ours(name: str, prune: dict[str, Any] | None, healing: dict[str, Any] | None = None) -> Method:
    kind, calibration = ("trained", "training") if healing else ("training-free", "both")
    return Method(f"glm_edge {name}", OURS, {"prune": prune, "heal": healing}, kind, calibration)


def _healed(name: str, prune: dict[str, Any] | None, healing: dict[str, Any]) -> list[Method]:
    """Return a distilled row, and the row of labels alone."""
    # The row without pruning had its name before there were two.
    first = name if prune is None else f"{name}, {DISTILLED}"
    return [
        _ours(first, prune, healing),
        _ours(f"{name}, {ALONE}", prune, {**healing, "alpha": 0.0}),
    ]


def _masked() -> list[Method]:
    return [
        _ours(f"sparsegpt {HALF}, uniform", sparse("unstructured", sparsity=0.5)),
        _ours(f"sparsegpt {HALF}, measured", half()),
        _ours(f"sparsegpt {TWO_OF_FOUR}", sparse("2:4")),
    ]


def _restated() -> list[Method]:
    """Return published algorithms in numpy, with default settings."""

    def row(name: str, algorithm: str, calibration: str = "none", **options: Any) -> Method:
        return Method(name, RESTATED, {"algorithm": algorithm, **options}, calibration=calibration)

    half, pairs = {"sparsity": 0.5}, {"n_m": [2, 4]}
    return [
        row(f"magnitude, global {HALF}", "magnitude", **half, scope="global"),
        row(f"JaxPruner magnitude, uniform {HALF}", "magnitude", **half, scope="uniform"),
        row(f"JaxPruner magnitude, ERK {HALF}", "magnitude", **half, scope="erk"),
        row(f"Wanda {HALF}", "wanda", "both", **half),
        row(f"SparseGPT {HALF}", "sparsegpt", "both", **half),
        row(f"magnitude {TWO_OF_FOUR}", "magnitude", **pairs),
        row(f"Wanda {TWO_OF_FOUR}", "wanda", "both", **pairs),
        row(f"SparseGPT {TWO_OF_FOUR}", "sparsegpt", "both", **pairs),
    ]
