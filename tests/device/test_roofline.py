"""Fits of published speeds against scipy, and times by hand."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import least_squares

from glm_edge.device import roofline
from glm_edge.device.specs import decode_rows, device
from glm_edge.device.workload import Op, Work
from glm_edge.errors import DataError

ROWS = tuple(row for row in decode_rows() if row.usable)


def test_the_fit_is_that_of_scipy():
    classes = sorted({row.runtime_engine for row in ROWS})
    member = np.array([classes.index(row.runtime_engine) for row in ROWS])
    ideal = np.array([row.bytes_per_token / row.bandwidth_bytes_s for row in ROWS])
    layers = np.array([row.layers for row in ROWS])
    published = np.array([row.decode_tokens_s for row in ROWS])

    def residuals(x):
        token_s = ideal / np.exp(x[0] + x[2:][member]) + layers * np.exp(x[1])
        return np.concatenate([np.log(token_s * published), 0.35 * x[2:]])

    start = np.concatenate([np.log([0.5, 1e-4]), np.zeros(len(classes))])
    expected = least_squares(residuals, start, xtol=1e-14, ftol=1e-14, gtol=1e-14).x
    fitted = roofline.fit_efficiency(ROWS)
    assert fitted.mean_share == pytest.approx(np.exp(expected[0]), rel=1e-4)
    assert fitted.layer_s == pytest.approx(np.exp(expected[1]), rel=1e-4)
    shares = [fitted.shares[name] for name in classes]
    np.testing.assert_allclose(shares, np.exp(expected[0] + expected[2:]), rtol=1e-4)


def test_phones_are_predicted_from_others():
    errors = roofline.log_errors_by_chip(ROWS)
    relative = np.abs(np.expm1(np.concatenate(list(errors.values()))))
    assert len(relative) == len(ROWS)
    assert np.median(relative) < 0.22
    # The rows of a phone are not used: changing them all does not change its prediction.
    faster = [
        dataclasses.replace(row, decode_tokens_s=2 * row.decode_tokens_s)
        if row.chip == "a19pro"
        else row
        for row in ROWS
    ]
    changed = roofline.log_errors_by_chip(faster)["a19pro"]
    np.testing.assert_allclose(changed, errors["a19pro"] - np.log(2), atol=1e-9)
    with pytest.raises(DataError, match="at least two chips"):
        roofline.log_errors_by_chip([row for row in ROWS if row.chip == "a19pro"])
    with pytest.raises(DataError, match="at least one row"):
        roofline.fit_efficiency([])


def test_rates_of_prompts_come_from_the_most_similar_rows():
    same = roofline.prefill_rate(ROWS, "sm8650", "LiteRT-LM", "cpu")
    # Gemma3-1B: 243.24 tokens per second of 0.70 B parameters.
    assert same.ops_s == pytest.approx(2 * 0.70e9 * 243.24)
    assert same.basis == "1 row: LiteRT-LM on sm8650"
    other = roofline.prefill_rate(ROWS, "sm8450", "LiteRT-LM", "cpu")
    assert other.basis == "1 row: LiteRT-LM on other chips"
    unknown = roofline.prefill_rate(ROWS, "sm8450", None, "npu")
    assert unknown.basis.endswith("all runtimes of the npu")
    with pytest.raises(DataError, match="no published prompt speed of the 'tpu'"):
        roofline.prefill_rate(ROWS, "sm8450", None, "tpu")


def test_the_slower_of_products_and_memory_counts():
    ops = [Op("compute", 8_000, 10), Op("memory", 8, 1_000, 200, layers=2)]
    seconds = roofline.op_time_s(ops, 1_000.0, 100.0, layer_s=0.5)
    np.testing.assert_allclose(seconds, [8.0, 12.0 + 1.0])
    # A slower clock does not slow memory.
    slower = roofline.op_time_s(ops, 1_000.0, 100.0, layer_s=0.5, speed=0.5)
    np.testing.assert_allclose(slower, [16.0, 12.0 + 2.0])


def test_speed_of_a_model_by_hand():
    fitted = roofline.Efficiency(0.5, {("LiteRT-LM", "cpu"): 0.4}, 1e-4, 1)
    work = Work(ops=1, weight_bytes=10**9, cache_bytes=0, layers=20)
    speed = roofline.decode_tokens_s(device("sm8650"), work, fitted, "cpu", "LiteRT-LM")
    assert speed == pytest.approx(1 / (1 / (0.4 * 76.8) + 2e-3), rel=1e-5)
    unknown = roofline.decode_tokens_s(device("sm8650"), work, fitted, "npu", "LiteRT-LM")
    assert unknown == pytest.approx(1 / (1 / (0.5 * 76.8) + 2e-3), rel=1e-5)
