"""Outputs of the processors for the inputs of a case without a model."""

import dataclasses

import numpy as np

from experiments.golden.cases import Arrays, Case
from glm_edge.errors import DataError
from glm_edge.kernels.log_mel import mel_filters
from glm_edge.preprocess import AudioProcessing, prepare_image, prepare_recording, to_patches
from glm_edge.preprocess.processing import GLM4V


def process(case: Case, subcase: str) -> Arrays:
    """Prepare one image (GLM-4.1V) or one recording (Whisper).

    Args:
      case: case whose meta.json has the parameters of the subcase.
      subcase: name of the subcase.

    Returns:
      Outputs by the names of transformers' processors.

    Raises:
      DataError: the subcase has neither `image` nor `waveform`, or lacks a parameter.
    """
    inputs, fields = case.inputs[subcase], case.meta["subcases"][subcase]
    try:
        if "image" in inputs:
            size = fields["size"]
            processing = dataclasses.replace(
                GLM4V, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
            )
            pixels, grids = to_patches([prepare_image(inputs["image"], processing)])
            return {"pixel_values": pixels, "image_grid_thw": grids}
        if "waveform" in inputs:
            bins, seconds = fields["feature_size"], fields["chunk_length"]
            processing = AudioProcessing(mel_bins=bins, chunk_s=seconds)
            mel, frames = prepare_recording(inputs["waveform"], processing)
            return {
                "input_features": np.swapaxes(mel, 1, 2),
                "attention_mask": np.arange(mel.shape[1]) < frames[:, None],
                "mel_filters": mel_filters(bins, 400, 16000).T,
            }
    except KeyError as error:
        raise DataError(f"{case.folder}: meta.json: subcase {subcase!r} lacks {error}") from error
    raise DataError(
        f"{case.folder}: subcase {subcase!r} contains {', '.join(inputs)}; a case without "
        "config.json needs an image or a waveform"
    )
