"""Half-quadratic quantization as a transform."""

import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import recipe_from_json, to_json
from glm_edge.compress.quantize.hqq import hqq
from glm_edge.compress.quantize.solvers import hqq_solver as solver
from glm_edge.errors import RecipeError
from glm_edge.params import Format


def weight(rows=16, columns=64):
    return jnp.asarray(np.random.default_rng(0).standard_t(4, (rows, columns)), jnp.float32)


def test_boxes_hold_what_the_solver_finds():
    _, params, report = hqq("int3-g16-affine-zero=float16")(None, {"weight": weight()})
    box = params["weight"]
    codes, stored = solver.solve(weight(), Format("int3", 16, False, "bfloat16", "float16"))
    np.testing.assert_array_equal(box.codes(), codes)
    np.testing.assert_array_equal(box.zero, stored.zero)
    assert box.zero.dtype == jnp.float16
    lost = np.linalg.norm(box.unbox() - np.asarray(weight())) / np.linalg.norm(weight())
    assert report.rows[0].relative_error == pytest.approx(lost, rel=1e-4)
    assert report.rows[0].action == "int3-g16-affine-zero=float16"


@pytest.mark.parametrize("format", ["int4-g16", "nf4-g16"])
def test_symmetric_grids_have_no_zero_point(format):
    transform = hqq(format)
    assert recipe_from_json(to_json(transform)) == transform
    _, params, _ = transform(None, {"weight": weight()})
    assert params["weight"].zero is None


def test_zeros_of_a_mask_need_a_grid_that_holds_them():
    keep = np.random.default_rng(0).random((16, 64)) < 0.5
    masked = {"weight": boxes.mask(weight(), jnp.asarray(keep))}
    _, params, _ = hqq("int4-g16-affine")(None, masked)
    assert not np.any(np.asarray(params["weight"].unbox())[~keep] != 0)
    with pytest.raises(RecipeError, match="cannot represent the zeros"):
        hqq("int4-g16-affine-zero=float16")(None, masked)


def test_what_has_no_meaning_is_refused():
    for options in (
        {"exponent": 0.0},
        {"exponent": 1.5},
        {"steps": 0},
        {"format": "float16"},
        {"format": "int4-affine-zero=int4"},
    ):
        with pytest.raises(RecipeError, match=r"quantize\.hqq"):
            hqq(**options)
    with pytest.raises(RecipeError, match="NaN or infinity"):
        hqq("int4-g16-affine-zero=float16")(None, {"weight": weight() * np.float32(np.nan)})
    with pytest.raises(RecipeError, match="do not divide into groups of 24"):
        hqq("int4-g24-affine-zero=float16")(None, {"weight": weight()})
