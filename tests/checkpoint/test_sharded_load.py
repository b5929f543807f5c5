"""What `eight_devices.py` measures in one process of 8 simulated devices."""

import jax
import numpy as np
import pytest

import glm_edge as ge
from glm_edge.checkpoint.placement import Destination
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.errors import ConfigError

# Sums of up to 256 float32 products, in another order.
TOLERANCE = 1e-5
MESHES = [0, 1]
MODELS = ["text", "images", "quantized"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_sharded_logits_equal_those_of_one_device(eight_devices, model, mesh):
    result = eight_devices[model][mesh]
    assert result["error"] < TOLERANCE
    assert "'model'" in result["spec"]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_cached_generation_gives_the_same_tokens(eight_devices, model):
    one, eight = eight_devices[model][0]["tokens"]
    assert one == eight
    assert len({tuple(row) for row in one}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_a_device_holds_a_part_of_each_matrix(eight_devices, model, mesh):
    result = eight_devices[model][mesh]
    part = 1 / result["mesh"][1]
    shares = result["shares"]
    suffix = ".data" if model == "quantized" else ""
    for name in ("attention/q_proj", "mlp/gate_up_proj"):
        assert shares[f"decoder/layers/0/{name}/weight{suffix}"] == part
    assert shares[f"embed/weight{suffix}"] == part


@pytest.mark.slow
def test_key_value_heads_stay_whole(eight_devices):
    path = "decoder/layers/0/attention/k_proj/weight"
    assert [result["shares"][path] for result in eight_devices["text"]] == [1 / 4, 1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_columns_are_cut_only_where_groups_stay_whole(eight_devices, mesh):
    result = eight_devices["quantized"][mesh]
    eight_groups, two_groups = "mlp/down_proj/weight", "attention/o_proj/weight"
    for field in ("data", "scale"):
        share = result["shares"][f"decoder/layers/0/{eight_groups}.{field}"]
        assert share == 1 / result["mesh"][1]
        assert result["shares"][f"decoder/layers/0/{two_groups}.{field}"] == 1


@pytest.mark.slow
def test_fully_sharded_gradients_equal_one_device(eight_devices):
    """Gradients of a fully sharded step equal those of one device."""
    result = eight_devices["gradients"]
    np.testing.assert_allclose(*result["loss"], rtol=TOLERANCE)
    assert result["error"] < TOLERANCE
    assert result["share"] == 1 / 8


@pytest.mark.slow
def test_orbax_arrays_are_spread_unchanged(eight_devices):
    assert eight_devices["orbax"]
    assert all(eight_devices["orbax"])


class RowsOfOneProcess:
    """A sharding whose devices here hold rows 4 to 8 of an array of 12."""

    def addressable_devices_indices_map(self, shape):
        complete = slice(None)
        return {0: (slice(4, 6), complete), 1: (slice(6, 8), complete)}


def test_a_process_reads_no_rows_but_its_own(tmp_path):
    array = np.arange(36, dtype=np.float32).reshape(12, 3)
    write_safetensors(tmp_path / "model.safetensors", {"weight": array})
    file = SafetensorsFile(tmp_path / "model.safetensors")
    destination = Destination((12, 3), RowsOfOneProcess())
    assert destination.rows == (4, 8)
    np.testing.assert_array_equal(destination.read(file, "weight"), array[4:8])


@pytest.mark.parametrize("original", [slice(0, 12), slice(4, 8)])
def test_rows_land_where_they_belong(monkeypatch, original):
    array = np.arange(36, dtype=np.float32).reshape(12, 3)
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, sharding, part: [part((slice(6, 8), slice(None)))],
    )
    (part,) = Destination((12, 3), RowsOfOneProcess()).put(array[original])
    np.testing.assert_array_equal(part, array[6:8])


def test_a_mesh_whose_axes_no_rule_names_is_refused():
    mesh = jax.make_mesh((1,), ("x",))
    with pytest.raises(ConfigError, match=r"mesh with axes \('x',\): .*'data', 'model'"):
        ge.load(ge.shipped(), mesh=mesh)


def test_a_mesh_of_one_device_holds_the_same_parameters():
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    _, expected = ge.load(ge.shipped())
    _, params = ge.load(ge.shipped(), mesh=mesh)
    for (path, array), (_, same) in zip(
        ge.params.path_items(expected), ge.params.path_items(params), strict=True
    ):
        np.testing.assert_array_equal(array, same, err_msg=path)
        assert same.sharding.mesh.axis_names == ("data", "model")
