"""Rules by which delegates accept operators, read from `rules.toml`.

A delegate rejects every operator that its table lacks. Conditions that depend on several properties
of an operator, or on its graph, are functions of `conditions.py`, which the table names.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = "https://github.com/google-ai-edge/LiteRT/blob"


@dataclass(frozen=True)
class Rule:
    """The conditions of a delegate for one operator.

    Attributes:
      version: highest version of the operator, None for any.
      types: allowed types by position of the input; an input may be absent.
      max_rank: highest rank of the first two inputs, None for any.
      constant: positions of inputs that must be constants.
      computed: allowed numbers of inputs that are computed at run time, None for any.
      inputs: number of inputs, None for any.
      outputs: number of outputs, None for any.
      rank: allowed ranks of the first input, None for any.
      output_rank: lowest and highest rank of the first output, None for any.
      options: allowed values of the operator's options by field name of the schema.
      unread: whether the rule also depends on strides, paddings or axes, which are not read here.
      undecided: reason why no file is enough to decide, or None.
      refused: reason why the operator is always rejected, or None.
      conditions: names of functions in `conditions.py`.
      source: URL of the rule.
    """

    version: int | None = None
    types: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    max_rank: int | None = None
    constant: tuple[int, ...] = ()
    computed: tuple[int, ...] | None = None
    inputs: int | None = None
    outputs: int | None = None
    rank: tuple[int, ...] | None = None
    output_rank: tuple[int, int] | None = None
    options: Mapping[str, int] = field(default_factory=dict)
    unread: bool = False
    undecided: str | None = None
    refused: str | None = None
    conditions: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Delegate:
    """An accelerator that runs operators instead of the CPU.

    Attributes:
      name: name and column heading of the delegate.
      title: full name of the delegate.
      source: URL of the file that lists its operators.
      conditions: names of functions in `conditions.py` that every operator must satisfy, checked
        first.
      note: limitations of its verdicts.
      rules: rules by operator; other operators are rejected.
    """

    name: str
    title: str
    source: str
    conditions: tuple[str, ...]
    note: str
    rules: Mapping[str, Rule]


def _read_rules() -> tuple[str, dict[str, str], tuple[Delegate, ...]]:
    table = tomllib.loads(Path(__file__).with_name("rules.toml").read_text(encoding="utf-8"))
    root = f"{ROOT}/{table['commit']}"
    sources = {name: f"{root}/{path}" for name, path in table["condition_sources"].items()}
    delegates = tuple(_delegate(fields, root) for fields in table["delegates"])
    return table["commit"], sources, delegates


def _delegate(fields: dict[str, Any], root: str) -> Delegate:
    source = f"{root}/{fields['source']}"
    rules: dict[str, Rule] = {}
    for entry in fields["rules"]:
        entry = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
        entry["types"] = {int(k): tuple(v.split()) for k, v in entry.get("types", {}).items()}
        entry["source"] = f"{root}/{entry['source']}" if "source" in entry else source
        operators = entry.pop("operators").split()
        rules |= dict.fromkeys(operators, Rule(**entry))
    conditions = tuple(fields["conditions"])
    return Delegate(**{**fields, "source": source, "conditions": conditions, "rules": rules})


COMMIT, CONDITION_SOURCES, DELEGATES = _read_rules()
