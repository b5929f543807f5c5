"""What the engine answers from a bundle is compared with JAX, and a difference is found."""

import dataclasses
import re
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from glm_edge.errors import DataError, ExportError, MissingExtraError
from glm_edge.export import Verification, read_metadata
from glm_edge.export.litertlm.verify import agreeing, png
from glm_edge.export.verify.worker import InterpreterProcess
from tests.export.litertlm.tiny_bundles import SLOTS, TEMPLATE, processor

if not (find_spec("litert_lm") and find_spec("litert_lm_builder")):
    pytest.skip("the extra litertlm is not installed", allow_module_level=True)


def unpacked(bundle, directory):
    """Descriptions of a bundle's sections."""
    from litert_lm_builder import litertlm_builder

    litertlm_builder.unpack(str(bundle.path), str(directory))
    return [read_metadata(file) for file in directory.glob("*.tflite")]


def copied(bundle, path, change=lambda content: content):
    path.write_bytes(change(bytearray(bundle.path.read_bytes())))
    return dataclasses.replace(bundle, path=path)


def test_a_bundle_whose_answers_are_those_of_jax_is_marked(text_bundle, tmp_path):
    complete = copied(text_bundle, tmp_path / "text.litertlm")
    assert [stored["verified"] for stored in unpacked(complete, tmp_path / "before")] == [False]
    result = complete.verify(prompts=100, max_new_tokens=12)
    assert result.verified
    assert str(result).startswith("passed: ")
    assert str(result).endswith("threshold 99.00%")
    assert (result.compute, result.threshold) == ("int8_dynamic", 0.99)
    assert result.free_running_tokens >= result.tokens >= 1000
    assert result.turns >= 3
    assert result.max_abs_error is result.mean_kl is None
    assert "nats" not in str(result)
    assert [stored["verified"] for stored in unpacked(complete, tmp_path / "after")] == [True]
    # Still a bundle that the engine opens, and that passes.
    assert complete.verify(prompts=2, max_new_tokens=2).agreement == 1.0


def few_tokens_suffice(monkeypatch):
    monkeypatch.setattr(sys.modules[Verification.__module__], "MIN_TOKENS", 4)


@pytest.mark.parametrize(
    ("options", "shortfall"),
    [
        (
            {"threshold": 0.0},
            r"the default threshold is 99\.00%, and only \d+ of at least 1,000 tokens",
        ),
        ({}, r"only \d+ of at least 1,000 tokens were compared"),
    ],
)
def test_an_easy_comparison_marks_nothing(options, shortfall, text_bundle, tmp_path):
    complete = copied(text_bundle, tmp_path / "text.litertlm")
    result = complete.verify(prompts=1, max_new_tokens=4, **options)
    assert result.passed
    assert not result.verified
    assert re.search(rf"threshold [\d.]+%; not marked as verified: {shortfall}", str(result))
    assert [stored["verified"] for stored in unpacked(complete, tmp_path / "after")] == [False]


def test_a_cache_without_room_for_three_turns_marks_nothing(text_bundle, tmp_path, monkeypatch):
    few_tokens_suffice(monkeypatch)
    complete = copied(text_bundle, tmp_path / "text.litertlm")
    result = dataclasses.replace(complete, cache_slots=16).verify(
        ["w010 w020"], prompts=1, max_new_tokens=8
    )
    assert result.passed
    assert result.turns < 3
    assert str(result).endswith(
        f"not marked as verified: the cache fits {result.turns} turns of a conversation, "
        "fewer than 3"
    )
    assert [stored["verified"] for stored in unpacked(complete, tmp_path / "after")] == [False]


def test_images_and_recordings_are_verified_too(heard_and_seen, tmp_path, monkeypatch):
    few_tokens_suffice(monkeypatch)
    complete = copied(heard_and_seen, tmp_path / "media.litertlm")
    result = complete.verify(prompts=9, max_new_tokens=4)
    assert result.agreement == 1.0
    assert result.tokens > 20
    verified = [stored["verified"] for stored in unpacked(complete, tmp_path / "after")]
    assert verified == [True] * len(complete.sections)


