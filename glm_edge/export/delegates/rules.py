"""Rules by which delegates take operators from the CPU, read from `rules.toml`.

An operator that a delegate's table lacks is refused by it. Conditions that depend on a whole
operator or on its graph are functions of `conditions.py`, named in the table.
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
      types: by position of an input, the allowed types; an input may be absent.
      max_rank: of the first two inputs, None for any.
      constant: positions of inputs that must be constants of the file.
      computed: allowed counts of inputs that are computed at run time, None for any.
      inputs: count of inputs, None for any.
      outputs: count of outputs, None for any.
      rank: allowed ranks of the first input, None for any.
      output_rank: least and largest rank of the first output, None for any.
      options: fields of the operator's options, by the schema's names, to the allowed value.
      unread: strides, paddings or axes count too, which are not read here.
      undecided: a reason why no file decides, or None.
      refused: a reason why the operator is always refused, or None.
      conditions: names of functions of `conditions.py`.
      source: address of the rule.
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
    """An accelerator that takes operators from the CPU.

    Attributes:
      name: column of the table.
      title: of the delegate.
      source: address of the file that lists its operators.
      conditions: names of functions of `conditions.py` for every operator, checked first.
      note: limits of its verdicts.
      rules: by operator; others are refused.
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
