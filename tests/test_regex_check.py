"""Which regular expressions of strangers are matched, and which are refused."""

import pytest
from tokenizers import Regex, normalizers

from glm_edge.regex_check import PatternError, check_pattern

# What published tokenizers split texts with.
PUBLISHED = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?=(\d{3})+(?!\d))",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[一-龥぀-ゟ゠-ヿ]+",
    " {2,}",
    r"a*+a*b|x{1,5}y",
)
ENDLESS = (
    r"(a+)+$",
    r"(?:[a-z]|\d)*x",
    r"(a|aa|a?)*b",
    r"((ab)*)*c",
    r"(?:a+b?)+c",
    r"([^a]|b)+$",
    r"(a?){30}a{30}",
    r"a*a*b",
    r"\w+\d+\w",
    r".*.*=.*",
    r"\s*\s*$",
    r"(a*)?(a*)?b",
    r"\w+(?=.*x)",
    r"(.)\1",
    r"(?<x>a)\k<x>",
    r"(?R)",
    "a{2000}",
    "(a{1,50}){1,50}",
    "(" * 40 + ")" * 40,
    "a" * 5000,
    *("(", ")", "[", "a\\", "*a", "(?(1)a)"),
)


def matches(source, character):
    return not normalizers.Replace(Regex(source), "").normalize_str(character)


@pytest.mark.parametrize("pattern", PUBLISHED, ids=range(len(PUBLISHED)))
def test_check_pattern_takes_what_tokenizers_use(pattern):
    check_pattern(pattern, matches)


@pytest.mark.parametrize("pattern", ENDLESS, ids=range(len(ENDLESS)))
def test_check_pattern_refuses_what_may_not_end(pattern):
    with pytest.raises(PatternError):
        check_pattern(pattern, matches)


def test_check_pattern_reads_pythons_syntax():
    check_pattern(r"layers/\d+/(attention|mlp)/[a-z_]+")
    check_pattern(r".*(q|k|v)_proj.*")
    with pytest.raises(PatternError, match="an item that can match in several ways"):
        check_pattern(r"(([a-z/0-9_]+)+)+$X")