def test_other_answers_fail(text_bundle, tmp_path):
    complete = copied(text_bundle, tmp_path / "text.litertlm")
    template = TEMPLATE
    for content in ("item.text", "message.content"):
        template = template.replace(f"{{{{ {content}", f"{{{{ {content} ~ ' w100'")
    swapped = dataclasses.replace(processor(), template=template)
    other = dataclasses.replace(complete, processor=swapped)
    with pytest.raises(ExportError, match=r"threshold 99\.00%"):
        other.verify(["w010 w020 w030"], prompts=2, max_new_tokens=12)
    result = other.verify(["w010 w020 w030"], prompts=2, max_new_tokens=12, check=False)
    assert not result.passed
    assert str(result).startswith("failed: ")
    assert [stored["verified"] for stored in unpacked(complete, tmp_path / "after")] == [False]
    with pytest.raises(ExportError, match="no prompt fits its 96 cache slots"):
        complete.verify(prompts=1, max_new_tokens=SLOTS)
    with pytest.raises(DataError, match="no empty one"):
        complete.verify([" "])


def test_a_conversation_goes_on_until_the_cache_is_full(text_bundle, tmp_path, monkeypatch):
    asked = []
    reply = InterpreterProcess.reply

    def counted(child, content, max_new_tokens, same=False):
        answer = reply(child, content, max_new_tokens, same)
        asked.append((same, answer[1]))
        return answer

    monkeypatch.setattr(InterpreterProcess, "reply", counted)
    result = text_bundle.verify(prompts=1, max_new_tokens=4)
    turns = [used for same, used in asked if same]
    # The first message of the conversation begins it.
    assert len(turns) >= 2
    assert turns == sorted(turns)
    # One word, its mark and an answer no longer fit.
    assert turns[-1] > SLOTS - 10
    assert result.tokens > 4


def test_a_conversation_that_ends_early_fails(text_bundle, monkeypatch):
    reply = InterpreterProcess.reply

    def full(child, content, max_new_tokens, same=False):
        answer = reply(child, content, max_new_tokens, same)
        if same and answer[1] > SLOTS // 2:
            raise ExportError("work group size exceeds available state entries")
        return answer

    monkeypatch.setattr(InterpreterProcess, "reply", full)
    with pytest.raises(ExportError, match=r"message \d of a conversation, .* of 96 slots free"):
        text_bundle.verify(prompts=1, max_new_tokens=4)


def test_one_other_byte_and_half_a_bundle_are_refused(text_bundle, tmp_path):
    codes = np.asarray(text_bundle.params["embed"]["weight"].data).tobytes()

    def one_bit(content):
        content[content.index(codes)] ^= 1
        return content

    changed = copied(text_bundle, tmp_path / "a.litertlm", one_bit)
    with pytest.raises(ExportError, match=r"damaged, .*embed/weight of PREFILL_DECODE differs"):
        changed.verify(prompts=1)
    cut = copied(text_bundle, tmp_path / "b.litertlm", lambda content: content[: len(content) // 2])
    with pytest.raises(ExportError, match=r"b\.litertlm: damaged"):
        cut.verify(prompts=1)


def test_an_answer_is_compared_up_to_the_first_other_token():
    def decode(tokens):
        shown = tokens[: tokens.index(0)] if 0 in tokens else tokens
        return " ".join(map(str, shown))

    assert agreeing([5, 6, 7], "5 6 7", decode) == 3
    assert agreeing([5, 6, 0], "5 6", decode) == 3
    assert agreeing([5, 6, 0], "5 6 9", decode) == 2
    assert agreeing([5, 6, 7], "5 6", decode) == 2
    assert agreeing([5, 6, 7], "8", decode) == 0
    assert agreeing([5, 6, 7], "5 8 7", decode) == 1


def test_our_png_is_what_pillow_reads(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    (tmp_path / "a").write_bytes(png(pixels))
    with Image.open(tmp_path / "a") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_missing_engine_is_named(text_bundle, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "litert_lm", None)
    with pytest.raises(MissingExtraError, match="glm_edge\\[litertlm\\]"):
        text_bundle.verify(prompts=1)


def test_conversation_reads_answers_with_their_stop_token(heard_and_seen):
    """The engine gives zeros for the last token of an answer where embeddings are read."""
    assert heard_and_seen.answer_end == 0
    result = heard_and_seen.verify(prompts=1, max_new_tokens=4, seed=3, check=False)
    assert result.agreement == 1.0
    # Three turns of the conversation, besides the prompt.
    assert result.tokens > 9
