"""Chat templates: what each family reads, what a checkpoint brings, and what goes wrong."""

import datetime
import json

import numpy as np
import pytest

from glm_edge.errors import CheckpointError, ConfigError, DataError
from glm_edge.preprocess.chat import (
    FAMILIES,
    checkpoint_template,
    family_template,
    render,
    split_thinking,
)


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "再见\n"},
]
VIDEO = {"type": "video"}
PICTURE = [
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "What "},
            VIDEO,
            {"type": "text", "text": "is it?"},
        ],
    }
]
RECORDING = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Go "}]}]
CALL = {"id": "1", "type": "function", "function": {"name": "天气", "arguments": '{"a": "b"}'}}
CALLED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "天气", "content": "sun"},
    {"role": "user", "content": "And?"},
]
CALLING = ("glm_4", "glm_4_0414")
TOOL = {"type": "function", "function": {"name": "天气", "parameters": {"city": "<x>"}}}


def test_glm_edge():
    assert render(family_template("glm_edge"), TURNS) == (
        "<|system|>\nBe brief.<|user|>\nHi <b><|assistant|>\nHello<|user|>\n再见\n<|assistant|>\n"
    )


def test_glm_edge_v_writes_one_placeholder_an_image():
    pictured = [{"role": "user", "content": [p for p in PICTURE[0]["content"] if p != VIDEO]}]
    assert render(family_template("glm_edge_v"), pictured) == (
        "<|user|>\n<|begin_of_image|>What is it?\n<|assistant|>\n"
    )


def test_glm_4():
    assert render(family_template("glm_4"), TURNS) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi <b><|assistant|>\nHello"
        "<|user|>\n再见\n<|assistant|>"
    )
    called = [{"role": "assistant", "metadata": "天气", "content": "{}"}]
    text = render(family_template("glm_4"), called, add_generation_prompt=False)
    assert text == "[gMASK]<sop><|assistant|>天气\n{}"


def test_glm_4_lists_tools_that_a_message_brings():
    text = render(family_template("glm_4"), [{"role": "system", "content": "", "tools": [TOOL]}])
    listed = json.dumps(TOOL["function"], indent=4, ensure_ascii=False)
    assert text.startswith("[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。")
    assert text.endswith(
        f"\n## 天气\n\n{listed}\n在调用上述函数时，请使用 Json 格式表示调用的参数。<|assistant|>"
    )
    with pytest.raises(DataError, match="only tools of type 'function' are known, not python"):
        render(family_template("glm_4"), TURNS, tools=[{"type": "python"}])


def test_glm_4_0414_puts_tools_and_system_messages_first():
    late = {"role": "system", "content": "Late."}
    called = [
        {"role": "assistant", "metadata": "天气", "content": "{}"},
        {"role": "observation", "content": "sun"},
    ]
    listed = json.dumps(TOOL["function"], indent=4, ensure_ascii=False)
    assert render(family_template("glm_4_0414"), [*TURNS, *called, late], tools=[TOOL]) == (
        f"[gMASK]<sop><|system|>\n# 可用工具\n\n## 天气\n\n{listed}\n"
        "在调用上述函数时，请使用 Json 格式表示调用的参数。"
        "<|system|>\nBe brief.<|system|>\nLate.<|user|>\nHi <b><|assistant|>\nHello"
        "<|user|>\n再见\n<|assistant|>天气 \n{}<|observation|>\nsun<|assistant|>"
    )
    assert render(family_template("glm_4_0414"), TURNS).endswith("再见\n<|assistant|>")


