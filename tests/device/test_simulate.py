"""The simulated phone: conservation, deadlines, preemption, batches, and its shutdown."""

import dataclasses

import jax
import numpy as np
import pytest

from glm_edge.device import governors
from glm_edge.device.machine import machine, stacked, variations
from glm_edge.device.schedule import (
    Placement,
    Task,
    arrays_of,
    choose_engine,
    decoding,
    placement_score,
)
from glm_edge.device.sensors import Sensor, downrate, fit_sensor
from glm_edge.device.simulate import simulate
from glm_edge.device.specs import device
from glm_edge.device.ticks import BASE, LOST, run
from glm_edge.device.workload import Work
from glm_edge.errors import DataError

DECODE = Task("decode", "gpu", 6e9, 1.25e9, 3e-3)
FRAME = Task("frame", "gpu", 4e9, 0.04e9, 1e-3, priority=10.0, period_s=1 / 60)
FAST = governors.policy("performance")


@pytest.fixture(scope="module")
def phone():
    return machine(device("sm8550"))


def simulated(phone, tasks, policy=FAST, seconds=4.0):
    return simulate(phone, policy, tasks, seconds)


def test_heat_is_conserved_in_float32(phone):
    state = simulated(phone, [DECODE, FRAME]).state
    totals = np.asarray(state.totals, float)
    stored = (phone.capacity_j_k * np.asarray(state.rise_k, float)).sum()
    assert totals[: BASE + 1].sum() == pytest.approx(stored + totals[LOST], rel=1e-5)


def test_a_task_alone_runs_at_its_roofline(phone):
    result = simulated(phone, [DECODE, dataclasses.replace(FRAME, start_s=1e9)])
    # Bandwidth 0.565 of 67.2 GB/s is the slower roof.
    token_s = 1.25e9 / (0.565 * 67.2e9) + 3e-3
    assert result.results_s("decode") == pytest.approx(1 / token_s, rel=1e-4)
    assert float(result.state.done[0]) == int(result.seconds / token_s)


@pytest.mark.parametrize(
    ("task", "least", "most"),
    [
        (DECODE, 0.5, 0.6),
        (
            dataclasses.replace(
                DECODE, ops=6e9 / 28, bytes=1.25e9 / 28, fixed_s=3e-3 / 28, parts=28
            ),
            0.0,
            0.0,
        ),
        (dataclasses.replace(DECODE, engine="npu"), 0.0, 0.0),
    ],
)
def test_frames_are_dropped_behind_tokens_but_not_behind_layers(phone, task, least, most):
    result = simulated(phone, [task, FRAME])
    assert least <= result.late_share("frame") <= most
    alone = 1 / (1.25e9 / (0.565 * 67.2e9) + 3e-3)
    assert result.results_s("decode") > 0.8 * alone


def test_a_policy_alone_and_in_a_batch_agree(phone):
    tasks = arrays_of([DECODE, FRAME])
    limits = [
        governors.policy(die=governors.allocator(control, 3.0)) for control in (28.0, 32.0, 90.0)
    ]
    policies = jax.tree.map(lambda *values: np.stack(values), *limits)

    def final(policy):
        return run(phone, policy, tasks, steps=20, ticks=200, every=50)[0]

    batch = jax.vmap(final)(policies)
    alone = final(limits[1])
    np.testing.assert_array_equal(batch.done[1], alone.done)
    np.testing.assert_allclose(batch.totals[1], alone.totals, rtol=1e-5)
    # Under a lower limit the GPU draws less, and its die stays cooler.
    assert batch.totals[0, 1] < batch.totals[2, 1]
    assert batch.peak_c[0] < batch.peak_c[2]


def test_phones_of_a_batch_differ(phone):
    draws = variations(device("sm8550"), 2, seed=3)
    phones = stacked([phone, *(machine(device("sm8550"), values) for values in draws)])
    tasks = arrays_of([DECODE, FRAME])
    states = jax.vmap(lambda m: run(m, FAST, tasks, steps=20, ticks=200, every=50)[0])(phones)
    assert len(set(np.asarray(states.totals[:, 1]).tolist())) == 3
    assert draws == variations(device("sm8550"), 2, seed=3)
    # Published and measured numbers stay.
    assert "dram.bandwidth_bytes_s" not in draws[0]
    assert 0.7 <= draws[0]["gpu.top_power_w"] / 6.0 <= 1.3


