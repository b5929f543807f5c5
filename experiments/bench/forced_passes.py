"""Time of an action token by token, and in passes of a free token with its forced run.

Part of `experiments.bench.time_to_action`. The defaults of --forced_tokens and --passes are a tap
in Open-AutoGLM's form between lines of `<answer>`, with the tokens of cl100k as a stand-in for
GLM's. Of its 18 tokens, 4 are free; behind the last one nothing runs.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench.runtimes.child import EngineProcess
from experiments.bench.runtimes.compare import Quartiles, shown
from glm_edge.cli.console import print_table
from glm_edge.errors import DataError
from glm_edge.export.common.sizes import FORCED_LENGTHS

ONE_BY_ONE, FORCED = "one by one", "forced"


def plans_of(tokens: int, passes: Sequence[str]) -> dict[str, list[int]]:
    """Return the token counts of the passes of both ways.

    Args:
      tokens: number of tokens of the action.
      passes: tokens of each pass with forced runs.

    Returns:
      `one by one` and `forced`.

    Raises:
      DataError: a pass is not a number from 1 to the longest signature, or all have too many
        tokens.
    """
    try:
        counts = [int(count) for count in passes]
    except ValueError as error:
        raise DataError(f"--passes: {error}; use numbers such as 4,3,4,2") from error
    if not counts or min(counts) < 1 or max(counts) > FORCED_LENGTHS[-1]:
        raise DataError(f"--passes: must be 1 to {FORCED_LENGTHS[-1]} tokens each, such as 4,3,4,2")
    if sum(counts) > tokens:
        raise DataError(f"--passes: {sum(counts)} tokens, --forced_tokens has {tokens}")
    return {ONE_BY_ONE: [1] * tokens, FORCED: counts}


def measure(
    engine: EngineProcess,
    context: int,
    plans: Mapping[str, Sequence[int]],
    turn: int,
    results: dict[str, list[float]],
) -> None:
    """Run both ways once, in alternating order, and append their seconds.

    Args:
      engine: process of the file.
      context: number of tokens of the prompt.
      plans: token counts of `plans_of`.
      turn: number of the round.
      results: seconds of each round by way, which are extended.
    """
    for name in list(plans) if turn % 2 else list(plans)[::-1]:
        results.setdefault(name, []).append(engine.passes(context, plans[name]))


def show(results: Mapping[str, Any], plans: Mapping[str, Sequence[int]]) -> None:
    """Print the table of both ways.

    Args:
      results: seconds by way and format.
      plans: token counts of `plans_of`.
    """
    rows = []
    for form, seconds in results.items():
        pairs = zip(seconds[FORCED], seconds[ONE_BY_ONE], strict=True)
        ratio = statistics.median(forced / single for forced, single in pairs)
        columns = [str(Quartiles.of(seconds[name])) for name in (ONE_BY_ONE, FORCED)]
        rows.append([form, *columns, shown(ratio)])
    counts = " ".join(map(str, plans[FORCED]))
    title = f"an action of {len(plans[ONE_BY_ONE])} tokens, in passes of {counts}"
    print()
    print_table([title, f"{ONE_BY_ONE} s", f"{FORCED} s", "ratio"], rows)
