"""What a Hugging Face directory's files say of its processors, and what is refused."""

import dataclasses

import pytest

from glm_edge.errors import CheckpointError, ConfigError
from glm_edge.preprocess import Processor
from glm_edge.preprocess.processing import GLM4V, GLM_EDGE_V

EDGE_V = {
    "model_type": "glm",
    "boi_token_id": 263,
    "vision_config": {"image_size": 56, "patch_size": 14},
}


def test_files_of_a_checkpoint_are_read(checkpoint):
    config = {
        "model_type": "glm4v",
        "image_token_id": 267,
        "vision_config": {"patch_size": 10, "spatial_merge_size": 2},
    }
    files = {
        "preprocessor_config_json": {
            "image_processor_type": "Glm4vImageProcessorFast",
            "size": {"shortest_edge": 784, "longest_edge": 9408},
            "image_mean": [0, 0, 0],
            "image_std": [1, 1, 1],
            "patch_size": 10,
            "do_resize": True,
            "resample": 2,
        },
        "video_preprocessor_config_json": {"fps": 1, "max_duration": 60},
        "tokenizer_config_json": {
            "chat_template": "{{ eos_token }}{{ bos_token is defined }}",
            "eos_token": {"content": "<|endoftext|>"},
        },
    }
    processor = Processor.from_checkpoint(checkpoint(config, **files))
    assert processor.image == dataclasses.replace(
        GLM4V,
        min_pixels=784,
        max_pixels=9408,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        patch_size=10,
        resample="bilinear",
    )
    assert (processor.video.fps, processor.video.max_duration_s) == (1, 60)
    assert processor.video.max_pixels == 28 * 28 * 2 * 30000
    assert processor.pad_token_id == 256
    assert processor.render([{"role": "user", "content": "a"}]) == "<|endoftext|>False"


def test_transformers_5_nests_its_processors(checkpoint):
    nested = {
        "image_processor": {"size": {"height": 28, "width": 28}},
        "feature_extractor": {"feature_size": 80, "chunk_length": 2},
        "max_audio_len": 10,
    }
    directory = checkpoint(
        {"model_type": "glmasr", "audio_config": {"num_mel_bins": 80}}, processor_config_json=nested
    )
    audio = Processor.from_checkpoint(directory).audio
    assert (audio.mel_bins, audio.chunk_samples, audio.max_chunks) == (80, 32_000, 5)
    config = {**EDGE_V, "vision_config": {"image_size": 28}}
    directory = checkpoint(config, processor_config_json=nested)
    expected = dataclasses.replace(GLM_EDGE_V, size=(28, 28))
    assert Processor.from_checkpoint(directory).image == expected


