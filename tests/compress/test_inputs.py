"""What the processor gives as calibration: images of any size and number, videos, recordings."""

import jax
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches, prune, quantize
from glm_edge.compress.layerwise import stages
from glm_edge.errors import DataError
from glm_edge.models.multimodal import audio_features, feature_counts
from glm_edge.preprocess import Inputs


def prompt(model, images_of_rows, seed=0):
    """`Inputs` of rows that show images of these sizes, padded on the left."""
    config, rng = model.config, np.random.default_rng(seed)
    shown, written = [], []
    for sizes in images_of_rows:
        images = [rng.normal(size=(*size, 3)).astype(np.float32) for size in sizes]
        row = [int(rng.integers(10, 48))]
        for count in feature_counts(images, config.vision):
            row += [config.image_token_id] * count + [int(rng.integers(10, 48))]
        shown += images
        written.append(row)
    length = max(map(len, written))
    tokens = np.zeros((len(written), length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for index, row in enumerate(written):
        tokens[index, length - len(row) :] = row
        valid[index, length - len(row) :] = True
    return Inputs(tokens, valid=valid, images=shown or None)


# Rows with two images of different size, with none, and with one.
SHOWN = [[(16, 8), (8, 8)], [], [(8, 8)]]
APPLY = jax.jit(batches.apply_batch, static_argnums=0)


def test_rows_of_images_reach_the_layers_as_in_the_model(make_member):
    model, params = make_member("ocr")
    original = [prompt(model, SHOWN)]
    states = stages.first_states(model, original)
    leaves = dict(boxes.path_items(params))
    for stage in stages.stages(model):
        local = {p: x for p, x in leaves.items() if stage.holds(p) or p in stage.borrows}
        if stage.name == "vision/layers/0":
            actual = stage.collect(local, states, stages.ROWS)
            patches = 4 * 2 + 2 * (2 * 2)
            assert {len(rows) for rows in actual.values()} == {patches}
        if stage.name == "decoder/layers/1":
            actual = stage.collect(local, states, stages.MARKED_ROWS)
            valid = sum(int(inputs.valid.sum()) for inputs in original)
            assert {int(value["valid"].sum()) for value in actual.values()} == {valid}
        states = stage.run(local, states)
    for inputs, state in zip(original, states, strict=True):
        batch = batches.to_device(model, inputs)
        valid = np.asarray(batch["valid"])
        actual, expected = np.asarray(state["x"]), np.asarray(APPLY(model, params, batch))
        np.testing.assert_allclose(actual[valid], expected[valid], rtol=1e-3, atol=1e-3)


def test_inputs_calibrate_as_they_are(make_member):
    model, params = make_member("ocr")
    original = [prompt(model, SHOWN)]
    transform = prune.mask(0.5, score="wanda", where="decoder/layers/0/mlp/down_proj|vision/merge")
    _, small, report = transform(model, params, original)
    assert len(report.rows) == 2
    assert not any("by magnitude" in row.action for row in report.rows)
    wide = [
        {"tokens": np.pad(x.tokens, ((0, 0), (0, 3))), "images": x.images}
        | {"valid": np.pad(x.valid, ((0, 0), (0, 3)))}
        for x in original
    ]
    _, again, _ = transform(model, params, wide)
    jax.tree.map(np.testing.assert_array_equal, small, again)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taylor", "encoders"])
def test_scores_take_rows_with_their_own_images(make_member, name):
    """A row scores the same beside others as alone."""
    model, params = make_member("ocr")
    shown = [[(8, 8)], [(16, 8), (8, 8)]]
    together = prompt(model, shown)
    batch = batches.to_device(model, together)
    rows = batches.single_rows(model, batch)
    assert [len(row["images"]) for row in rows] == [1, 2]
    if name == "taylor":
        scores = {
            kind: prune.scores_of(model, params, "taylor", where="layers/0/mlp", calibration=data)
            for kind, data in (("together", [together]), ("alone", [_plain(row) for row in rows]))
        }
        for path, result in scores["together"].items():
            np.testing.assert_allclose(result, scores["alone"][path], rtol=1e-3, atol=1e-6)
        return
    result = prune.encoders(heads=0.5, neurons=0.0)(model, params, [together])
    alone = prune.encoders(heads=0.5, neurons=0.0)(model, params, [_plain(row) for row in rows])
    jax.tree.map(np.testing.assert_array_equal, result[1], alone[1])


def _plain(row):
    return {name: value for name, value in row.items() if name != "positions"}


@pytest.mark.slow
def test_videos_and_stills_of_one_row_calibrate(make_member):
    model, params = make_member("ocr")
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(16, 8, 3))]
    images = [image.astype(np.float32) for image in images]
    counts = feature_counts(images, model.config.vision)
    tokens = np.asarray([[11, *[model.config.image_token_id] * sum(counts), 12]])
    _, _, report = quantize.gptq("int4", where="down_proj")(
        model, params, [{"tokens": tokens, "images": images}]
    )
    assert not any("looked up" in row.action for row in report.rows)


@pytest.mark.slow
def test_recordings_count_where_they_sound(make_member):
    model, params = make_member("asr")
    config = model.config
    rng = np.random.default_rng(0)
    frames = np.asarray([16, 16, 8], np.int32)
    audio = rng.normal(size=(3, 16, 8)).astype(np.float32)
    counts = audio_features(frames, config.speech.merge_size)
    tokens = np.full((2, 8), 11, np.int32)
    tokens[0, 1 : 1 + int(counts[:2].sum())] = config.audio_token_id
    tokens[1, 1 : 1 + int(counts[2])] = config.audio_token_id
    batch = {"tokens": tokens, "audio": audio, "audio_frames": frames}
    leaves = dict(boxes.path_items(params))
    states = stages.first_states(model, [batch])
    for stage in stages.stages(model):
        local = {p: x for p, x in leaves.items() if stage.holds(p) or p in stage.borrows}
        if stage.name == "speech/end":
            actual = stage.collect(local, states, stages.MARKED_ROWS)
            assert {int(v["valid"].sum()) for v in actual.values()} == {int(counts.sum())}
        states = stage.run(local, states)
    expected = APPLY(model, params, batches.to_device(model, batch))
    np.testing.assert_allclose(states[0]["x"], expected, rtol=1e-3, atol=1e-3)


def changed(model, **fields):
    original = dict(prompt(model, [[(16, 16)], []]))
    return {name: value for name, value in {**original, **fields}.items() if value is not None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": []}, "empty list"),
        ({"images": [np.zeros((16, 16, 4))]}, "with 3 channels, found"),
        ({"images": [np.zeros((16, 3))]}, "images must be"),
        ({"images": [np.zeros((8, 8, 3))]}, "placeholders of images"),
        ({"images": np.zeros((1, 16, 16, 3))}, "pass a list in reading order"),
        ({"images": [[1], [1, 2]]}, r"images\[1\] is not one array|images must be"),
        ({"audio_frames": np.ones(1, int)}, "audio_frames without audio"),
    ],
)
def test_images_that_do_not_fit_are_refused(make_member, fields, message):
    model, params = make_member("ocr")
    with pytest.raises(DataError, match=message):
        quantize.gptq("int4")(model, params, [changed(model, **fields)])
