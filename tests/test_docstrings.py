"""The examples in docstrings of the most used functions: they parse, and their names exist."""

import ast
import inspect
import re

import pytest

import glm_edge as ge

DOCUMENTED = {
    "load": ge.load,
    "save": ge.save,
    "chain": ge.chain,
    "chat": ge.chat,
    "distill": ge.distill,
    "plan": ge.plan,
    "Processor": ge.Processor,
    "rtn": ge.quantize.rtn,
    "hqq": ge.quantize.hqq,
    "gptq": ge.quantize.gptq,
    "awq": ge.quantize.awq,
    "magnitude": ge.prune.magnitude,
    "mask": ge.prune.mask,
    "structured": ge.prune.structured,
    "generate": ge.generate.generate,
    "tflite": ge.export.tflite,
    "litertlm": ge.export.litertlm,
}


def example_of(function) -> str:
    """Indented lines of a docstring before its sections."""
    text = re.split(r"^(?:Args|Attributes):", inspect.getdoc(function), flags=re.MULTILINE)[0]
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))


def resolved(node: ast.AST):
    if isinstance(node, ast.Name):
        return ge if node.id == "ge" else None
    owner = resolved(node.value) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_holds_an_example_of_its_function(name):
    example = ast.parse(example_of(DOCUMENTED[name]))
    calls = [node for node in ast.walk(example) if isinstance(node, ast.Call)]
    called = [(resolved(call.func), call) for call in calls]
    assert name in ast.unparse(example)
    for function, call in called:
        if inspect.isroutine(function):
            arguments = [None] * len(call.args)
            keywords = {k.arg: None for k in call.keywords if k.arg}
            inspect.signature(function).bind_partial(*arguments, **keywords)
