"""The exported file runs in LiteRT and predicts what JAX predicts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import DataError, ExportError
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.flatbuffer import FlatModel
from glm_edge.export.verify.jax_runner import JaxRunner
from glm_edge.export.verify.runner import SignatureRunner
from glm_edge.export.verify.schedule import split
from glm_edge.export.verify.verify import signature_distances
from glm_edge.generate.decoding import greedy
from glm_edge.params import Format
from glm_edge.preprocess import Inputs


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


multiplied = jax.jit(boxes.linear, static_argnums=2)
FORMS = [
    Format("int8"),
    Format("int4"),
    Format("int2"),
    Format("int4", 32, scale_dtype="bfloat16"),
    Format("int4", 64),
]


@pytest.fixture(scope="module")
def prompt(model):
    rng = np.random.default_rng(0)
    config = model.config
    tokens = np.concatenate(
        [
            np.full(config.vision.num_tokens, config.image_token_id),
            rng.integers(20, 300, 5),
            np.full(config.speech.num_tokens, config.audio_token_id),
            rng.integers(20, 300, 12),
        ]
    ).astype(np.int32)
    image = rng.random((*config.vision.image_size, 3), np.float32)
    audio = rng.normal(size=(config.speech.num_frames, config.speech.mel_bins)).astype(np.float32)
    return tokens, image, audio


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_product_has_the_bits_of_the_int8_dynamic_kernel(form, quantize, product, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    rng = np.random.default_rng(1)
    box = quantize(rng.normal(size=(48, 256)).astype(np.float32), form)
    effective, _ = product(box, tmp_path / "a.tflite")
    runners = Interpreter(str(tmp_path / "a.tflite"))
    for rows in (1, 16):
        x = (rng.normal(size=(1, rows, 256)) + 0.3).astype(np.float32)
        actual = runners.get_signature_runner(f"product_{rows}")(x=x)["y"]
        expected = multiplied(x, effective, "int8_dynamic")
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
        if form.group_size is None:
            np.testing.assert_array_equal(actual, expected)
        plain = multiplied(x, effective, "float32")
        assert np.abs(actual - plain).max() > 100 * np.abs(actual - expected).max()


def test_float_file_gives_the_logits_of_the_model(dense_export, model, dense_params, prompt):
    tokens, image, audio = prompt
    expected, aux = applied(
        model,
        {"params": dense_params},
        tokens[None],
        jnp.asarray(image[None]),
        jnp.asarray(audio[None]),
    )
    phone = export.LiteRTRunner(dense_export.path)
    np.testing.assert_allclose(phone.encode_images(image), aux["vision"][0], atol=1e-4)
    np.testing.assert_allclose(phone.encode_audio(audio), aux["speech"][0], atol=1e-4)
    np.testing.assert_allclose(phone.score(tokens, image, audio), expected[0], atol=1e-4)


def test_a_text_longer_than_the_prefill_is_scored_in_pieces(dense_export, model, dense_params):
    tokens = np.random.default_rng(1).integers(20, 300, 61)
    expected, _ = applied(model, {"params": dense_params}, jnp.asarray(tokens[None]))
    phone = export.LiteRTRunner(dense_export.path)
    np.testing.assert_allclose(phone.score(tokens), expected[0], atol=1e-4)
    phone = SignatureRunner(model.config, (8, 32), 64)
    assert [length for _, _, length in split(0, 61, 64, phone.lengths)] == [32, 32]
    assert [length for _, _, length in split(40, 61, 64, phone.lengths)] == [8, 8, 8]
    assert [length for _, _, length in split(60, 64, 64, phone.lengths)] == [1, 1, 1, 1]


def test_inputs_that_do_not_fit_are_refused(dense_export, prompt):
    tokens, image, audio = prompt
    phone = export.LiteRTRunner(dense_export.path)
    with pytest.raises(DataError, match="65 tokens do not fit the 64 slots"):
        phone.score(np.arange(65))
    with pytest.raises(DataError, match="all from 0 to 319"):
        phone.score(np.array([3, 320]))
    with pytest.raises(DataError, match="must contain at least one token"):
        phone.score(np.zeros(0, np.int32))
    with pytest.raises(DataError, match=r"images: shape \(32, 32, 3\)"):
        phone.score(tokens, image[:32])
    with pytest.raises(DataError, match="audio: shape"):
        phone.encode_audio(audio.T)


def test_scores_that_are_not_finite_are_refused(dense_export, monkeypatch):
    phone = export.LiteRTRunner(dense_export.path)
    monkeypatch.setattr(phone, "extend", lambda *_: (np.full((1, 320), np.nan), {}))
    with pytest.raises(DataError, match="logits are NaN or infinite"):
        phone.generate(np.array([30, 31]), max_new_tokens=2)


def test_greedy_tokens_are_those_of_the_model(dense_export, model, dense_params, prompt):
    tokens, image, audio = prompt
    expected = greedy(
        model,
        dense_params,
        Inputs(tokens[None], images=image[None], audio=audio[None]),
        max_new_tokens=20,
    )[0]
    actual = export.LiteRTRunner(dense_export.path).generate(*prompt, max_new_tokens=20)
    np.testing.assert_array_equal(actual, expected[: len(actual)])


def test_compressed_file_agrees_with_jax_on_the_same_integers(exported, prompt):
    result = exported.verify()
    assert result.tokens >= 1000
    assert result.passed
    assert result.signatures.keys() == set(exported.signatures)
    assert result.mean_kl < 0.01
    assert export.read_metadata(exported.path)["verified"] is True


def test_few_tokens_or_a_lower_threshold_mark_nothing(dense_export, prompt):
    result = dense_export.verify([export.Window(*prompt)], free_running=0, isolated=False)
    assert result.passed
    assert result.signatures.keys() == set(dense_export.signatures)
    assert result.shortfalls == [f"only {result.tokens} of at least 1,000 tokens were compared"]
    result = dense_export.verify(threshold=0.5, free_running=0, isolated=False)
    assert str(result).endswith("not marked as verified: the default threshold is 99.00%")
    assert export.read_metadata(dense_export.path)["verified"] is False


@pytest.fixture(scope="module")
def references(model, dense_params):
    """Makes runners of the functions that `verify` has compiled."""
    compiled = model.clone(compute="int8_dynamic")
    return lambda kind: kind(compiled, dense_params, (32,), 64, forced_lengths=(4,))


@pytest.mark.parametrize(
    "wrong", ["prefill_32", "embed_32", "prefill_4", "decode", "vision", "speech"]
)
def test_a_signature_that_texts_do_not_run_must_agree_too(wrong, dense_export, references):
    class Other(JaxRunner):
        def run(self, signature, **inputs):
            outputs = super().run(signature, **inputs)
            turned = {name: -value for name, value in outputs.items() if "cache" not in name}
            return outputs | turned if signature == wrong else outputs

    distances = signature_distances(references(JaxRunner), references(Other))
    assert distances.keys() == set(dense_export.signatures)
    expected = {wrong}
    if wrong == "decode":
        # A prompt is judged by the step behind it, too.
        expected |= {"prefill_32", "prefill_4"}
    assert {name for name, error in distances.items() if error > 0.25} == expected


def test_a_file_of_other_weights_fails(dense_export, model, dense_params):
    other = boxes.map_with_path(
        lambda path, leaf: -leaf if path == "decoder/layers/0/attention/o_proj/weight" else leaf,
        dense_params,
    )
    with pytest.raises(ExportError, match=r"threshold 99\.00%"):
        export.verify(dense_export.path, model, other, free_running=0, isolated=False)
    assert export.read_metadata(dense_export.path)["verified"] is False


def test_positions_that_are_not_counted_are_left_out(dense_export, prompt):
    tokens, image, audio = prompt
    counted = np.zeros(len(tokens), bool)
    counted[-4:] = True
    window = export.Window(
        tokens, image, audio, counted, prompt_length=len(tokens) - 4, max_new_tokens=6
    )
    result = dense_export.verify([window], isolated=False)
    assert (result.tokens, result.agreement) == (4, 1.0)
    assert result.free_running_tokens in range(1, 7)
    nothing = export.Window(tokens, image, audio, np.zeros(len(tokens), bool))
    with pytest.raises(ExportError, match="no window counts a position"):
        dense_export.verify([nothing], isolated=False)
    shorter = export.Window(tokens, image, audio, counted[1:])
    with pytest.raises(DataError, match="expected one bool for each"):
        dense_export.verify([shorter], isolated=False)


def test_jax_runs_the_same_signatures(dense_export, references, prompt):
    phone, reference = export.LiteRTRunner(dense_export.path), references(JaxRunner)
    assert reference.prefill_lengths == phone.prefill_lengths
    assert reference.cache_slots == phone.cache_slots
    np.testing.assert_allclose(reference.score(*prompt), phone.score(*prompt), atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "not a TFLite file: it has 0 bytes"),
        (b"not a model at all", "not a TFLite file"),
        (b"\x10\0\0\0TFL3" + b"\xff" * 40, "damaged TFLite file"),
    ],
)
def test_files_that_are_not_ours_are_refused(content, message, tmp_path):
    path = tmp_path / "a.tflite"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        export.LiteRTRunner(path)


def test_a_foreign_tflite_file_is_refused(exported, tmp_path):
    graph = FlatModel(exported.path.read_bytes())
    graph.model.metadata = []
    tflite_file.write(graph.model, tmp_path / "a.tflite", overwrite=False)
    with pytest.raises(ExportError, match="a TFLite file that glm_edge did not export"):
        export.LiteRTRunner(tmp_path / "a.tflite")
