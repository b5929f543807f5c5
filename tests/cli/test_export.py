"""The table of `glm-edge export`."""

import dataclasses

import pytest

from glm_edge.export import Verification

pytest.importorskip("absl")


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "yes"),
        ({"tokens": 10}, "no: threshold 99.00%; not marked as verified: only 10 of at least "),
        ({"threshold": 0.5}, "no: threshold 50.00%; not marked as verified: the default thresh"),
        ({"turns": 1}, "no: threshold 99.00%; not marked as verified: the cache fits 1 turns"),
        ({"agreement": 0.9}, "no: threshold 99.00% (rounding"),
        ({"threshold": float("nan")}, "no: threshold nan% (rounding"),
    ],
)
def test_verification_rows_say_yes_of_marked_files_alone(fields, shown):
    from glm_edge.cli.export import verification_rows

    enough = Verification(1.0, 1000, None, None, None, 0, "int8_dynamic", 0.99, 0.99, turns=3)
    result = dataclasses.replace(enough, **fields)
    summary = {"passed": result.passed, "verified": result.verified, "reason": result.reason}
    rows = dict(
        verification_rows(
            {"ran": True, "tokens_of": "random tokens", **dataclasses.asdict(result), **summary}
        )
    )
    assert rows["verified"].startswith(shown)
    assert result.verified == (shown == "yes")
