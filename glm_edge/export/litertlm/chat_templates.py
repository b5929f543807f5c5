"""Chat template of a bundle, with repairs for LiteRT-LM's engine.

The engine renders a template differently from `glm_edge.preprocess.Processor`:

* `content` is always a list of parts, even for a message of text alone.
* For every message after the first, it feeds only the new text. It renders the conversation so far
  without a generation prompt, then with the new message, and removes the first text from the start
  of the second. If the second does not begin with the first, the message fails.
* The stop token that ends an answer stays in its context.

This module simulates each rule on short conversations, with the original template and with repairs.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm_edge.errors import DataError, ExportError
from glm_edge.export.common.weights import Conversion
from glm_edge.preprocess import Processor, chat

PATH = "chat template"
# A line break, which is escaped where a template prints the list of parts.
QUESTIONS = ("The first\nquestion.", "The second\nquestion.", "The third\nquestion.")
ANSWERS = ("An answer.", "Another answer.")
SYSTEM = "A system\nprompt."
REASONING = "<think>A reason.</think>"
# Content of the message that stands for the next one while the conversation so far is rendered.
NEXT = "\ue00fnext\ue00f"
# Ends in `%}` and a line break, which rendering removes: the template then still starts a line.
JOIN = """{%- set glm_edge = namespace(messages=[], text='', plain=true) -%}
{%- for message in messages -%}
{%- if not message.content or message.content is string -%}
{%- set glm_edge.messages = glm_edge.messages + [message] -%}
{%- else -%}
{%- set glm_edge.text = '' -%}
{%- set glm_edge.plain = true -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{%- set glm_edge.text = glm_edge.text ~ part.text -%}
{%- else -%}
{%- set glm_edge.plain = false -%}
{%- endif -%}
{%- endfor -%}
{%- if glm_edge.plain -%}
{%- set glm_edge.messages = glm_edge.messages + [dict(message, content=glm_edge.text)] -%}
{%- else -%}
{%- set glm_edge.messages = glm_edge.messages + [message] -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = glm_edge.messages %}
"""
ANSWERED = """{%- set glm_edge_answered = messages and not add_generation_prompt \
and (messages | last).role == 'assistant' %}
"""
FOLLOWED = """{%- if glm_edge_answered -%}
{%- set messages = messages + [{'role': 'user', 'content': CONTENT}] -%}
{%- endif -%}
{%- set glm_edge_rendered %}
"""
CUT = """{% endset -%}
{%- if glm_edge_answered -%}{{ glm_edge_rendered.split(NEXT)[0] }}
{%- else -%}{{ glm_edge_rendered }}
{%- endif -%}"""
CLOSED = "{% if glm_edge_answered -%}{{ STOP }}{%- endif -%}"


@dataclass(frozen=True)
class Rendering:
    """The prompts that the engine makes with a template.

    Attributes:
      prompts: True if the first message, and a system prompt, render as with the checkpoint's
        template.
      messages: True if no later message fails.
      context: True if the engine's context equals the output of the checkpoint's template.
      reasoning: True if `context` also applies after an answer with reasoning.
      reason: description of the first difference.
    """

    prompts: bool
    messages: bool = False
    context: bool = False
    reasoning: bool = False
    reason: str = ""


def answer_end(processor: Processor) -> int | None:
    """Find the stop token that follows an answer.

    Args:
      processor: processor with the checkpoint's template.

    Returns:
      The stop token that the template writes there, or else the first one; None without stop
      tokens.
    """
    _, between = _around_an_answer(processor, reads_strings(processor))
    written = processor.tokenizer.token_to_id(_written_stop(processor, between))
    return next(iter(processor.stop_token_ids), None) if written is None else written


def bundled_template(
    processor: Processor, media: Sequence[str] = ()
) -> tuple[str, list[Conversion]]:
    """Make the chat template of a bundle.

    Args:
      processor: processor with the checkpoint's template.
      media: part types that the bundle reads besides text: `image` and `audio`.

    Returns:
      Jinja source with the values of the variables that the template reads, and descriptions of the
      repairs and the remaining differences.

    Raises:
      ExportError: the template writes no text or no placeholder, or the engine would read a
        different prompt and no repair helps.
    """
    strings = reads_strings(processor)
    lead, between = _around_an_answer(processor, strings)
    stop = _written_stop(processor, between)
    rendered: list[tuple[str, list[Conversion], Rendering]] = []
    for source, conversions in _candidates(processor, strings, between, stop):
        rendering = _rendering(source, processor, strings, lead, stop)
        rendered.append((source, conversions, rendering))
        if rendering.context:
            break
    # Of equal ones the first, which changes least.
    source, conversions, rendering = max(rendered, key=lambda candidate: _quality(candidate[2]))
    if not rendering.messages:
        raise ExportError(
            f"{PATH}: LiteRT-LM's engine would render it differently from the checkpoint: "
            f"{rendering.reason}; use a template that reads parts and does not change earlier "
            "turns: pass it as Processor.from_checkpoint(template=...)"
        )
    for kind in media:
        _check_placeholder(source, processor, kind)
    rules = []
    if not rendering.context:
        rules.append(
            f"from the second message on, the engine's context differs: {rendering.reason}"
        )
    elif not rendering.reasoning:
        rules.append("reasoning of earlier answers stays in the engine's context")
    if not stop:
        rules.append("the stop token after an answer stays in the engine's context")
    return source, conversions + [Conversion(PATH, rule, True) for rule in rules]


def reads_strings(processor: Processor) -> bool:
    """Return True if a template writes the text of a message whose content is a string.

    Args:
      processor: processor with the checkpoint's template.

    Returns:
      False if the template reads only parts.

    Raises:
      ExportError: the template writes neither that text nor the text of parts.
    """
    for strings in (True, False):
        try:
            if QUESTIONS[0] in processor.render(_conversation(QUESTIONS[:1], (), strings)):
                return strings
        except DataError:
            continue
    raise ExportError(
        f"{PATH}: it writes a message's text neither from a string nor from parts; use a template "
        "of this model: pass it as Processor.from_checkpoint(template=...)"
    )


def render_parts(source: str, messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
    """Render a bundle's template as the engine does, with `content` as parts.

    Args:
      source: Jinja source, with its variables.
      messages: messages of a conversation; content is text or parts.
      prompt: whether to append the generation prompt.

    Returns:
      The text.

    Raises:
      DataError: the template fails.
    """
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]
    return chat.render(source, parts, add_generation_prompt=prompt)


def new_text(source: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Render the text that the engine feeds for the last message of a conversation.

    Args:
      source: the bundle's template.
      messages: messages of the conversation, the new one last.

    Returns:
      The text.

    Raises:
      DataError: the template fails, or a new message changes the rendering of earlier turns.
    """
    if len(messages) == 1:
        return render_parts(source, messages, True)
    before = render_parts(source, messages[:-1], False)
    after = render_parts(source, messages, True)
    if not after.startswith(before):
        raise DataError("a message changes the rendering of earlier turns")
    return after[len(before) :]


def _constants(processor: Processor) -> str:
    used = [name for name in processor.variables if name in processor.template]
    values = {name: _literal(processor.variables[name]) for name in used}
    return "".join(f"{{%- set {name} = {value} %}}\n" for name, value in values.items())


def _literal(text: str) -> str:
    """Write a string literal that Jinja reads in Python and in the engine."""
    return json.dumps(text, ensure_ascii=False)


def _written_stop(processor: Processor, between: str) -> str:
    """Read the stop token at the start of the text between an answer and the next message."""
    stops = [processor.tokenizer.id_to_token(token) for token in processor.stop_token_ids]
    return max((text for text in stops if text and between.startswith(text)), key=len, default="")


def _candidates(
    processor: Processor, strings: bool, between: str, stop: str
) -> Iterator[tuple[str, list[Conversion]]]:
    """Yield the original template and repaired ones, the smallest change first."""
    template, constants = processor.template, _constants(processor)
    # Rendering drops one line break at the end of a template.
    inner = template.removesuffix("\n")
    closed = ANSWERED + inner + CLOSED.replace("STOP", _literal(stop))
    cut = CUT.replace("NEXT", _literal(between.removeprefix(stop) + NEXT))
    for join in (False, True) if strings else (False,):
        text = _literal(NEXT)
        content = text if join else f"[{{'type': 'text', 'text': {text}}}]"
        stable = ANSWERED + FOLLOWED.replace("CONTENT", content) + inner + cut
        turns: list[tuple[str, str | None]] = [(template, None)]
        if stop:
            turns.append(
                (closed, f"{stop} is written after an answer, as the engine keeps its token")
            )
        turns.append((stable, "earlier turns are rendered as they are when a message follows"))
        yield from _with_rules(constants, join, turns)


def _with_rules(
    constants: str, join: bool, turns: Sequence[tuple[str, str | None]]
) -> Iterator[tuple[str, list[Conversion]]]:
    for body, rule in turns:
        rules = ["the text parts of a message are joined"] if join else []
        rules += [rule] if rule else []
        source = constants + (JOIN if join else "") + body
        yield source, [Conversion(PATH, rule, False) for rule in rules]


def _rendering(source: str, processor: Processor, strings: bool, lead: str, stop: str) -> Rendering:
    try:
        for system in ((), (SYSTEM,)):
            conversation = _conversation(QUESTIONS[:1], (), strings, system)
            try:
                wanted = processor.render(conversation)
            except DataError:
                if system:
                    # A template without system prompts.
                    continue
                raise
            if render_parts(source, conversation, True) != wanted:
                return Rendering(
                    False, reason="it renders parts of a message differently from text"
                )
    except DataError as error:
        return Rendering(False, reason=str(error))
    same = []
    for thoughts in ("", REASONING):
        answers = [thoughts + answer for answer in ANSWERS]
        try:
            context = _context(source, QUESTIONS, [lead + answer for answer in answers], stop)
        except DataError as error:
            return Rendering(True, reason=str(error))
        read = re.findall("|".join(map(re.escape, (*QUESTIONS, *ANSWERS))), context)
        if read != [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1], QUESTIONS[2]]:
            return Rendering(True, reason="a message repeats or omits earlier messages")
        same.append(context == processor.render(_conversation(QUESTIONS, answers, strings)))
    reason = "" if same[0] else "an answer is rendered differently from the generated text"
    return Rendering(True, True, same[0], all(same), reason)


