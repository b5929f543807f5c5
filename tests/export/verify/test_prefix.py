"""A fixed beginning of prompts: its rows are computed once, and change no logits."""

import dataclasses

import numpy as np
import pytest

from glm_edge import export
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.errors import DataError, ExportError
from glm_edge.export.verify.jax_runner import JaxRunner

COUNT = 21


@pytest.fixture(scope="module")
def system():
    """Tokens of a synthetic system prompt."""
    return np.random.default_rng(5).integers(20, 300, COUNT).astype(np.int32)


@pytest.fixture(scope="module")
def prompt(model, system):
    """A prompt with an image behind the system prompt."""
    config = model.config
    rng = np.random.default_rng(6)
    placeholders = np.full(config.vision.num_tokens, config.image_token_id)
    tokens = np.concatenate([system, placeholders, rng.integers(20, 300, 6)]).astype(np.int32)
    return tokens, rng.random((*config.vision.image_size, config.vision.channels), np.float32)


@pytest.fixture(scope="module")
def runner(dense_export):
    return export.LiteRTRunner(dense_export.path)


@pytest.fixture
def path(runner, system, tmp_path):
    """The file of the prefix."""
    return runner.keep_prefix(system, tmp_path / "a.prefix").path


@pytest.mark.parametrize("stored", [True, False], ids=["file", "memory"])
def test_a_prefix_changes_no_logits(runner, system, prompt, tmp_path, stored):
    expected, _ = runner.prefill(*prompt)
    prefix = runner.keep_prefix(system, tmp_path / "a" if stored else None)
    embedded, embed = [], runner.embed
    runner.embed = lambda tokens, *media: embedded.append(len(tokens)) or embed(tokens, *media)
    try:
        logits, _ = runner.prefill(*prompt, prefix=prefix)
    finally:
        del runner.embed
    assert embedded == [len(prompt[0]) - COUNT]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    tokens = runner.generate(*prompt, max_new_tokens=4)
    assert runner.generate(*prompt, max_new_tokens=4, prefix=prefix) == tokens
    # Without anything behind it, the last token of the prefix runs again for its logits.
    again, _ = runner.prefill(system, prefix=prefix)
    np.testing.assert_allclose(again, runner.prefill(system)[0], atol=1e-4)


def test_another_process_opens_the_file_and_computes_nothing(
    dense_export, runner, system, prompt, path
):
    other = export.LiteRTRunner(dense_export.path, isolated=True)
    other.extend = None
    prefix = other.keep_prefix(system, path)
    assert all(isinstance(rows, np.memmap) for rows in prefix.rows.values())
    del other.extend
    expected, _ = runner.prefill(*prompt)
    np.testing.assert_allclose(other.prefill(*prompt, prefix=prefix)[0], expected, atol=1e-4)
    other.close()


def test_a_verified_file_keeps_its_prefix(dense_export, runner, system, tmp_path):
    copy = tmp_path / "copy.tflite"
    copy.write_bytes(dense_export.path.read_bytes())
    before = export.LiteRTRunner(copy)
    path = before.prefix_path(system)
    assert path.parent == tmp_path
    before.keep_prefix(system, path)
    verified = copy.read_bytes().replace(b'"verified":false', b'"verified":true ')
    assert verified != copy.read_bytes()
    copy.write_bytes(verified)
    after = export.LiteRTRunner(copy)
    assert after.prefix_path(system) == path
    assert after.keep_prefix(system, path).digest == runner.model_digest()
    assert after.prefix_path(system[:-1]) != path


def stored_arrays(path):
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}


def cut(path):
    path.write_bytes(path.read_bytes()[:-64])


def of_another_model(path):
    arrays = stored_arrays(path)
    arrays["model_sha256"][0] ^= 1
    write_safetensors(path, arrays)


def of_another_layout(path):
    arrays = stored_arrays(path)
    name = "kv_cache_v_0"
    write_safetensors(path, {**arrays, name: arrays[name].swapaxes(2, 3)})


def of_fewer_layers(path):
    arrays = stored_arrays(path)
    del arrays["kv_cache_k_0"]
    write_safetensors(path, arrays)


def of_half_precision(path):
    arrays = stored_arrays(path)
    halves = {"kv_cache_k_0": arrays["kv_cache_k_0"].astype(np.float16)}
    write_safetensors(path, {**arrays, **halves})


def of_other_tensors(path):
    write_safetensors(path, {"weight": np.zeros(4, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "damaged or not the file of a prefix; delete it"),
        (of_another_model, "the prefix of another model than .*; delete it"),
        (of_another_layout, r"another cache layout: kv_cache_v_0 is float32 \[1, \d+, 21, "),
        (of_fewer_layers, "another cache layout: kv_cache_k_0 is missing"),
        (of_half_precision, "another cache layout: kv_cache_k_0 is float16"),
        (of_other_tensors, "not the file of a prefix: model_sha256 is missing"),
        (lambda path: path.write_bytes(b"none"), "damaged or not the file of a prefix"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_files_that_do_not_match_are_refused(runner, system, path, change, message):
    change(path)
    with pytest.raises(ExportError, match=message) as caught:
        runner.keep_prefix(system, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prefixes_that_do_not_match_are_refused(
    runner, model, dense_params, system, prompt, path, exported
):
    prefix = runner.keep_prefix(system, path)
    with pytest.raises(ExportError, match="the prefix of other tokens than these 20"):
        runner.keep_prefix(system[:-1], path)
    with pytest.raises(DataError, match="does not begin with the 21 tokens of the prefix"):
        runner.prefill(prompt[0][1:], prompt[1], prefix=prefix)
    with pytest.raises(DataError, match="does not begin with the 21 tokens"):
        runner.prefill(system[:5], prefix=prefix)
    with pytest.raises(ExportError, match=r"the prefix of another model than .*mixed"):
        export.LiteRTRunner(exported.path).prefill(*prompt, prefix=prefix)
    with pytest.raises(DataError, match="placeholder of an image or a recording"):
        runner.keep_prefix(prompt[0])
    with pytest.raises(DataError, match="must contain at least one token"):
        runner.keep_prefix([])
    shorter = JaxRunner(model, dense_params, (16,), COUNT - 1)
    with pytest.raises(ExportError, match="21 tokens do not fit the 20 slots"):
        shorter.prefill(system, prefix=dataclasses.replace(prefix, digest=None))
    with pytest.raises(ExportError, match="JaxRunner has no file of a model"):
        shorter.keep_prefix(system[:4], path)
