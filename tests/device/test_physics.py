"""Power, heat and governors against closed forms and other implementations."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from glm_edge.device import governors, power, thermal
from glm_edge.device.specs import opp_tables
from glm_edge.errors import DataError

LINKS = {(0, 1): 4.0, (1, 2): 3.6, (2, None): 3.7}
CAPACITY = np.array([0.8, 16.0, 68.0])


def test_a_step_is_the_matrix_exponential():
    network = thermal.network(LINKS, CAPACITY)
    step = thermal.discretize(network, 2.5)
    rise, heat = np.array([30.0, 12.0, 8.0]), np.array([5.0, 0.0, 0.8])
    # [T, u] with constant u: d[T, u]/dt = [[-C^-1 G, C^-1], [0, 0]] [T, u].
    joint = np.zeros((6, 6))
    joint[:3, :3] = -network.conductance_w_k / CAPACITY[:, None]
    joint[:3, 3:] = np.diag(1 / CAPACITY)
    expected = (expm(joint * 2.5) @ np.concatenate([rise, heat]))[:3]
    change = step.rise_by_rise @ rise + step.rise_by_power @ heat
    np.testing.assert_allclose(rise + change, expected, rtol=1e-12)
    lost = step.lost_by_rise @ rise + step.lost_by_power @ heat
    assert heat.sum() * 2.5 - CAPACITY @ change == pytest.approx(lost, rel=1e-12)


def test_many_steps_reach_the_steady_state():
    network = thermal.network(LINKS, CAPACITY)
    step = thermal.discretize(network, 3600.0)
    heat = np.array([3.0, 0.0, 0.8])
    rise = np.zeros(3)
    for _ in range(4):
        rise = rise + np.asarray(thermal.advance(step, jnp.asarray(rise), jnp.asarray(heat))[0])
    np.testing.assert_allclose(rise, thermal.steady_rise_k(network, heat), atol=1e-3)
    # By hand: 3.8 W through the case, 3 W through the two inner resistances.
    assert rise[2] == pytest.approx(3.8 * 3.7, abs=1e-3)
    assert rise[0] == pytest.approx(3.8 * 3.7 + 3.0 * 7.6, abs=1e-3)


def test_networks_without_a_way_out_are_refused():
    with pytest.raises(DataError, match="no path to the air"):
        thermal.network({(0, 1): 1.0, (2, None): 1.0}, CAPACITY)
    with pytest.raises(DataError, match="must be above 0"):
        thermal.network({(0, None): -1.0}, np.array([1.0]))
    with pytest.raises(DataError, match="capacities"):
        thermal.network({(0, None): 1.0}, np.array([0.0]))


def test_measured_cores_follow_c_f_v_squared():
    for core, bound in (("cortex-x3", 0.08), ("cortex-a715", 0.05), ("cortex-a710", 0.06)):
        coefficient, _, errors = power.fit_coefficient(opp_tables("sm8550")[core])
        assert np.abs(errors).max() < bound
        # The coefficients of the kernel's device tree, 1057 and 447 uW/MHz/V^2.
        expected = 1057e-12 if core == "cortex-x3" else 447e-12
        assert coefficient == pytest.approx(expected, rel=0.07)
    little = opp_tables("sm8550")["cortex-a510"]
    assert np.abs(power.fit_coefficient(little)[2]).max() > 0.2
    assert np.abs(power.fit_coefficient(little, static=True)[2]).max() < 0.16


def test_power_by_hand():
    assert power.dynamic_power_w(1000e-12, 2e9, 1.0) == pytest.approx(2.0)
    assert power.leakage_power_w(0.2, 0.5, 25.0 + 36.0, 36.0) == pytest.approx(0.1 * np.e, rel=1e-6)
    assert power.dram_energy_j(1.25e9, 4e-11) == pytest.approx(0.05)


def test_schedutil_raises_the_speed_at_eighty_percent():
    speeds = governors.schedutil(jnp.array([0.2, 0.8, 1.0]))
    np.testing.assert_allclose(speeds, [0.25, 1.0, 1.0])


def test_trips_have_hysteresis():
    rule = governors.policy(hot_c=85.0, cool_c=70.0, low_speed=0.6)
    hot, speeds = jnp.zeros(()), []
    for die_c in (80.0, 86.0, 80.0, 71.0, 69.0, 80.0):
        speed, hot = governors.trips(rule, jnp.float32(die_c), hot)
        speeds.append(float(speed))
    np.testing.assert_allclose(speeds, [1.0, 0.6, 0.6, 0.6, 1.0, 1.0])


def test_an_allocator_has_the_kernels_gains():
    control = governors.allocator(75.0, 3.5, switch_on_c=65.0, integral=1.0)
    zero, second = jnp.zeros(()), jnp.float32(1.0)
    # k_po = S / 10 K above the temperature, k_pu = 2 S / 10 K below it.
    above, _ = governors.power_budget_w(control, jnp.float32(80.0), zero, second)
    k_i = 0.07
    assert float(above) == pytest.approx(3.5 - 5 * 0.35 - 5 * k_i, rel=1e-5)
    below, integral = governors.power_budget_w(control, jnp.float32(69.0), zero, second)
    assert float(below) == pytest.approx(3.5 + 6 * 0.7, rel=1e-5)
    assert float(integral) == 0.0
    none, _ = governors.power_budget_w(governors.allocator(), jnp.float32(200.0), zero, second)
    assert np.isinf(none)


def test_a_budget_goes_to_those_that_can_use_it():
    split = governors.split_budget_w
    requested, highest = jnp.array([3.0, 1.0, 0.0]), jnp.array([2.0, 4.0, 1.0])
    granted = np.asarray(split(jnp.float32(4.0), requested, highest))
    # 3 : 1 would be 3 and 1 W; the first engine's surplus of 1 W goes to rooms of 3 and 1 W.
    np.testing.assert_allclose(granted, [2.0, 1.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(split(jnp.inf, requested, highest), highest)
    assert split(jnp.float32(20.0), requested, highest).sum() == pytest.approx(7.0)


def test_an_unknown_governor_is_refused():
    with pytest.raises(DataError, match="governor 'ondemand' is not one of performance, powersave"):
        governors.policy("ondemand")
