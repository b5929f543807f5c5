"""A bundle's engine reads what the checkpoint's chat template writes, or the export refuses."""

import pytest

from glm_edge.errors import DataError, ExportError
from glm_edge.export.litertlm.chat_templates import (
    bundled_template,
    new_text,
    reads_strings,
    render_parts,
)
from glm_edge.preprocess import Processor, chat

USER = "<|user|>"
# In the manner of GLM-4-9B-Chat's and GLM-Edge's: `content` is printed as it is.
PRINTS = """{{ bos_token }}{% for item in messages %}{% if item['content'] %}
<|{{ item['role'] }}|>{{ item['metadata'] }}
{{ item['content'] }}{% endif %}{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
# Shows reasoning in what follows the last question, empty or not, and nowhere else.
REASONS_LAST = """{% set ns = namespace(last=-1) %}
{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{% endfor %}
{% for m in messages %}
{% set text = m.content if m.content is string else m.content[0].text %}
{% if m.role == 'assistant' %}
{{ '<|assistant|>' ~ ('<think></think>' if loop.index0 > ns.last else '') }}{{ text }}
{% else %}
{{ '<|' ~ m.role ~ '|>' ~ text }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
# Writes a mark behind an answer, which the engine would leave out.
ENDS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}<|assistant|>"
PARTS = """{% for m in messages %}<|{{ m.role }}|>
{%- for part in m.content %}{{ part.text if part.type == 'text' else '<' ~ part.type ~ '>' }}
{%- endfor %}{% endfor %}<|assistant|>"""
HIDES_REASONS = PRINTS.replace(
    "{{ item['content'] }}", "{{ item['content'].split('</think>')[-1] }}"
)


def processor(template, stop=USER):
    import tokenizers

    ids = {word: index for index, word in enumerate(("<end>", USER, "<|assistant|>", "word"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="word"))
    variables = {"bos_token": "[gMASK]<sop>\"'\n"}
    return Processor(tokenizer, template, stop_token_ids=(ids[stop],), variables=variables)


def talk(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def rules(template, stop=USER):
    return [str(conversion) for conversion in bundled_template(processor(template, stop))[1]]


@pytest.mark.parametrize(
    "template", [PRINTS, REASONS_LAST, *map(chat.family_template, chat.FAMILIES)]
)
def test_the_engine_reads_what_the_checkpoint_writes(template):
    prepared = processor(template)
    source, _ = bundled_template(prepared)
    texts = ["What is\n'{{ 2 }}'?", 'A "word".', "And\tthen?", "More.", "  Space "]
    context = ""
    for count in (1, 3, 5):
        lead = "\n" if count > 1 and template.endswith("<|assistant|>{% endif %}") else ""
        answer = lead + texts[count - 2] if count > 1 else ""
        stop = USER if count > 1 and "is written after an answer" in str(rules(template)) else ""
        context += answer + stop + new_text(source, talk(*texts[:count]))
        if "m.content" not in template:
            assert context.replace("\n", "") == prepared.render(talk(*texts[:count])).replace(
                "\n", ""
            )
    first = [{"role": "system", "content": "Be\nbrief."}, *talk(texts[0])]
    assert render_parts(source, first, True) == prepared.render(first)


def test_printed_content_is_joined_and_listed():
    source, conversions = bundled_template(processor(PRINTS))
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    message = [{"role": "user", "content": parts}]
    assert chat.render(source, message).endswith("<|user|>\none two<|assistant|>")
    assert [str(c) for c in conversions] == [
        "chat template: the text parts of a message are joined",
        "chat template: <|user|> is written after an answer, as the engine keeps its token",
    ]
    # The template alone writes the list.
    assert "'text'" in chat.render(PRINTS, message, bos_token="")


def test_earlier_turns_stay_when_a_message_follows():
    with pytest.raises(DataError, match="changes the rendering of earlier turns"):
        new_text(REASONS_LAST, talk("one", "two", "three"))
    source, conversions = bundled_template(processor(REASONS_LAST))
    assert "earlier turns are rendered as they are" in str(conversions[0])
    assert not conversions[0].changes_values
    added = new_text(source, talk("one", "two", "three"))
    assert added == "\n<|user|>three\n<|assistant|>"


def test_a_mark_behind_an_answer_is_fed_or_counted_as_generated():
    # As a stop token it is in the engine's context already.
    assert new_text(bundled_template(processor(ENDS, "<end>"))[0], talk("a", "b", "c")) == (
        "\n<|user|>c<end>\n<|assistant|>"
    )
    assert new_text(bundled_template(processor(ENDS))[0], talk("a", "b", "c")) == (
        "<end>\n<|user|>c<end>\n<|assistant|>"
    )


def test_reasoning_and_stop_tokens_that_stay_are_listed():
    assert any("reasoning of earlier answers stays" in rule for rule in rules(HIDES_REASONS))
    assert any("stop token after an answer stays" in rule for rule in rules(PRINTS, "<end>"))
    assert rules(chat.family_template("glm_edge")) == [
        "chat template: <|user|> is written after an answer, as the engine keeps its token"
    ]


def test_a_template_of_parts_stays_as_it_is():
    prepared = processor(PARTS)
    assert not reads_strings(prepared)
    assert reads_strings(processor(PRINTS))
    source, conversions = bundled_template(prepared, ["image"] * 0)
    assert "joined" not in str(conversions)
    assert render_parts(source, talk("one"), True).startswith("<|user|>one")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}", "writes a message's text neither from a string nor from parts"),
        (
            "{{ messages[0].content }}{{ 1 / 0 }}",
            "writes a message's text neither from a string nor from parts",
        ),
        (
            "{{ (messages | last).content }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "differently from the checkpoint: a message .*; use a template that reads parts",
        ),
    ],
)
def test_a_template_that_no_repair_helps_is_refused(template, message):
    with pytest.raises(ExportError, match=message) as caught:
        bundled_template(processor(template))
    assert "\n" not in str(caught.value)


def test_a_template_without_placeholders_is_refused_for_images():
    with pytest.raises(ExportError, match=r"image and text it does not write both '<\|image\|>'"):
        bundled_template(processor(PRINTS), ["image"])
    bundled_template(processor(PARTS.replace("'<' ~ part.type ~ '>'", "'<|image|>'")), ["image"])