@pytest.mark.parametrize(
    ("model_type", "fields", "pattern"),
    [
        ("glm4v", {"do_resize": False}, "'do_resize' is False; it must be True"),
        ("glm4v", {"do_center_crop": True}, "'do_center_crop' is True; it must be False"),
        ("glm4v", {"rescale_factor": 1.0}, "'rescale_factor' is 1.0; it must be 1/255"),
        ("glm4v", {"resample": 0}, "'resample' is 0; it must be 2"),
        ("glm4v", {"resample": [3]}, r"'resample' is \[3\]; it must be 2"),
        ("glm4v", {"image_mean": "half"}, "'image_mean' is 'half'; it must be numbers"),
        ("glm4v", {"image_std": [1, 1, 0]}, "std must not be 0"),
        ("glm4v", {"patch_size": 16}, "'patch_size' is 16; it must be 14"),
        ("glm4v", {"size": {"height": 3, "width": 3}}, "must set shortest_edge and longest_edge"),
        (
            "glm4v",
            {"size": {"shortest_edge": 9, "longest_edge": 8}},
            "min_pixels 9 must not exceed",
        ),
        (
            "glm4v",
            {"image_processor_type": "CLIPImageProcessor"},
            "'CLIPImageProcessor'; known:",
        ),
        (
            "glm",
            {"size": {"height": 28, "width": 28}},
            r"prepares images of .*, but the tower reads \(672",
        ),
        ("glm", {"image_processor_type": "MllamaImageProcessor"}, "'max_image_tiles' is None"),
        ("glmasr", {"feature_size": 80}, "'feature_size' is 80; config.json's encoder reads 128"),
        ("glmasr", {"dither": 0.1}, "'dither' is 0.1; it must be 0"),
        ("glmasr", {"hop_length": -1}, "'hop_length' is -1; it must be a positive integer"),
        ("glmasr", {"hop_length": 0.1}, "'hop_length' is 0.1; it must be a positive integer"),
        ("glmasr", {"hop_length": 10**6}, "hop_length 1000000 must be .* 1 to 65536"),
        ("glmasr", {"n_fft": 256.5}, "'n_fft' is 256.5; it must be a positive integer"),
        ("glmasr", {"n_fft": 10**9}, "fft_size 1000000000 must be .*'n_fft'"),
        ("glmasr", {"n_fft": 401}, "fft_size 401 must be even"),
        ("glmasr", {"sampling_rate": 10**9}, "sample_rate 1000000000 must be"),
        ("glmasr", {"sampling_rate": 999}, "sample_rate 999 must be"),
        ("glmasr", {"chunk_length": 1e-9}, "chunk_s 1e-09 must be"),
        ("glmasr", {"chunk_length": 0.005}, "too short for windows of 400"),
        ("glmasr", {"chunk_length": 80_000}, "the limits are 65536 frames"),
        ("glmasr", {"feature_extractor_type": "X"}, "'feature_extractor_type' is 'X'"),
        ("glm", {"size": {"height": 10**9, "width": 2}}, "height 1000000000 must be"),
        ("glm", {"size": {"height": 60_000, "width": 60_000}}, "more than 50000000 pixels"),
        ("glm", {"size": {"height": 672.5, "width": 672}}, "integers of pixels"),
        ("glm4v", {"size": {"shortest_edge": 9, "longest_edge": 10**18}}, "max_pixels 1000"),
        ("glm4v", {"size": {"shortest_edge": 9, "longest_edge": 1e308}}, "integers of pixels"),
        ("glm4v", {"image_mean": [1e308, 0, 0]}, "it must be numbers"),
        ("glm4v", {"image_mean": [1e30, 0, 0]}, "make pixels of .* the limit is 1e"),
        ("glm4v", {"image_std": [1e-299, 1, 1]}, "make pixels of"),
        ("glm4v", {"image_std": [0.5, 0.5]}, "has 2 numbers; images have 3 channels"),
    ],
    ids=range(36),
)
def test_fields_that_ask_for_something_else_are_named(checkpoint, model_type, fields, pattern):
    config = {"model_type": model_type, "vision_config": {"patch_size": 14}}
    with pytest.raises(ConfigError, match=pattern):
        Processor.from_checkpoint(checkpoint(config, preprocessor_config_json=fields))


@pytest.mark.parametrize(
    ("config", "error", "pattern"),
    [
        ({}, CheckpointError, r"nor a Hugging Face one \('model_type'\)"),
        ({"model_type": "glm46v"}, ConfigError, "has no chat template, and this library has none"),
        ({"model_type": "glm4v", "vision_config": 3}, ConfigError, "must be an object"),
        ({"model_type": "glm4v", "image_token_id": 5}, ConfigError, "is 5, but .* has id 267"),
        (
            {"model_type": "glm4v", "vision_config": {"patch_size": "14"}},
            ConfigError,
            "'patch_size' is '14'; it must be a positive integer",
        ),
    ],
    ids=range(5),
)
def test_configurations_that_do_not_fit_are_refused(checkpoint, config, error, pattern):
    with pytest.raises(error, match=pattern):
        Processor.from_checkpoint(checkpoint(config))


def test_tokenizers_that_are_none_are_refused(checkpoint):
    directory = checkpoint({"model_type": "glm4"})
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a readable tokenizer"):
        Processor.from_checkpoint(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        Processor.from_checkpoint(directory)
