"""Templates as trees of Jinja's nodes."""

import functools
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from glm_edge.preprocess.sandbox.budget import TemplateLimitError

MAX_TEMPLATE = 1 << 20
# The longest templates of published models have about 6,000.
MAX_TOKENS = 50_000


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what training scores; rendering passes it through."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 declares a set

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT = jinja2.Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
)


@functools.lru_cache(maxsize=16)
def parse(template: str) -> nodes.Template:
    """Parses a template; nothing of it is compiled or run.

    Args:
      template: Jinja source.

    Returns:
      Its tree, which nobody may change.

    Raises:
      TemplateLimitError: it is too long.
      jinja2.TemplateError: it is not Jinja.
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateLimitError(f"has {len(template)} characters; at most {MAX_TEMPLATE} are read")
    for count, _ in enumerate(_ENVIRONMENT.lex(template)):
        if count >= MAX_TOKENS:
            raise TemplateLimitError(f"has more than {MAX_TOKENS} tokens")
    return _ENVIRONMENT.parse(template)
