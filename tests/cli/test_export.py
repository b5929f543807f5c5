"""The table of `glm-edge export`."""

import dataclasses

import pytest

from glm_edge.export import Verification

pytest.importorskip("absl")


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "yes"),
        ({"tokens": 10}, "no: at least 99.00% must agree; not marked as verified: 10 of at least "),
        ({"threshold": 0.5}, "no: at least 50.00% must agree; not marked as verified: the thresh"),
        ({"turns": 1}, "no: at least 99.00% must agree; not marked as verified: the cache is too"),
        ({"agreement": 0.9}, "no: at least 99.00% must agree (scores"),
        ({"threshold": float("nan")}, "no: at least nan% must agree (scores"),
    ],
)
def test_verification_rows_say_yes_of_marked_files_alone(fields, shown):
    from glm_edge.cli.export import verification_rows

    enough = Verification(1.0, 1000, None, None, None, 0, "int8_dynamic", 0.99, 0.99, turns=3)
    found = dataclasses.replace(enough, **fields)
    summary = {"passed": found.passed, "verified": found.verified, "reason": found.reason}
    rows = dict(
        verification_rows(
            {"ran": True, "tokens_of": "random tokens", **dataclasses.asdict(found), **summary}
        )
    )
    assert rows["verified"].startswith(shown)
    assert found.verified == (shown == "yes")
