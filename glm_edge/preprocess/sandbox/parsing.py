"""Parsing of templates to trees of Jinja's nodes."""

import functools
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from glm_edge.preprocess.sandbox.budget import TemplateLimitError

MAX_TEMPLATE = 1 << 20
# The longest templates of published models have about 6,000 tokens.
MAX_TOKENS = 50_000


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks text that training scores; rendering ignores it."""

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
    """Parse a template without compiling or running it.

    Args:
      template: Jinja source.

    Returns:
      The cached tree, which callers must not modify.

    Raises:
      TemplateLimitError: the template is too long.
      jinja2.TemplateError: the template is not valid Jinja.
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateLimitError(f"has {len(template)} characters; the limit is {MAX_TEMPLATE}")
    for count, _ in enumerate(_ENVIRONMENT.lex(template)):
        if count >= MAX_TOKENS:
            raise TemplateLimitError(f"has more than {MAX_TOKENS} tokens")
    return _ENVIRONMENT.parse(template)
