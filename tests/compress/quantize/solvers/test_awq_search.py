"""The searches of AWQ against loops over rows in float64."""

import ml_dtypes
import numpy as np
import pytest

from glm_edge.compress.quantize.solvers import awq_search as awq
from glm_edge.params import Format
from tests.marks import slow_unless


def round_loop(weight, bits, group):
    """Symmetric rounding to nearest; scales of groups are stored in bfloat16."""
    high, out = 2 ** (bits - 1) - 1, np.zeros(weight.shape)
    for start in range(0, weight.shape[1], group or weight.shape[1]):
        part = weight[:, start : start + (group or weight.shape[1])]
        scale = (np.abs(part).max(axis=1, keepdims=True) / high).astype(np.float32)
        scale = np.float64(scale.astype(ml_dtypes.bfloat16)) if group else np.float64(scale)
        scale = np.where(scale == 0, 1.0, scale)
        codes = np.clip(np.round(part / scale), -high - 1, high)
        out[:, start : start + part.shape[1]] = codes * scale
    return out


def data(seed, rows=64, columns=16, outs=(6, 10)):
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 1.5, columns))
    x = rng.normal(size=(rows, columns)) * spread
    return x, [rng.standard_t(4, (out, columns)) for out in outs]


def gram(x):
    return np.float32(x.T @ x / len(x))


BLOCKS = [(1, 1, 16), (2, 2, 4), (1, 2, 8)]
KINDS = [(4, None), (4, 8), (3, None), (8, 4)]


@pytest.mark.parametrize(
    ("bits", "group", "blocks"),
    # Other widths run the same code.
    slow_unless(
        lambda case: case[0] == 4 and (case[1] or case[2] == (2, 2, 4)),
        ((*kind, blocks) for kind in KINDS for blocks in BLOCKS),
    ),
)
def test_factor_matches_a_loop(bits, group, blocks):
    x, weights = data(bits)
    count, repeats, width = blocks
    magnitude = np.zeros(count * width)
    for head in range(count):
        for channel in range(width):
            columns = [width * (repeats * head + r) + channel for r in range(repeats)]
            magnitude[width * head + channel] = np.abs(x[:, columns]).mean()
    errors, factors = [], []
    for step in range(20):
        power = np.maximum(magnitude ** (step / 20), 1e-4)
        factor = power / np.sqrt(power.max() * power.min())
        columns = np.broadcast_to(factor.reshape(count, 1, width), blocks).ravel()
        lost = [round_loop(w * columns, bits, group) @ (x / columns).T - w @ x.T for w in weights]
        errors.append(sum((part**2).sum() for part in lost) / len(x))
        factors.append(factor)
    format = Format(f"int{bits}", group, scale_dtype="bfloat16" if group else "float32")
    result, found_errors = awq.search_factor(
        tuple(np.float32(w) for w in weights),
        gram(x),
        np.float32(np.abs(x).mean(axis=0)),
        (format, format),
        blocks,
    )
    np.testing.assert_allclose(found_errors, errors, rtol=2e-2)
    best = int(np.argmin(found_errors))
    assert errors[best] <= min(errors) * 1.02
    np.testing.assert_allclose(result, factors[best], rtol=1e-5)
    assert errors[best] < 0.98 * errors[0] or bits == 8


@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 8), (2, None), (3, 4)])
def test_clip_matches_a_loop(bits, group):
    x, (weight, _) = data(bits, columns=16)
    size = group or 16
    format = Format(f"int{bits}", group, scale_dtype="bfloat16" if group else "float32")
    result = np.float64(awq.search_clip(np.float32(weight), gram(x), format))
    fractions = 1 - np.arange(16 if bits < 4 else 10) / 20
    worse = 0
    for start in range(0, 16, size):
        part, inputs = weight[:, start : start + size], x[:, start : start + size]
        candidates = []
        for fraction in fractions:
            limit = fraction * np.abs(part).max(axis=1, keepdims=True)
            clipped = np.clip(part, -limit, limit)
            lost = (round_loop(clipped, bits, group and size) - part) @ inputs.T
            candidates.append((lost**2).sum(axis=1))
        candidates = np.stack(candidates)
        chosen = np.abs(result[:, start : start + size]).max(axis=1) / np.abs(part).max(axis=1)
        index = np.abs(fractions[:, None] - chosen).argmin(axis=0)
        np.testing.assert_allclose(chosen, fractions[index], atol=1e-5)
        reached = candidates[index, np.arange(len(index))]
        worse += (reached > 1.02 * candidates.min(axis=0)).sum()
    assert worse == 0


def test_clip_of_one_scale_for_the_matrix():
    x, (weight, _) = data(0)
    weight[0, 0] = 8.0
    format = Format("int4", "tensor")
    result = np.asarray(awq.search_clip(np.float32(weight), gram(x), format))
    limit = np.abs(result).max()
    np.testing.assert_allclose(result, np.clip(weight, -limit, limit), rtol=1e-6)
    assert limit < np.abs(weight).max()


def test_channels_without_input_keep_their_factor():
    magnitude = np.float32([0.0, 4.0, 1.0])
    np.testing.assert_allclose(awq.factor_of(magnitude, 0.5), [1.0, 2**0.5, 0.5**0.5], rtol=1e-6)
    np.testing.assert_array_equal(awq.factor_of(np.zeros(3, np.float32), 0.5), 1.0)
