"""Our own directories: the shipped model's prompts, and those of other shapes."""

import dataclasses
import json

import numpy as np
import pytest

import glm_edge as ge
from experiments.common import tap_eval, tap_items
from glm_edge import configs, preprocess
from glm_edge.errors import CheckpointError, ConfigError, DataError
from glm_edge.preprocess import AudioProcessing, Processor
from glm_edge.preprocess.processing import GLM4V, GLM4V_VIDEO, GLM_EDGE_V

RNG = np.random.default_rng(0)
NANO = ge.shipped("nano")
CONFIG = ge.preset("nano")
SAMPLES = (0.1 * RNG.normal(size=9_000)).astype(np.float32)
IMAGE, AUDIO = {"type": "image"}, {"type": "audio"}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(content):
    return {"type": "text", "text": content}


@pytest.fixture(scope="module")
def nano():
    return Processor.from_checkpoint(NANO)


@pytest.mark.parametrize(
    ("instruction", "spoken"),
    [
        ("tap the star icon", False),
        ("tap the star icon", True),
        ("say <|image|> <|user|>", True),
        ("", True),
    ],
)
@pytest.mark.parametrize("observed", [False, True])
def test_prompts_are_those_of_training(nano, instruction, spoken, observed):
    parts = [IMAGE] * observed + [AUDIO] * spoken + [text(instruction)] * bool(instruction)
    picture = RNG.random((192, 96, 3), np.float32)
    inputs = nano(
        user(*parts), images=[picture] if observed else None, audio=[SAMPLES] if spoken else None
    )
    expected = preprocess.prompt_ids(
        nano.tokenizer,
        instruction,
        CONFIG.vision.num_tokens * observed,
        CONFIG.speech.num_tokens * spoken,
    )
    assert inputs.tokens.tolist() == [expected]


def test_text_goes_after_the_image_wherever_it_stands(nano):
    picture = np.zeros((192, 96, 3), np.float32)
    first, last = user(text("tap 3"), IMAGE), user(IMAGE, text("tap 3"))
    np.testing.assert_array_equal(
        nano(first, images=[picture]).tokens, nano(last, images=[picture]).tokens
    )