@pytest.mark.parametrize(("family", "gap"), [("glm_4", ""), ("glm_4_0414", " ")])
def test_glm_4_writes_calls_and_results(family, gap):
    template = family_template(family)
    text = (
        f"[gMASK]<sop><|user|>\nHi<|assistant|>天气{gap}\n%s<|observation|>\nsun"
        "<|user|>\nAnd?<|assistant|>"
    )
    assert render(template, CALLED) == text % '{"a": "b"}'
    function = {"name": "天气", "arguments": {"城": 1}}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    parts = {"role": "tool", "content": [{"type": "text", "text": "sun"}]}
    assert render(template, [CALLED[0], called, parts, CALLED[3]]) == text % '{"城": 1}'
    message = {**called, "content": "Let me see."}
    assert "<|assistant|>\nLet me see.<|assistant|>天气" in render(template, [CALLED[0], message])
    # An empty result is a result.
    empty = [*CALLED[:2], {"role": "tool", "content": ""}]
    assert render(template, empty).endswith("<|observation|>\n<|assistant|>")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"role": "developer"},
        {"role": "narrator"},
        {"name": "Ada"},
        {"reasoning_content": "hm"},
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"tool_calls": [CALL]},
        {"content": [{"type": "text", "text": "a"}, {"type": "audio"}, {"type": "image"}]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nothing_of_a_message_vanishes(family, changes):
    message = {"role": "user", "content": "hi", **changes}
    with pytest.raises(DataError, match=r"unknown here|only an assistant's message"):
        render(family_template(family), [message])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_conversation_vanishes(family):
    template = family_template(family)
    with pytest.raises(DataError, match=r"documents are unknown here|tools and documents"):
        render(template, TURNS, documents=[{"text": "a"}])
    if family in CALLING:
        assert "天气" in render(template, TURNS, tools=[TOOL])
    else:
        with pytest.raises(DataError, match="tools and documents are unknown here"):
            render(template, TURNS, tools=[TOOL])
    # Empty fields, which some clients send, say nothing.
    empty = {"tool_calls": [], "name": None, "function_call": None, "refusal": None}
    assert render(template, [{**TURNS[1], **empty}]) == render(template, [TURNS[1]])


def test_glm_4_1v_keeps_the_order_of_parts_and_opens_no_thinking():
    answered = {"role": "assistant", "content": "<think>A star.</think><answer>Star</answer>"}
    assert render(family_template("glm_4_1v"), [TURNS[0], *PICTURE, answered, TURNS[3]]) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n"
        "<|begin_of_image|><|image|><|end_of_image|>What "
        "<|begin_of_video|><|video|><|end_of_video|>is it?"
        "<|assistant|>\n<think>A star.</think><answer>Star</answer><|user|>\n再见\n<|assistant|>\n"
    )


def test_glm_asr_opens_a_second_turn_after_the_recording():
    assert render(family_template("glm_asr"), RECORDING) == (
        "<|user|>\n<|begin_of_audio|><|pad|><|end_of_audio|><|user|>\nGo<|assistant|>\n"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("messages", "reading"),
    [(TURNS, FAMILIES), (PICTURE, ["glm_4_1v"]), (RECORDING, ["glm_asr"]), (CALLED, CALLING)],
    ids=["text", "image", "audio", "tools"],
)
def test_rendering_is_transformers(family, messages, reading):
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    template = family_template(family)
    if family not in reading:
        with pytest.raises(DataError, match="unknown here"):
            render(template, messages)
        return
    for opened in (True, False):
        [expected], _ = reference.render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=opened
        )
        assert render(template, messages, add_generation_prompt=opened) == expected


@pytest.mark.parametrize(
    "template",
    [
        "  {% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\nend",
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools is none }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}"
        "{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}|{{ bos_token }}|{{ extra }}",
        "{% set ns = namespace({'a': 1}, b=2) %}{% set ns.a = 3 %}{{ ns.a + ns.b }}{{ dict(c=1) }}",
    ],
    ids=["whitespace", "json", "loops", "generation", "namespace"],
)
def test_what_templates_may_use_is_transformers(template):
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<s>", "extra": [1, {"a": None}]}
    [expected], _ = reference.render_jinja_template([TURNS], chat_template=template, **variables)
    assert render(template, TURNS, add_generation_prompt=False, **variables) == expected


def test_messages_keep_the_order_of_their_fields():
    assert render("{{ messages }}", [{"role": "user", "content": "a", "n": 1}]) == (
        "[{'role': 'user', 'content': 'a', 'n': 1}]"
    )


