"""Bundles open in LiteRT-LM's engine and say what LiteRT's interpreter and JAX say."""

import dataclasses
import sys
import wave
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge import writers
from glm_edge.checkpoint import load, shipped
from glm_edge.errors import DataError, ExportError, OutputError
from glm_edge.export.common.quiet import quiet
from glm_edge.export.litertlm import signatures as lm_signatures
from glm_edge.export.litertlm.chat_templates import bundled_template, new_text
from glm_edge.export.litertlm.export import Bundle, litertlm, with_short_lengths
from glm_edge.generate.decoding import generate
from glm_edge.kernels.log_mel import log_mel
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.preprocess import AudioProcessing, ImageProcessing, chat, load_wav
from tests.export.litertlm.tiny_bundles import (
    AUDIO,
    MARKS,
    SLOTS,
    TEMPLATE,
    VOCABULARY,
    processor,
    tiny,
)

if not (find_spec("litert_lm") and find_spec("litert_lm_builder")):
    pytest.skip("the extra litertlm is not installed", allow_module_level=True)

HABITS = """{% set seen = namespace(count=0) %}
{% for message in messages %}
    {% if message.content is string %}
  {{ message['content'].strip() }}
    {% else %}
        {% for item in message.content if item.type == "text" %}
            {% set seen.count = seen.count + 1 %}
{{ item.text | trim }}{{ seen.count }}
        {% endfor %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}
"""
# Prints `content` as it is, as the template of GLM-4-9B-Chat does.
PRINTED = """{% for item in messages %}
{% if item['role'] == 'assistant' %}{{ ' <start> ' }}{% endif %}
{{ ' ' ~ item['content'] ~ ' ' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<begin> ' }}{% endif %}"""
LAST_ALONE = "' ~ ('<close>' if loop.last else '<image>') ~ '"
NEW = 12


def words(seed, count):
    rng = np.random.default_rng(seed)
    return " ".join(f"w{token:03d}" for token in rng.integers(len(MARKS), VOCABULARY, count))


def text(seed, count):
    return {"type": "text", "text": words(seed, count)}


def engine(bundle, **options):
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    cpu = litert_lm.Backend.CPU(thread_count=1)
    config = bundle.model.config
    if config.vision is not None:
        options |= {"vision_backend": cpu, "max_num_images": 3}
    if config.speech is not None:
        options["audio_backend"] = cpu
    cache = str(bundle.path.parent)
    return litert_lm.Engine(str(bundle.path), cpu, cache_dir=cache, **options)


def greedily(count):
    import litert_lm

    sampler = litert_lm.SamplerConfig(top_k=1, top_p=0.0, temperature=1.0)
    return {"sampler_config": sampler, "max_output_tokens": count}


def answer(opened, content, count=NEW):
    """What the engine answers to one message."""
    conversation = opened.create_conversation(**greedily(count))
    try:
        reply = conversation.send_message({"role": "user", "content": content})
    finally:
        conversation.close()
    return reply["content"][0]["text"]


def expected(bundle, content, count=NEW):
    """What JAX answers to it, and the inputs it was given."""
    content = [
        {"type": part["type"], part["type"]: part["path"]} if "path" in part else part
        for part in content
    ]
    inputs = bundle.processor([{"role": "user", "content": content}])
    tokens = generate(bundle.model, bundle.params, inputs, max_new_tokens=count).tokens
    return bundle.processor.decode(np.asarray(tokens)[0]), inputs