def test_earlier_answers_end_with_the_end_of_text(nano):
    messages = [
        *user(text("a")),
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert nano.render(messages) == "<|user|>a<|assistant|>b<|endoftext|><|user|>c<|assistant|>"
    # Nano knows no system prompt; a phone agent's is twice as long as its context.
    system = {"role": "system", "content": "d"}
    assert nano.render([system, *messages]) == nano.render(messages)
    with pytest.raises(DataError, match="role 'tool' is unknown here"):
        nano.render([{"role": "tool", "content": "a"}])
    with pytest.raises(DataError, match="tools and documents are unknown here"):
        nano.render(messages, tools=[{"type": "function"}])
    for changes in ({"name": "Ada"}, {"content": [{"type": "video"}]}):
        with pytest.raises(DataError, match="unknown here"):
            nano.render([{**messages[0], **changes}])


@pytest.mark.parametrize("size", [(192, 96), (100, 311)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_images_are_those_of_training(nano, size, dtype):
    picture = RNG.random((*size, 3), np.float32)
    picture = (picture * 255).astype(dtype) if dtype == np.uint8 else picture
    [image] = nano(user(IMAGE, text("a")), images=[picture]).images
    np.testing.assert_array_equal(image, preprocess.prepare_images(picture, CONFIG.vision)[0])


@pytest.mark.parametrize("count", [300, 9_000, 12_800])
def test_recordings_are_those_of_training(nano, count):
    samples = (0.1 * RNG.normal(size=count)).astype(np.float32)
    inputs = nano(user(AUDIO), audio=[samples])
    expected = preprocess.prepare_audio(samples, CONFIG.speech)
    np.testing.assert_array_equal(inputs.audio, expected[None])
    np.testing.assert_array_equal(inputs.audio_frames, [CONFIG.speech.num_frames])


@pytest.fixture(scope="module")
def loaded():
    return ge.load(NANO)


@pytest.mark.slow
def test_answers_are_those_of_the_exam(nano, loaded):
    items = tap_items.draw_items(3, 3)
    items[1] = dataclasses.replace(items[1], samples=SAMPLES)
    batch = [
        user(
            {"type": "image", "image": item.image},
            *([] if item.samples is None else [{"type": "audio", "audio": item.samples}]),
            text(item.question.instruction_text),
        )
        for item in items
    ]
    options = {"max_new_tokens": tap_eval.ANSWER_TOKENS, "return_logits": True}
    actual = ge.generate.generate(*loaded, nano(batch), **options)
    [prompts] = tap_items.prompt_batches(items, CONFIG, nano.tokenizer, batch=len(items))
    expected = ge.generate.generate(*loaded, prompts, **options)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    for ours, theirs, length in zip(actual.logits, expected.logits, actual.lengths, strict=True):
        np.testing.assert_allclose(ours[: length + 1], theirs[: length + 1], atol=1e-4)
    assert nano.decode(actual.tokens[0]).startswith("do(action=")


def test_saved_with_its_files_it_reads_the_same(nano, loaded, tmp_path):
    extras = {name: NANO / name for name in ("tokenizer.json", "chat_template.jinja")}
    directory = ge.save(*loaded, tmp_path / "copy", format="safetensors", extras=extras)
    result = Processor.from_checkpoint(directory)
    for field in dataclasses.fields(Processor)[1:]:
        assert getattr(result, field.name) == getattr(nano, field.name)


@pytest.fixture
def local(checkpoint):
    """Writes a directory of our own format: `own(config, **files)`."""

    def write(config, **files):
        fields = {"format": "glm_edge", "version": 1, "config": configs.to_dict(config)}
        return checkpoint(fields, chat_template_jinja="{{ messages[0].content }}", **files)

    return write


VISION = configs.VisionConfig(
    image_size=(56, 84),
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    projector_size=16,
)
TURNING = dataclasses.replace(
    CONFIG.decoder, partial_rotary_factor=1.0, mrope_section=(4, 6, 6), vocab_size=280
)


def seeing(vision=VISION, decoder=CONFIG.decoder, **fields):
    # `<|image|>` of the byte tokenizer.
    return configs.GLMConfig("seeing", decoder, vision, image_token_id=267, **fields)


def test_images_of_the_families_are_theirs(local):
    result = Processor.from_checkpoint(local(seeing(decoder=TURNING, video_token_id=268)))
    assert (result.image, result.video) == (GLM4V, GLM4V_VIDEO)
    assert (result.image_token, result.video_token) == ("<|image|>", "<|video|>")
    vision = dataclasses.replace(VISION, boundary_embeddings=True)
    result = Processor.from_checkpoint(local(seeing(vision)))
    assert result.image == dataclasses.replace(GLM_EDGE_V, size=(56, 84))


def test_files_of_a_processor_go_before(local):
    directory = local(
        seeing(),
        preprocessor_config_json={
            "image_processor_type": "Glm4vImageProcessor",
            "image_mean": list(GLM4V.mean),
            "image_std": list(GLM4V.std),
        },
        generation_config_json={"eos_token_id": [3, 4]},
    )
    actual = Processor.from_checkpoint(directory)
    assert dataclasses.replace(actual.image, size=None) == GLM4V
    assert actual.stop_token_ids == (3, 4)
    speech = configs.GLMConfig("a", CONFIG.decoder, speech=CONFIG.speech, audio_token_id=271)
    directory = local(
        speech,
        preprocessor_config_json={
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": 40,
            "sampling_rate": 8000,
            "n_fft": 200,
            "hop_length": 80,
            "chunk_length": 2,
        },
    )
    expected = AudioProcessing(40, 8000, 200, 80, chunk_s=2, max_s=655, merge_size=4)
    assert Processor.from_checkpoint(directory).audio == expected


def test_a_model_of_text_alone_reads_text(local):
    decoder = dataclasses.replace(CONFIG.decoder, vocab_size=280)
    config = configs.GLMConfig("text", decoder, eos_token_ids=(256, 260), pad_token_id=256)
    result = Processor.from_checkpoint(local(config))
    assert (result.image, result.audio) == (None, None)
    assert (result.stop_token_ids, result.pad_token_id) == ((256, 260), 256)
    assert dict(result([{"role": "user", "content": "hi"}])).keys() == {"tokens", "valid"}
    with pytest.raises(DataError, match="this model reads no images"):
        result(user(IMAGE), images=[np.zeros((9, 9, 3), np.uint8)])


@pytest.mark.parametrize(
    ("change", "error", "pattern"),
    [
        ({"architecture": "TextEncoder"}, ConfigError, "a 'TextEncoder' has no conversations"),
        ({"config": None}, ConfigError, "field 'config' must be an object"),
        (
            {"config": {"name": "a"}},
            ConfigError,
            r"config\.json: config: field 'decoder' is missing",
        ),
        ({"config": {"name": "a", "decoder": 3}}, ConfigError, "decoder: expected an object"),
        ({"format": "other"}, CheckpointError, "neither a glm_edge checkpoint"),
    ],
    ids=range(5),
)
def test_configurations_that_are_none_are_refused(local, change, error, pattern):
    directory = local(seeing())
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(error, match=pattern):
        Processor.from_checkpoint(directory)


def test_a_field_of_the_wrong_type_is_refused(local):
    directory = local(seeing())
    fields = json.loads((directory / "config.json").read_text())
    fields["config"]["decoder"]["num_layers"] = "many"
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="'many', a value of the wrong type"):
        Processor.from_checkpoint(directory)


def test_a_placeholder_that_the_tokenizer_lacks_is_named(local):
    config = dataclasses.replace(seeing(), image_token_id=2000)
    with pytest.raises(ConfigError, match=r"'image_token_id' is 2000, an id that tokenizer\.json"):
        Processor.from_checkpoint(local(config))


def test_a_missing_template_is_asked_for(local):
    directory = local(seeing())
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no chat template.*pass template= or family="):
        Processor.from_checkpoint(directory)
    assert Processor.from_checkpoint(directory, family="glm_4_1v").template


@pytest.mark.parametrize("change", [{"sizing": "smart"}, {"resample": "bilinear"}])
def test_pixels_that_are_not_rounded_are_stretched_bicubic(change):
    with pytest.raises(ConfigError, match="needs 8-bit pixels"):
        preprocess.ImageProcessing(
            **{"sizing": "stretch", "size": (8, 8), "eight_bit": False} | change
        )


@pytest.mark.parametrize(
    ("part", "change", "pattern"),
    [
        ("speech", {"fft_size": 201}, "audio: fft_size 201 must be even"),
        ("speech", {"sample_rate": 10**9}, "audio: sample_rate 1000000000"),
        ("speech", {"hop_length": 0}, "speech: hop_length 0 must be at least 1"),
        ("vision", {"image_size": [60_000, 60_000]}, "vision: image_size .* exceeds 50000000"),
        ("vision", {"patch_stride": 0}, "vision: patch_stride 0 must be at least 1"),
        ("decoder", {"rms_norm_eps": 0.0}, "decoder: rms_norm_eps 0.0 must be in 1e-30"),
        ("decoder", {"rope_theta": 1e300}, "decoder: rope_theta 1e"),
    ],
)
def test_numbers_of_a_configuration_have_ranges(local, part, change, pattern):
    directory = local(CONFIG)
    fields = json.loads((directory / "config.json").read_text())
    fields["config"][part] |= change
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=rf"config\.json: {pattern}"):
        Processor.from_checkpoint(directory)
