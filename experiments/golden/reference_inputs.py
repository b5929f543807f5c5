"""Random inputs of reference models by transformers' argument names."""

from typing import Any

import numpy as np

from experiments.golden.cases import Arrays
from experiments.golden.reference_plans import PAD, SPECIAL_IDS, Plan, Rows

# First id of ordinary text, after the ids of stop tokens.
FIRST_TEXT_ID = 10
IMAGE, VIDEO = 1, 2


def draw_inputs(plan: Plan, subcase: str, rng: np.random.Generator) -> Arrays:
    """Draw the inputs of a subcase.

    Args:
      plan: plan of the model.
      subcase: name of one of its subcases.
      rng: random generator.

    Returns:
      Arrays by name.
    """
    rows = plan.subcases[subcase]
    if isinstance(rows, list):
        return _prompts(plan.config, rows, rng)
    if "lengths" in rows:
        return _sentences(plan.config, rows["lengths"], rng)
    if "input_ids" in rows:
        return {"input_ids": rng.integers(0, plan.config["vocab_size"], (1, rows["input_ids"]))}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in rows.items()}


def positions_of(mask: np.ndarray) -> np.ndarray:
    """Return the positions of valid tokens in their rows, 0 at padding."""
    return np.where(mask == 1, mask.cumsum(axis=1) - 1, 0)


def _sentences(config: dict[str, Any], lengths: list[int], rng: np.random.Generator) -> Arrays:
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    drawn_inputs = {
        "input_ids": np.where(mask, rng.integers(1, config["vocab_size"], shape), 0),
        "attention_mask": mask,
    }
    if "type_vocab_size" in config:
        drawn_inputs["token_type_ids"] = mask * rng.integers(0, config["type_vocab_size"], shape)
    return drawn_inputs


def _prompts(config: dict[str, Any], rows: Rows, rng: np.random.Generator) -> Arrays:
    vocabulary = config.get("text_config", config)["vocab_size"]
    media: dict[str, list[np.ndarray]] = {}
    ids, types = [], []
    for row in rows:
        row_ids: list[int] = []
        row_types: list[int] = []
        for item in row:
            if isinstance(item, int):
                new = rng.integers(FIRST_TEXT_ID, vocabulary - SPECIAL_IDS, item).tolist()
                kind = 0
            elif item[0] == "audio":
                new, kind = _sound(config, item, media, rng), 0
            elif item[0] == "whole image":
                new, kind = _whole_image(config, item, media, rng), 0
            else:
                new, kind = _picture(config, item, media, rng)
            row_ids += new
            placeholder = config.get("image_token_id")
            row_types += [kind if token == placeholder else 0 for token in new]
        ids.append(row_ids)
        types.append(row_types)
    width = max(map(len, ids))
    padding = [width - len(row) for row in ids]
    inputs = {
        "input_ids": np.array([[PAD] * n + row for n, row in zip(padding, ids, strict=True)]),
        "attention_mask": np.array(
            [[0] * n + [1] * len(row) for n, row in zip(padding, ids, strict=True)]
        ),
    }
    if "vision_config" not in config:
        inputs["position_ids"] = positions_of(inputs["attention_mask"])
    elif media and "image_token_id" in config:
        inputs["mm_token_type_ids"] = np.array(
            [[0] * n + row for n, row in zip(padding, types, strict=True)]
        )
    return inputs | {name: np.concatenate(parts) for name, parts in media.items()}


def _picture(
    config: dict[str, Any], item: tuple[Any, ...], media: dict, rng: np.random.Generator
) -> tuple[list[int], int]:
    """Add patches of an image, or of a video of (frames, rows, columns); return its tokens."""
    vision, merge = config["vision_config"], config["vision_config"]["spatial_merge_size"]
    frames, rows, columns = item[1:] if item[0] == "video" else (1, *item[1:])
    kind = VIDEO if item[0] == "video" else IMAGE
    pixels, grids = (
        ("pixel_values_videos", "video_grid_thw")
        if kind == VIDEO
        else ("pixel_values", "image_grid_thw")
    )
    grid = (frames, rows * merge, columns * merge)
    copies = 1 if kind == IMAGE else vision["temporal_patch_size"]
    shape = (np.prod(grid), vision["in_channels"], copies, vision["patch_size"] ** 2)
    # A still image is repeated to fill the frames of a patch.
    patches = rng.normal(size=shape).repeat(vision["temporal_patch_size"] // copies, axis=2)
    media.setdefault(pixels, []).append(patches.reshape(shape[0], -1).astype(np.float32))
    media.setdefault(grids, []).append(np.array([grid]))
    one = [
        config["image_start_token_id"],
        *[config["image_token_id"]] * (rows * columns),
        config["image_end_token_id"],
    ]
    if kind == IMAGE:
        return one, kind
    time = [FIRST_TEXT_ID + 3]
    tokens = [config["video_start_token_id"], *(one + time) * frames, config["video_end_token_id"]]
    return tokens, kind


def _whole_image(
    config: dict[str, Any], item: tuple[Any, ...], media: dict, rng: np.random.Generator
) -> list[int]:
    """Add an image that is not cut into patches; return its tokens."""
    _, side, features = item
    shape = (1, config["vision_config"]["num_channels"], side, side)
    media.setdefault("pixel_values", []).append(rng.normal(size=shape).astype(np.float32))
    return [config["boi_token_id"]] * features


def _sound(
    config: dict[str, Any], item: tuple[Any, ...], media: dict, rng: np.random.Generator
) -> list[int]:
    """Add chunks of a recording; return its tokens."""
    _, frames, valid = item
    shape = (len(valid), config["audio_config"]["num_mel_bins"], frames)
    mask = (np.arange(frames) < np.array(valid)[:, None]).astype(np.int64)
    media.setdefault("input_features", []).append(rng.normal(size=shape).astype(np.float32))
    media.setdefault("input_features_mask", []).append(mask)
    count = sum((n + 1) // 2 // 4 for n in valid)
    return [config["audio_token_id"]] * count