class Sections:
    """The `.tflite` files of a bundle in LiteRT's interpreter, driven by hand."""

    def __init__(self, bundle, directory):
        from ai_edge_litert.interpreter import Interpreter
        from litert_lm_builder import litertlm_builder

        litertlm_builder.unpack(str(bundle.path), str(directory))
        self.bundle, self._open = bundle, {}
        for section in bundle.sections:
            (file,) = directory.glob(f"*{section.lower()}.tflite")
            with quiet():
                interpreter = Interpreter(model_path=str(file), num_threads=1)
                for name in interpreter.get_signature_list():
                    self._open[name] = interpreter.get_signature_runner(name)

    def run(self, name, **inputs):
        with quiet():
            return self._open[name](**inputs)

    def cache(self):
        inputs = self._open["decode"].get_input_details()
        return {
            name: np.zeros(about["shape"], np.float32)
            for name, about in inputs.items()
            if name.startswith("kv_cache")
        }

    def step(self, name, tokens, start, cache):
        positions = np.zeros(len(tokens), np.int32)
        positions[:] = np.arange(start, start + len(tokens))
        visible = np.arange(self.bundle.cache_slots) <= positions[:, None]
        mask = np.where(visible, 0.0, -1e9).astype(np.float32)[None, None]
        tokens = np.array([tokens], np.int32)
        return self.run(name, tokens=tokens, input_pos=positions, mask=mask, **cache)

    def generate(self, prompt, count):
        """All tokens but the last by prefill, then one by one."""
        cache, start = self.cache(), 0
        while start < len(prompt) - 1:
            others = len(prompt) - 1 - start
            lengths = self.bundle.prefill_lengths
            length = min((n for n in lengths if n >= others), default=max(lengths))
            chunk = prompt[start : start + min(length, others)]
            padded = [*chunk, *[0] * (length - len(chunk))]
            cache = self.step(f"prefill_{length}", padded, start, cache)
            start += len(chunk)
        new = []
        while len(new) < count:
            last = new[-1] if new else prompt[-1]
            cache = self.step("decode", [last], start + len(new), cache)
            new.append(int(cache.pop("logits")[0, 0].argmax()))
        return new


def with_grid_positions(small_config, random_params, path, lengths, without=(), **encoders):
    """A bundle of a model whose rotary positions are time, row and column."""
    config = tiny(
        small_config,
        decoder={"mrope_section": (2, 3, 3), "partial_rotary_factor": 1.0},
        vision={"separable_positions": False, "temporal_patch_size": 2},
    )
    model = MultimodalGLM(dataclasses.replace(config, **dict.fromkeys(without)))

    def sharper(path, leaf):
        # So that where a token stands decides what is attended to.
        return leaf * 3.0 if path.endswith(("q_proj/weight", "k_proj/weight")) else leaf

    params = boxes.map_with_path(sharper, random_params(model))
    return litertlm(model, params, processor(**encoders), path, lengths, SLOTS)


