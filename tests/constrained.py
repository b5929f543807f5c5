"""Constraints of nano's tokenizer, and Open-AutoGLM's client as a reader of actions."""

import ast
import functools

import numpy as np

import glm_edge as ge
from glm_edge.generate import Constraints

VOCABULARY, STOP = 2304, 0


@functools.cache
def nano_tokenizer():
    return ge.load_tokenizer(ge.shipped("nano"))


@functools.cache
def nano_constraints():
    return Constraints(nano_tokenizer(), [STOP], VOCABULARY)


def tokens_of(words):
    return np.flatnonzero(np.unpackbits(np.asarray(words).view(np.uint8), bitorder="little"))


def accepts(constraints, tokenizer, grammar, text):
    """Tests that the grammar allows the tokens of a text and, after them, the end."""
    matcher = constraints.start(grammar)
    for token in tokenizer.encode(text).ids:
        if token not in tokens_of(matcher.allowed()):
            return False
        matcher.accept(token)
    return STOP in tokens_of(matcher.allowed())


def split_by_markers(content):
    """Thinking and action as Open-AutoGLM's client of commit 6b18d7b separates them."""
    for marker in ("finish(message=", "do(action="):
        if marker in content:
            thinking, action = content.split(marker, 1)
            return thinking.strip(), marker + action
    if "<answer>" in content:
        return split_by_tags(content)
    return "", content


def split_by_tags(content):
    """Thinking and action as its later versions do."""
    if "<answer>" not in content:
        return split_by_markers(content)
    thinking, action = content.split("<answer>", 1)
    thinking = thinking.replace("<think>", "").replace("</think>", "").strip()
    return thinking, action.replace("</answer>", "").strip()


def parse_action(response):
    """Parses an action as its `parse_action` does, without the fallbacks."""
    response = response.strip()
    if response.startswith(('do(action="Type"', 'do(action="Type_Name"')):
        return {"action": "Type", "text": response.split("text=", 1)[1][1:-2]}
    if response.startswith("do"):
        for character, escaped in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
            response = response.replace(character, escaped)
        call = ast.parse(response, mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert response.startswith("finish(message=")
    return {"message": response.replace("finish(message=", "")[1:-2]}
