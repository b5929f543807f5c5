"""Table of the operators of a TFLite file that each delegate accepts by its published rules."""

import collections
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_edge.export.delegates.conditions import CONDITIONS, GraphContext, Undecided
from glm_edge.export.delegates.rules import CONDITION_SOURCES, DELEGATES, Delegate, Rule
from glm_edge.export.tflite.reader import Graph, Operator, read_graphs
from glm_edge.tables import table_lines

YES, NO, UNKNOWN = "yes", "no", "unknown"
UNREAD = "depends also on strides, paddings or axes, which are not read here"
# Default values of absent options; others default to zero.
_DEFAULTS = {"Beta": 1}


@dataclass(frozen=True)
class Verdict:
    """The decision of one delegate about one operator.

    Attributes:
      accepted: `yes`, `no` (the operator falls back to the CPU) or `unknown`.
      reason: reason why the decision is not `yes`.
      source: URL of the rule.
    """

    accepted: str
    reason: str
    source: str


@dataclass(frozen=True)
class OperatorGroup:
    """Operators of one signature that every delegate treats alike.

    Attributes:
      signature: name of their signature.
      operator: builtin name.
      version: version of the operator.
      types: types of inputs and outputs, such as `float32, int4/blocks of 32 -> float32`. A slash
        precedes the granularity of a constant's or weight's scales; `-` is an absent input.
      count: number of operators.
      verdicts: verdict by name of the delegate.
    """

    signature: str
    operator: str
    version: int
    types: str
    count: int
    verdicts: dict[str, Verdict]


@dataclass(frozen=True)
class Compatibility:
    """The operators of a file that each delegate accepts; it prints as a table.

    Attributes:
      path: path of the file.
      rows: groups of operators in the file's order.
    """

    path: Path
    rows: tuple[OperatorGroup, ...]

    @property
    def signatures(self) -> tuple[str, ...]:
        """Names of the graphs, in the file's order."""
        return tuple(dict.fromkeys(row.signature for row in self.rows))

    @property
    def delegates(self) -> tuple[str, ...]:
        """Names of the delegates."""
        return tuple(delegate.name for delegate in DELEGATES)

    def fallback(self, delegate: str, signature: str | None = None) -> list[OperatorGroup]:
        """List the operators that a delegate rejects, which run on the CPU.

        Args:
          delegate: `nnapi`, `gpu`, `hexagon`, `qnn` or `coreml`.
          signature: name of one signature; None selects all.

        Returns:
          The rows that it rejects.
        """
        return [row for row in self._of(signature) if row.verdicts[delegate].accepted == NO]

    def counts(self, delegate: str, signature: str | None = None) -> dict[str, int]:
        """Count operators by verdict: `yes`, `no` and `unknown`.

        Args:
          delegate: name of the delegate.
          signature: name of one signature; None selects all.

        Returns:
          Number of operators by verdict.
        """
        counted = dict.fromkeys((YES, NO, UNKNOWN), 0)
        for row in self._of(signature):
            counted[row.verdicts[delegate].accepted] += row.count
        return counted

    def _of(self, signature: str | None) -> list[OperatorGroup]:
        return [row for row in self.rows if signature in (None, row.signature)]

    def summary(self) -> str:
        """Summarize each delegate in one line: accepted operators, and the main refusal.

        Returns:
          One line per delegate.
        """
        lines = []
        for delegate in DELEGATES:
            counted = self.counts(delegate.name)
            line = f"{delegate.title}: {counted[YES]} of {sum(counted.values())} operators"
            if counted[UNKNOWN]:
                line += f", {counted[UNKNOWN]} unknown"
            reasons: collections.Counter[str] = collections.Counter()
            for row in self.fallback(delegate.name):
                reasons[f"{row.operator}: {row.verdicts[delegate.name].reason}"] += row.count
            if reasons:
                reason, count = reasons.most_common(1)[0]
                line += f"; {counted[NO]} on the CPU, most ({count}) because of {reason}"
            lines.append(line)
        return "\n".join(lines)

    def __str__(self) -> str:
        cells = [["signature", "operator", "count", "types", *self.delegates]]
        reasons: dict[tuple[str, str, str], int] = {}
        for row in self.rows:
            marks = []
            for name in self.delegates:
                verdict = row.verdicts[name]
                mark = verdict.accepted
                if verdict.reason:
                    key = (name, verdict.reason, verdict.source)
                    mark += f" [{reasons.setdefault(key, len(reasons) + 1)}]"
                marks.append(mark)
            operator = f"{row.operator} v{row.version}"
            cells.append([row.signature, operator, str(row.count), row.types, *marks])
        header, *lines = table_lines(cells)
        lines = [header, "-" * len(header), *lines, ""]
        lines += ["yes: runs on the delegate; no: runs on the CPU", self.summary(), ""]
        lines += [f"[{i}] {name}: {why} <{url}>" for (name, why, url), i in reasons.items()]
        return "\n".join([*lines, *(f"{d.name}: {d.note}" for d in DELEGATES)])


