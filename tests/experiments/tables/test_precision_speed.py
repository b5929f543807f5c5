"""Speed-ups by precision: pairs of rounds, shapes, and a small run."""

import pytest

from experiments.bench.runtimes.compare import Burst
from experiments.tables import precision_speed
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.errors import DataError
from glm_edge.models.multimodal import MultimodalGLM


def test_speed_ups_pair_bursts_of_a_round():
    def bursts(*seconds):
        return [Burst(turn, value) for turn, value in enumerate(seconds)]

    # The second round is slow for all: medians of each side alone would say 2.
    samples = {
        "float32": {"decode": bursts(0.3, 3.0, 0.6), "prefill": bursts(1.0, 1.0, 1.0)},
        "int8": {"decode": bursts(0.1, 1.0, 0.3), "prefill": bursts(1.0, 1.0, 1.0)},
    }
    written = {form: {"weight_bytes": 4e6} for form in samples}
    rows = {row.quantity: row for row in precision_speed.rows_of(written, samples, 8, 16)}
    gain = rows["decode, int8 over float32"]
    assert (gain.measured, gain.claim) == (pytest.approx(3.0), 2.5)
    assert "claimed 2.5 - 3.5" in gain.note
    assert rows["decode, float32"].measured == pytest.approx(600.0)
    assert rows["prefill, int8 over float32"].measured == pytest.approx(1.0)
    assert rows["weights, int8"].measured == pytest.approx(4.0)


def test_a_quarter_of_mobile_is_a_quarter():
    def matrices(name):
        model = MultimodalGLM(precision_speed.shape_of(name))
        return sum(a * b for a, b in (s for s in expected_shapes(model).values() if len(s) == 2))

    assert matrices("mobile_quarter") == matrices("mobile") / 4


@pytest.mark.slow
def test_files_of_two_forms_are_compared(run):
    pytest.importorskip("tensorflow")
    small = ["--context=8", "--prompt=16", "--slots=64", "--steps=2", "--threads=1", "--rounds=2"]
    rows, log = run(precision_speed, "--shape=toy", "--forms=int8", *small)
    complete, less = (float(rows[f"weights, {form}"]["measured"]) for form in ("float32", "int8"))
    assert less < 0.27 * complete
    for phase in precision_speed.PHASES:
        assert float(rows[f"{phase}, int8"]["measured"]) > 0.0
        assert float(rows[f"{phase}, int8 over float32"]["measured"]) > 0.0
        assert [turn for turn, _ in log["measured"]["seconds"]["int8"][phase]] == [0, 1]


def test_forms_and_lengths_that_cannot_be_run_are_refused(run):
    with pytest.raises(DataError, match="'int7' is not one of float32, float16"):
        run(precision_speed, "--shape=toy", "--forms=int7")
    with pytest.raises(DataError, match="need 600"):
        run(precision_speed, "--shape=toy", "--prompt=600")
