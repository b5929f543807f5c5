"""Device files: every number with a source, physical, and complete."""

import json

import numpy as np
import pytest

from glm_edge.device import specs
from glm_edge.device.specs import ASSUMED, UNITS, device
from glm_edge.errors import DataError


@pytest.mark.parametrize("name", specs.names())
def test_every_number_of_a_device_has_a_status_and_a_source(name):
    phone = device(name)
    assert set(phone.numbers) == set(UNITS)
    assert all(number.status in specs.STATUSES for number in phone.numbers.values())
    assert all(number.source.strip() for number in phone.numbers.values())


def test_numbers_of_another_device_count_as_assumed():
    base, other = device("sm8550"), device("sm8650")
    assert base.numbers["limits.critical_c"].status == "published"
    assert other.numbers["limits.critical_c"].status == ASSUMED
    assert other.numbers["limits.critical_c"].source.startswith("as sm8550: ")
    assert other.numbers["cpu.power_scale"].status == ASSUMED
    assert other.numbers["dram.bandwidth_bytes_s"].status == "published"


def test_power_of_the_cpu_is_the_sum_of_its_cores():
    speed, voltage, power = device("sm8550").cpu_points()
    # X3, two A715 and two A710 at their highest points, in watts.
    assert power[-1] == pytest.approx(3.326 + 2 * 1.215 + 2 * 1.087)
    assert speed[-1] == 1.0
    assert (np.diff(power) > 0).all()
    assert (np.diff(voltage) > 0).all()


def written(tmp_path, change):
    fields = json.loads((specs.DATA / "sm8550.json").read_text())
    change(fields)
    path = tmp_path / "phone.json"
    path.write_text(json.dumps(fields))
    return path


def setter(name, **changes):
    return lambda fields: fields["numbers"][name].update(changes)


def remover(name):
    return lambda fields: fields["numbers"].pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remover("thermal.case_j_k"), r"phone.json: number 'thermal.case_j_k' is missing \(J/K\)"),
        (setter("thermal.case_j_k", value=-3.0), "is -3 J/K, outside of the physical range 0 to"),
        (setter("thermal.case_j_k", value=0.0), "is 0 J/K, outside"),
        (setter("cpu.stall_share", value=1.2), "is 1.2 of switching power, outside"),
        (setter("gpu.top_power_w", value="6"), "must be a finite number, not '6'"),
        (setter("gpu.top_power_w", value=True), "must be a finite number, not True"),
        (setter("gpu.top_power_w", status="guess"), "has status 'guess'; use measured, published"),
        (setter("gpu.top_power_w", source=" "), "'gpu.top_power_w' has no source"),
        (setter("gpu.top_power_w", unit="W"), "must have exactly value, status and source"),
        (setter("limits.cool_c", value=99.0), "limits must ascend: cool_c 99, hot_c 95"),
        (lambda f: f["numbers"].update(speed={}), "number 'speed' is unknown"),
        (lambda f: f.update(maker="x"), "unknown field 'maker'"),
        (lambda f: f.pop("cpu"), "cpu= is missing"),
        (lambda f: f["cpu"].update(cores={"cortex-x9": 1}), "cpu core 'cortex-x9' needs a count"),
        (lambda f: f.update(like="phone"), "device: 'phone' is unknown; known: a17pro"),
    ],
)
def test_a_malformed_device_is_one_clear_line(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        device(written(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_a_device_that_is_like_itself_is_refused(tmp_path):
    path = tmp_path / "phone.json"
    path.write_text(json.dumps({"like": str(path)}))
    with pytest.raises(DataError, match="refers to more than 4 files"):
        device(path)


def test_published_rows_are_complete():
    rows = specs.decode_rows()
    assert len(rows) == 44
    assert sum(row.usable for row in rows) == 29
    assert all(row.source and row.bandwidth_bytes_s > 1e10 for row in rows)
    # A row cannot move more bytes than the memory can, 10 % of doubt in assumed bits included.
    for row in rows:
        if row.usable:
            assert row.bytes_per_token * row.decode_tokens_s < 1.1 * row.bandwidth_bytes_s, row