def _quality(rendering: Rendering) -> int:
    return rendering.prompts + rendering.messages + rendering.context


def _context(source: str, questions: Sequence[str], answers: Sequence[str], stop: str) -> str:
    """Return the text that the engine has read before it answers the last question."""
    messages: list[dict[str, Any]] = []
    context = ""
    for question, answer in itertools.zip_longest(questions, answers):
        messages.append({"role": "user", "content": question})
        context += new_text(source, messages)
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
            context += answer + stop
    return context


def _around_an_answer(processor: Processor, strings: bool) -> tuple[str, str]:
    """Return the space before a generated answer, and the text up to the next question."""
    try:
        prompt = processor.render(_conversation(QUESTIONS[:1], (), strings))
        text = processor.render(_conversation(QUESTIONS[:2], ANSWERS[:1], strings))
    except DataError:
        return "", ""
    before, answered, after = text.partition(ANSWERS[0])
    between, asked, _ = after.partition(QUESTIONS[1])
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return "" if lead.strip() else lead, between if answered and asked else ""


def _conversation(
    questions: Sequence[str],
    answers: Sequence[str],
    strings: bool,
    system: Sequence[str] = (),
) -> list[dict[str, Any]]:
    texts = [("system", text) for text in system]
    for question, answer in itertools.zip_longest(questions, answers):
        texts.append(("user", question))
        texts += [("assistant", answer)] if answer is not None else []
    return [
        {"role": role, "content": text if strings else [{"type": "text", "text": text}]}
        for role, text in texts
    ]


def _check_placeholder(source: str, processor: Processor, kind: str) -> None:
    token = {"image": processor.image_token, "audio": processor.audio_token}[kind]
    parts = [{"type": kind}, {"type": "text", "text": QUESTIONS[0]}]
    try:
        text = render_parts(source, [{"role": "user", "content": parts}], True)
    except DataError as error:
        raise ExportError(f"{PATH}: it fails on a message with {kind} and text: {error}") from error
    if token not in text or QUESTIONS[0] not in text:
        raise ExportError(
            f"{PATH}: for a message with {kind} and text it does not write both {token!r} and the "
            "text; use a template of this model: pass it as "
            "Processor.from_checkpoint(template=...)"
        )