def compatibility(path: str | Path) -> Compatibility:
    """List which delegates accept each operator of a TFLite file, without running it.

    Applies the rules of LiteRT's published sources (`delegates.rules`) to the types, versions and
    shapes of the file. They determine which operators a delegate is offered. They do not predict
    its speed, or which operators a driver then rejects. The verdict is `unknown` if the file alone
    is not enough to decide.

    Args:
      path: path of any TFLite file, also of one that glm_edge did not write.

    Returns:
      The table.

    Raises:
      ExportError: the file is missing, not TFLite, or damaged.

    References:
      https://github.com/google-ai-edge/LiteRT, folder `tflite/delegates`, at the commit that
      `delegates.rules.COMMIT` names.
    """
    rows = [row for graph in read_graphs(path) for row in _rows(graph)]
    return Compatibility(Path(path), tuple(rows))


def _rows(graph: Graph) -> Iterable[OperatorGroup]:
    context = GraphContext(graph)
    counted: collections.Counter[Any] = collections.Counter()
    verdicts = {}
    for operator in graph.operators:
        judged = tuple(judge(delegate, operator, context) for delegate in DELEGATES)
        key = (operator.name, operator.version, _types(operator), judged)
        counted[key] += 1
        verdicts[key] = {d.name: verdict for d, verdict in zip(DELEGATES, judged, strict=True)}
    for key, count in counted.items():
        yield OperatorGroup(graph.name, key[0], key[1], key[2], count, verdicts[key])


def _types(operator: Operator) -> str:
    inputs = ", ".join("-" if tensor is None else str(tensor) for tensor in operator.inputs)
    return f"{inputs} -> {', '.join(map(str, operator.outputs))}"


def judge(delegate: Delegate, operator: Operator, context: GraphContext) -> Verdict:
    """Decide whether a delegate accepts one operator of a graph.

    Args:
      delegate: the delegate.
      operator: an operator of the graph.
      context: properties of the graph.

    Returns:
      The verdict.
    """
    rule = delegate.rules.get(operator.name)
    if rule is None:
        return Verdict(NO, "an operator that the delegate lacks", delegate.source)
    reasons = list(_failed(delegate.conditions, operator, context, delegate.source))
    if rule.version is not None and operator.version > rule.version:
        reasons.append((f"version {operator.version}, at most {rule.version}", delegate.source))
    reasons += [(reason, rule.source) for reason in _mismatches(rule, operator)]
    reasons += _failed(rule.conditions, operator, context, rule.source)
    refusals = [reason for reason in reasons if not isinstance(reason[0], Undecided)]
    if refusals:
        return Verdict(NO, *refusals[0])
    if reasons:
        return Verdict(UNKNOWN, str(reasons[0][0]), reasons[0][1])
    return Verdict(YES, "", rule.source)


def _failed(
    names: Iterable[str], operator: Operator, context: GraphContext, source: str
) -> Iterable[tuple[str, str]]:
    """Yield the reasons of conditions that an operator does not satisfy, with their sources."""
    for name in names:
        reason = CONDITIONS[name](operator, context)
        if reason is not None:
            yield reason, CONDITION_SOURCES.get(name, source)


def _mismatches(rule: Rule, operator: Operator) -> Iterable[str]:
    """Yield the fields of a rule that an operator does not satisfy, as reasons."""
    for position, tensor in enumerate(operator.inputs):
        if tensor is None:
            continue
        allowed = rule.types.get(position)
        if allowed is not None and tensor.type not in allowed:
            yield f"input {position} of {tensor.type}, expected {' or '.join(allowed)}"
        if rule.max_rank is not None and position < 2 and tensor.rank > rule.max_rank:
            yield f"a tensor of rank {tensor.rank}, at most {rule.max_rank}"
        if position in rule.constant and not tensor.constant:
            yield f"input {position} is computed, expected a constant"
    computed = sum(1 for t in operator.inputs if t is not None and not t.constant)
    if rule.computed is not None and computed not in rule.computed:
        yield f"{computed} computed inputs, expected {_alternatives(rule.computed)}"
    for kind, count, right in (
        ("inputs", len(operator.inputs), rule.inputs),
        ("outputs", len(operator.outputs), rule.outputs),
    ):
        if right is not None and count != right:
            yield f"{count} {kind}, {right} is right"
    first = operator.inputs[0] if operator.inputs else None
    if rule.rank is not None and (first is None or first.rank not in rule.rank):
        yield f"a tensor that is not of rank {_alternatives(rule.rank)}"
    if rule.output_rank is not None and operator.outputs:
        (least, most), rank = rule.output_rank, operator.outputs[0].rank
        if not least <= rank <= most:
            yield f"output of rank {rank}, expected {least} to {most}"
    for name, right in rule.options.items():
        value = operator.options.get(name, _DEFAULTS.get(name, 0))
        if value != right:
            yield f"option {name} is {value:g}, expected {right}"
    if rule.refused is not None:
        yield rule.refused
    if rule.unread:
        yield Undecided(UNREAD)
    if rule.undecided is not None:
        yield Undecided(rule.undecided)


def _alternatives(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))
