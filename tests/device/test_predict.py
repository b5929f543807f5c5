"""Predictions in one call: their limits, their intervals, and refusals."""

import dataclasses

import numpy as np
import pytest

import glm_edge as ge
from glm_edge.compress.allocate.knapsack import format_everything
from glm_edge.configs import preset
from glm_edge.device import PredictOptions, predict, roofline, workload
from glm_edge.device.specs import Number, decode_rows, device
from glm_edge.errors import ConfigError, DataError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format

DRAWS = 8
FEW = PredictOptions(draws=DRAWS)


@pytest.fixture(scope="module")
def nine_billion():
    config = preset("phone_9b")
    params = workload.abstract_params(config)
    formats = format_everything(params, Format.parse("int4-g32"), Format("int8"))
    return MultimodalGLM(config), params, formats


def test_a_model_that_fits_is_read_from_memory(nine_billion):
    model, params, formats = nine_billion
    phone = with_value(device("sm8650"), "dram.capacity_bytes", 64 * 2**30)
    answer = predict(model, params, phone, 512, formats=formats, images=1, options=FEW)
    sizes = workload.bytes_by_path(params, formats)
    token = workload.total(workload.decode_ops(model.config, sizes, 512))
    rows = [row for row in decode_rows() if row.usable]
    fitted = roofline.fit_efficiency(rows)
    expected = roofline.decode_tokens_s(phone, token, fitted, "cpu", "LiteRT-LM")
    assert answer.tokens_s.value == pytest.approx(expected, rel=1e-5)
    assert answer.limit == "bandwidth"
    # 9.4e9 weights of 4.5 bits, the cache of 512 tokens, and the encoders.
    assert answer.peak_bytes.value == pytest.approx(5.98e9 + 512 * 81_920, rel=0.1)
    for _, _, interval in answer.rows():
        assert interval.low <= interval.high
    assert answer.tokens_s.low < answer.tokens_s.value < answer.tokens_s.high
    assert answer.later_tokens_s.value <= answer.tokens_s.value * 1.001
    # Joules per second of the phone, from both answers.
    mean_w = answer.battery_percent_h.value / 100 * phone.values["battery.energy_j"] / 3600
    mean_tokens_s = answer.trace_tokens_s[0].mean()
    assert answer.token_j.value * mean_tokens_s == pytest.approx(mean_w, rel=1e-3)
    text = str(answer)
    assert "simulated, not measured" in text
    assert "5 %" in text
    assert "29 published rows" in text
    assert f"0 of the {DRAWS} phones read weights from storage" in text


def test_a_model_that_does_not_fit_is_read_from_storage(nine_billion):
    model, params, formats = nine_billion
    answer = predict(model, params, "sm8650", 512, options=FEW)
    assert answer.limit == "storage"
    # 18.7 GB in bfloat16 of which a third stays: about 12 GB at 3.9 GB/s per token.
    assert 0.2 < answer.tokens_s.value < 0.5
    small = with_value(device("sm8650"), "dram.capacity_bytes", 1e9)
    streamed = predict(model, params, small, 512, formats=formats, options=FEW)
    # A token reads 4.98 GB, of which at most a fifth stays in 0.5 GB beside the cache.
    assert f"{DRAWS} of the {DRAWS} phones read weights from storage" in str(streamed)
    assert 3.9e9 / 4.98e9 < streamed.tokens_s.value < 3.9e9 / (0.8 * 4.98e9)


def test_heat_slows_a_hot_day(nine_billion):
    model, params, formats = nine_billion
    phone = with_value(device("sm8650"), "dram.capacity_bytes", 64 * 2**30)
    hot = predict(
        model, params, phone, 512, formats=formats, options=dataclasses.replace(FEW, ambient_c=38.0)
    )
    assert hot.later_tokens_s.value < 0.95 * hot.tokens_s.value
    assert hot.later_limit == "skin"
    assert hot.skin_c.value > 42.0


def with_value(phone, name, value):
    numbers = {**phone.numbers, name: Number(float(value), "assumed", "a test")}
    return dataclasses.replace(phone, numbers=numbers)


def test_the_facade_has_it_and_draws_a_figure(tmp_path, nine_billion):
    pytest.importorskip("matplotlib")
    model, params, formats = nine_billion
    answer = ge.device.predict(model, params, context=512, formats=formats, options=FEW)
    path = tmp_path / "phone.png"
    answer.figure(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert answer.trace_tokens_s.shape == (DRAWS + 1, 120)
    assert predict(model, params, formats=formats, options=FEW).context == 1024
    repeated = ge.device.predict(model, params, context=512, formats=formats, options=FEW)
    np.testing.assert_array_equal(answer.trace_skin_c, repeated.trace_skin_c)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"engine": "tpu"}, DataError, "engine 'tpu' is not one of cpu, gpu, npu"),
        ({"device": "phone"}, DataError, "device: 'phone' is unknown"),
        ({"options": PredictOptions(draws=3)}, DataError, "draws=3 is too few"),
        ({"context": 10**7}, DataError, "context 10000000 must be in 1.."),
    ],
)
def test_wrong_arguments_are_refused(nine_billion, arguments, error, message):
    with pytest.raises(error, match=message):
        predict(*nine_billion[:2], **arguments)
    with pytest.raises(ConfigError, match="must be a GLM, not object"):
        predict(object(), {})