def test_templates_can_ask_for_the_date():
    year = datetime.datetime.now().year
    assert render("{{ strftime_now('%Y') }}", TURNS) in (str(year), str(year + 1))


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        ("{{ raise_exception('no images') }}", "TemplateError: no images"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ missing.field }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ namespace(_private=1) }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{% include 'a' %}", "SecurityError: 'include' is not allowed"),
        ("{{ lipsum() }}", "UndefinedError"),
        ("{{ 'a' | urlize }}", "TemplateAssertionError: no filter named 'urlize'"),
        ("{{ 'x' * 10**9 }}", "TemplateLimitError: makes values of more than"),
        ("{{ '%999999999d' % 1 }}", "TemplateLimitError"),
        ("{{ strftime_now('%999999999Y') }}", "ValueError: the layout of a date"),
        ("x" * (1 << 21), "TemplateLimitError: has 2097152 characters"),
    ],
    ids=range(17),
)
def test_failing_and_hostile_templates_raise_one_error(template, pattern):
    with pytest.raises(DataError, match=f"chat template: {pattern}") as excinfo:
        render(template, TURNS)
    assert "\n" not in str(excinfo.value)


@pytest.mark.parametrize(
    ("message", "pattern"),
    [
        ("hi", r"messages\[0\]: must be an object with a 'role'"),
        ({"content": "hi"}, "must be an object with a 'role'"),
        ({"role": "user", "content": 3}, "content must be a string or a list"),
        ({"role": "user", "content": [{"type": "smell"}]}, r"content\[0\] must be a text part"),
        ({"role": "user", "content": [{"type": "text"}]}, "must be a text part with its 'text'"),
        ({"role": "user", "content": "", "extra": np.zeros(2)}, "JSON values only, found ndarray"),
        ({"role": "user", "content": b"hi"}, "content must be a string or a list"),
        ({"role": "user", "content": "\ud800"}, "half of a surrogate pair"),
        ({"role": "user", "content": "", "extra": {(1,): 2}}, "field names must be strings"),
        ({"role": "user", "content": "", "extra": deep(100)}, "nested deeper than 64"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "must be a text part"),
    ],
    ids=range(11),
)
def test_malformed_messages_are_refused(message, pattern):
    with pytest.raises(DataError, match=pattern):
        render(family_template("glm_edge"), [message])


def test_unknown_families_are_refused():
    with pytest.raises(ConfigError, match="unknown family 'llama'; known: glm_edge"):
        family_template("llama")


def test_a_checkpoint_brings_its_template(tmp_path):
    assert checkpoint_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert checkpoint_template(tmp_path) == "one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert checkpoint_template(tmp_path) == "two"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert checkpoint_template(tmp_path) == "three"
    (tmp_path / "chat_template.jinja").write_text("四")
    assert checkpoint_template(tmp_path) == "四"


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"[1]", "must be a JSON object, not list"),
        (
            "tokenizer_config.json",
            b'{"chat_template": 3}',
            "must be a string or a list of named strings",
        ),
        ("tokenizer_config.json", b'{"chat_template": []}', "no template named 'default'"),
        ("tokenizer_config.json", b"[" * 200_000, "not JSON that can be read"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8 text"),
    ],
    ids=range(6),
)
def test_damaged_files_are_named(tmp_path, name, content, pattern):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=pattern) as excinfo:
        checkpoint_template(tmp_path)
    assert name in str(excinfo.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a b</think><answer>do()</answer>", ("a b", "do()")),
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", ("a", "b")),
        ("<think>a</think>b", ("a", "b")),
        ("a</think><answer>b", ("a", "b")),
        ("<think>never closed", ("never closed", "")),
        ("<answer>b</answer> rest", ("", "b")),
        ("b", ("", "b")),
    ],
)
def test_thinking_is_parted_from_the_answer(text, expected):
    assert split_thinking(text) == expected