@pytest.fixture(scope="module")
def in_three_dimensions(small_config, random_params, tmp_path_factory):
    """Such a model that sees and hears, as `phone_9b` does."""
    path = tmp_path_factory.mktemp("grid") / "grid.litertlm"
    encoders = {"image": ImageProcessing(min_pixels=1, patch_size=8), "audio": AUDIO}
    return with_grid_positions(small_config, random_params, path, (16,), **encoders)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Paths of images of 64 x 32 pixels and of recordings at 8 kHz."""
    from PIL import Image

    directory, rng, result = tmp_path_factory.mktemp("files"), np.random.default_rng(5), {}
    for index in range(3):
        result[f"image_{index}"] = str(directory / f"{index}.png")
        pixels = rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(result[f"image_{index}"])
    for count in (1600, 2560, 6400, 1637):
        result[f"audio_{count}"] = str(directory / f"{count}.wav")
        save_wav(result[f"audio_{count}"], rng.standard_normal(count) * 4000, 8000)
    return result


def save_wav(path, samples, rate):
    with wave.open(path, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def test_text_tokens_are_those_of_the_interpreter(text_bundle, tmp_path):
    sections = Sections(text_bundle, tmp_path)
    opened = engine(text_bundle)
    tokenizer = text_bundle.processor.tokenizer
    assert opened.eos_token_ids == [[0]]
    for seed, count in enumerate((1, 2, 8, 9, 31, 33, 40, 70)):
        prompt = words(seed, count)
        ids = tokenizer.encode(prompt).ids
        assert opened.tokenize(prompt) == ids
        session = opened.create_session(apply_prompt_template=False, **greedily(NEW))
        session.run_prefill([prompt])
        actual = session.run_decode().texts[0]
        session.close()
        wanted = sections.generate(ids, NEW)
        wanted = wanted[: wanted.index(0)] if 0 in wanted else wanted
        assert tokenizer.encode(actual).ids == wanted
        assert answer(opened, prompt) == actual
        assert answer(opened, [{"type": "text", "text": prompt}]) == actual


def test_an_answer_ends_before_a_stop_token(text_bundle, tmp_path):
    opened, complete, at = engine(text_bundle), [], 0
    for seed in range(8):
        actual = answer(opened, words(seed, 6)).split()
        latest = max(i for i, word in enumerate(actual) if word not in actual[:i])
        if latest > at:
            prompt, complete, at = words(seed, 6), actual, latest
    # A token that the answer reaches only after others.
    stop = text_bundle.processor.tokenizer.token_to_id(complete[at])
    config = dataclasses.replace(text_bundle.model.config, eos_token_ids=(0, stop))
    prepared = dataclasses.replace(text_bundle.processor, stop_token_ids=(0, stop))
    model = text_bundle.model.clone(config=config)
    path = tmp_path / "stops.litertlm"
    bundle = litertlm(model, text_bundle.params, prepared, path, (8,), SLOTS)
    actual = answer(engine(bundle), prompt)
    assert actual.split() == complete[:at]
    rounding = dataclasses.replace(bundle, model=model.clone(compute="int8_dynamic"))
    assert actual.split() == expected(rounding, [{"type": "text", "text": prompt}])[0].split()


def test_text_alone_has_three_equal_positions(small_config, random_params, tmp_path):
    without = ("vision", "speech", "image_token_id", "audio_token_id")
    path = tmp_path / "text.litertlm"
    bundle = with_grid_positions(small_config, random_params, path, (8,), without)
    assert set(bundle.sections) == {"PREFILL_DECODE"}
    opened = engine(bundle)
    for seed, count in enumerate((3, 9, 30)):
        assert answer(opened, [text(seed, count)]) == expected(bundle, [text(seed, count)])[0]


@pytest.mark.parametrize("family", [*chat.FAMILIES, "habits of Hugging Face"])
def test_the_runtime_renders_chat_templates_as_we_do(text_bundle, family):
    template = HABITS if family not in chat.FAMILIES else chat.family_template(family)
    kinds = {"image": [{"type": "image", "path": "x"}], "audio": [{"type": "audio", "path": "x"}]}
    texts = [{"type": "text", "text": " two\n<words> "}]
    conversation = engine(text_bundle).create_conversation(chat_template=template)
    # To a template that reads a list of parts, the runtime gives a string as such a list.
    plain = texts if template == HABITS else "one\nline"
    for content in (plain, texts, kinds["image"] + texts, kinds["audio"] + texts):
        message = {"role": "user", "content": content}
        try:
            wanted = chat.render(template, [message], None, True)
        except DataError:
            # The family reads no such part; the engine does not say so.
            continue
        assert conversation.render_message_to_string(message) == wanted
    conversation.close()


@pytest.mark.parametrize("name", ["printed", "of the last turn", "closed", "plain"])
def test_the_runtime_feeds_what_a_message_adds(text_bundle, name):
    template = {
        "printed": PRINTED,
        "of the last turn": PRINTED.replace("<start>", LAST_ALONE),
        "closed": PRINTED.replace("<start>", "<end>"),
        "plain": TEMPLATE,
    }[name]
    prepared = dataclasses.replace(processor(), template=template)
    source, _ = bundled_template(prepared)
    talk = engine(text_bundle).create_conversation(chat_template=source, **greedily(NEW))
    messages, used = [], 0
    for seed in range(3):
        question = words(seed, 3 + seed)
        messages.append({"role": "user", "content": question})
        added = prepared.tokenizer.encode(new_text(source, messages), add_special_tokens=False).ids
        reply = "".join(part["text"] for part in talk.send_message(question)["content"])
        generated = prepared.tokenizer.encode(reply).ids
        # The engine keeps a stop token, too.
        ended = len(generated) < NEW
        used += len(added) + len(generated) + ended
        assert talk.token_count == used
        messages.append({"role": "assistant", "content": reply})
    talk.close()


def test_every_bundle_has_short_prefill_signatures(text_bundle, heard_and_seen):
    assert text_bundle.prefill_lengths == (2, 8, 32)
    assert heard_and_seen.prefill_lengths == (2, 16, 32)
    assert with_short_lengths([], 8) == [2]
    assert with_short_lengths([2], 8) == [2]


def test_two_exports_of_one_model_are_the_same_bytes(tiny_text, text_bundle, tmp_path):
    second = tmp_path / "b.litertlm"
    litertlm(*tiny_text, processor(), second, (8, 32), SLOTS)
    content = second.read_bytes()
    assert text_bundle.path.read_bytes() == content
    assert b"1970-01-01T00:00:00" in content


def test_prefill_gives_no_logits_and_weights_are_stored_once(text_bundle, tmp_path):
    sections = Sections(text_bundle, tmp_path)
    cache = sections.cache()
    assert set(sections.step("prefill_8", [5] * 8, 0, cache)) == set(cache)
    assert set(sections.step("decode", [5], 0, cache)) == {*cache, "logits"}
    leaves = jax.tree.leaves(text_bundle.params)
    stored = sum(np.asarray(leaf).nbytes for leaf in leaves)
    assert text_bundle.sections["PREFILL_DECODE"] < 1.02 * stored + 200_000


def test_an_image_prompt_gives_the_tokens_of_jax(heard_and_seen, media):
    opened, actual = engine(heard_and_seen), []
    for index in range(2):
        image = {"type": "image", "path": media[f"image_{index}"]}
        content = [text(1, 3), image, text(2, 5)]
        actual.append(answer(opened, content))
        assert actual[-1] == expected(heard_and_seen, content)[0]
    assert actual[0] != actual[1]


def test_spoken_prompts_give_the_tokens_of_jax(heard_and_seen, media):
    opened, actual = engine(heard_and_seen), []
    # One after the other: nothing of a recording may be left for the next.
    for count in (1600, 2560, 6400, 1600):
        content = [text(3, 2), {"type": "audio", "path": media[f"audio_{count}"]}, text(4, 4)]
        actual.append(answer(opened, content))
        assert actual[-1] == expected(heard_and_seen, content)[0]
    assert actual[0] == actual[3]
    assert len(set(actual)) == 3
    # Of a last hop that is not whole, the runtime hears nothing.
    content = [{"type": "audio", "path": media["audio_1637"]}, text(4, 4)]
    samples, _ = load_wav(media["audio_1637"])
    complete = [{"type": "audio", "audio": samples[:1600]}, content[1]]
    assert answer(opened, content) == expected(heard_and_seen, complete)[0]


def test_image_and_recording_in_one_prompt(heard_and_seen, media):
    content = [
        {"type": "audio", "path": media["audio_2560"]},
        {"type": "image", "path": media["image_2"]},
        text(5, 3),
    ]
    actual = answer(engine(heard_and_seen), content)
    assert actual == expected(heard_and_seen, content)[0]


@pytest.mark.parametrize("layout", ["t", "it", "titit"])
def test_positions_in_three_dimensions_reach_the_decoder(in_three_dimensions, media, layout):
    shown = iter(range(3))
    content = [
        text(seed, 2 + seed)
        if kind == "t"
        else {"type": "image", "path": media[f"image_{next(shown)}"]}
        for seed, kind in enumerate(layout)
    ]
    actual = answer(engine(in_three_dimensions), content)
    assert actual == expected(in_three_dimensions, content)[0]


@pytest.mark.parametrize("layout", ["tit", "tita", "atit", "ta"])
def test_positions_in_three_dimensions_go_on_from_call_to_call(in_three_dimensions, media, layout):
    kinds = {"i": ("image", media["image_1"]), "a": ("audio", media["audio_2560"])}
    content = [
        text(seed, 14 + seed) if kind == "t" else {"type": kinds[kind][0], "path": kinds[kind][1]}
        for seed, kind in enumerate(layout)
    ]
    wanted, inputs = expected(in_three_dimensions, content)
    # All but the last token are given to prefill.
    assert inputs["tokens"].shape[1] - 1 > in_three_dimensions.prefill_lengths[-1]
    assert answer(engine(in_three_dimensions), content) == wanted


def test_positions_in_a_row_would_not_do(in_three_dimensions, media):
    content = [{"type": "image", "path": media["image_0"]}, text(0, 4)]
    inputs = expected(in_three_dimensions, content, 1)[1]
    model, params = in_three_dimensions.model, in_three_dimensions.params
    row = np.arange(inputs["tokens"].shape[1])[None]
    score = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs)[0][0, -1])
    right = score(inputs["tokens"], inputs["images"])
    flat = score(inputs["tokens"], inputs["images"], None, row)
    assert float(jnp.abs(right - flat).max()) > 0.5


@pytest.mark.parametrize(("fft_size", "hop"), [(200, 80), (400, 160)])
def test_log_mel_of_samples_is_the_spectrogram(fft_size, hop):
    processing = AudioProcessing(40, 16000, fft_size, hop)
    wanted = jax.jit(lambda x: log_mel(x.reshape(1, -1), 40, fft_size, hop, 16000))
    actual = jax.jit(lambda x: lm_signatures.log_mel_of_samples(x, processing))
    samples = np.random.default_rng(0).standard_normal((1, 20, hop)).astype(np.float32)
    samples[:, -5:] = 0.0
    for loudness in (1.0, 1e-3, 0.0):
        original = samples * np.float32(loudness)
        np.testing.assert_allclose(actual(original), wanted(original), atol=2e-4)


def test_what_cannot_be_written_is_refused(text_bundle, heard_and_seen, tmp_path):
    model, params = text_bundle.model, text_bundle.params
    with pytest.raises(OutputError, match="exists"):
        litertlm(model, params, processor(), text_bundle.path)
    with pytest.raises(
        ExportError, match="the model reads image, but its processor does not prepare it"
    ):
        litertlm(heard_and_seen.model, heard_and_seen.params, processor(), tmp_path / "new")
    with pytest.raises(ExportError, match="prefill_lengths"):
        litertlm(
            model,
            params,
            processor(),
            tmp_path / "new",
            prefill_lengths=(SLOTS + 1,),
            cache_slots=SLOTS,
        )
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(text_bundle, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[Bundle.__module__], "write_signatures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        litertlm(text_bundle.model, text_bundle.params, processor(), tmp_path / "new.litertlm")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_conversion(monkeypatch):
    """Writes sections without content, so that no model is converted."""

    def empty(signatures, shapes, stored, path):
        path.write_bytes(bytes(64))
        return 64

    monkeypatch.setattr(sys.modules[Bundle.__module__], "write_signatures", empty)


def test_a_bundle_is_written_whole_and_synced(tiny_text, no_conversion, tmp_path, monkeypatch):
    path, synced = tmp_path / "new.litertlm", []
    path.write_text("old")
    monkeypatch.setattr(writers, "_sync_path", synced.append)
    written = litertlm(*tiny_text, processor(), path, (8,), SLOTS, overwrite=True)
    assert written.file_bytes == path.stat().st_size > 64
    assert synced[-1] == tmp_path
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_bundle_replaces_no_link_made_meanwhile(tiny_text, no_conversion, tmp_path, monkeypatch):
    path, real = tmp_path / "new.litertlm", tmp_path / "real"
    module = sys.modules[Bundle.__module__]
    to_tflite_weights = module.to_tflite_weights

    def with_link(params):
        path.symlink_to(real)
        return to_tflite_weights(params)

    monkeypatch.setattr(module, "to_tflite_weights", with_link)
    with pytest.raises(OutputError, match=r"is a link to .*real"):
        litertlm(*tiny_text, processor(), path, (8,), SLOTS, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.is_symlink()
    assert not real.exists()


@pytest.mark.slow
def test_the_shipped_model_sees_and_hears(tmp_path):
    from PIL import Image

    directory = shipped("nano")
    model, params = load(directory)
    bundle = litertlm(model, params, directory, tmp_path / "nano.litertlm", (32, 128), 256)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (192, 96, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    chirp = np.sin(np.arange(12800) ** 2 * 1e-5) * 8000 + rng.standard_normal(12800) * 500
    save_wav(str(tmp_path / "long.wav"), chirp, 8000)
    save_wav(str(tmp_path / "short.wav"), chirp[:6400], 8000)
    image = {"type": "image", "path": str(tmp_path / "image.png")}
    long, short = ({"type": "audio", "path": str(tmp_path / f"{n}.wav")} for n in ("long", "short"))
    question = {"type": "text", "text": "tap the red button"}
    opened = engine(bundle)
    for content in ([question], [image, question], [short], [image, short], [image, long], [long]):
        assert answer(opened, content) == expected(bundle, content)[0]
    result = bundle.verify(prompts=12, max_new_tokens=16)
    assert result.passed
    assert result.tokens >= 12