def test_runaway_ends_at_the_critical_trip_and_is_reported(phone):
    # Leakage that grows e-fold per 4 K gains more power than the case can lose.
    values = {"gpu.leakage_w_v": 8.0, "thermal.leakage_fold_k": 4.0}
    hot = machine(device("sm8550"), values)
    result = simulated(hot, [DECODE, FRAME], governors.policy("performance", critical_c=80.0))
    assert result.stopped_s is not None
    assert 0 < result.stopped_s < 3.0
    assert f"stopped after {result.stopped_s:.1f} s at the critical trip" in str(result)
    assert np.isfinite(np.asarray(result.state.totals)).all()
    assert np.asarray(result.trace.power_w)[-1] == 0.0
    assert np.asarray(result.trace.units_s)[-1].sum() == 0.0
    assert simulated(phone, [DECODE, FRAME]).stopped_s is None


def test_schedutil_saves_energy_at_low_load(phone):
    burst = Task("burst", "cpu", 0.35e9, period_s=0.005)
    energy = {}
    for governor in ("performance", "schedutil", "powersave"):
        result = simulated(phone, [burst], governors.policy(governor))
        energy[governor] = float(result.state.totals[0])
    assert energy["powersave"] <= energy["schedutil"] < 0.6 * energy["performance"]


def test_tasks_that_can_never_meet_their_deadlines_are_refused(phone):
    slow = dataclasses.replace(FRAME, ops=60e9)
    with pytest.raises(DataError, match=r"task 'frame': needs 31 ms at the top speed of the gpu, "):
        simulated(phone, [DECODE, slow])
    half = dataclasses.replace(FRAME, ops=20e9)
    other = dataclasses.replace(half, name="other")
    with pytest.raises(DataError, match="tasks frame, other: need 132 % of the gpu's time"):
        simulated(phone, [half, other])
    # On two engines they fit.
    simulated(phone, [half, dataclasses.replace(other, engine="npu", ops=8e9)])


def test_units_shorter_than_a_step_are_refused(phone):
    with pytest.raises(DataError, match=r"takes 0.05 ms, less than a step of 1 ms; raise steps= "):
        simulated(phone, [Task("tiny", "gpu", 1e8)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tpu"}, "engine 'tpu' is not one of cpu, gpu, npu"),
        ({"ops": -1.0}, "must be finite and not negative"),
        ({"ops": 0.0, "bytes": 0.0, "fixed_s": 0.0}, "a unit must have"),
        ({"units": 0}, "must be at least 1"),
    ],
)
def test_malformed_tasks_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(FRAME, **changes)


def test_decoding_splits_a_token_into_its_layers():
    work = Work(ops=2800, weight_bytes=280, cache_bytes=0, layers=28)
    task = decoding(work, "cpu", preempt="layer", layer_s=1e-3)
    assert (task.ops, task.bytes, task.fixed_s, task.parts) == (100, 10, 1e-3, 28)
    assert decoding(work, "cpu", layer_s=1e-3).fixed_s == pytest.approx(28e-3)
    with pytest.raises(DataError, match="preempt 'never' is not one of token, layer"):
        decoding(work, "cpu", preempt="never")
    with pytest.raises(DataError, match="at least one task"):
        arrays_of([])


def test_placement_scores_are_capped():
    large = Placement("cpu", 0.04, 0.4, cpu_ratio=0.2, memory_ratio=50.0)
    fitting = Placement("npu", 0.02, 0.1, cpu_ratio=1.0, memory_ratio=1.0)
    assert placement_score(0.5, 0.5) == pytest.approx(0.5)
    # Without a cap, spare memory outweighs missing compute.
    assert choose_engine([large, fitting], "published_score").engine == "cpu"
    for rule in ("score", "energy", "latency"):
        assert choose_engine([large, fitting], rule).engine == "npu"
    with pytest.raises(DataError, match="'best' is not one of"):
        choose_engine([fitting], "best")
    with pytest.raises(DataError, match="no engine"):
        choose_engine([])


def test_sensors_are_linear_in_their_rate():
    sensor = fit_sensor((100.0, 85.0), (10.0, 12.0))
    assert sensor == Sensor(pytest.approx(12 - 10 * 73 / 90), pytest.approx(73 / 90))
    assert sensor.mean_power_w(0.25, load=0.1) == pytest.approx(0.25 * 85 + 0.75 * 12)
    assert sensor.mean_power_w(0.25, load=0.5) == pytest.approx(85)
    assert (downrate(0.1, False), downrate(0.1, True), downrate(0.5, False)) == (10, 100, 100)
    with pytest.raises(DataError, match="must differ"):
        fit_sensor((10.0, 1.0), (10.0, 2.0))
    with pytest.raises(DataError, match="negative"):
        fit_sensor((10.0, 1.0), (100.0, 50.0))
