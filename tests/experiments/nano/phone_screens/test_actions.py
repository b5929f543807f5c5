"""The grammar reads back what it writes and refuses everything else without running it."""

import contextlib
import dataclasses
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.nano.phone_screens import actions
from experiments.nano.phone_screens.actions import Action, format_action, parse_action
from glm_edge.errors import DataError

POINTS = st.tuples(st.integers(0, 999), st.integers(0, 999))


@st.composite
def any_action(draw):
    kind = draw(st.sampled_from(sorted(actions.GRAMMAR)))
    fields = {}
    for name, holds, must in actions.GRAMMAR[kind]:
        if must or draw(st.booleans()):
            fields[name] = draw(POINTS if holds == "point" else st.text(max_size=40))
    return Action(kind, **fields)


@given(any_action())
def test_round_trip(action):
    text = format_action(action)
    assert "\n" not in text
    assert parse_action(text) == action


@pytest.mark.parametrize("letter", ["x", '"', "\n", "\0", "\U0001f600"])
def test_format_action_refuses_what_is_not_read_back(letter):
    bare = len(format_action(Action("Type", text="")))
    room = (4096 - bare) // (len(format_action(Action("Type", text=letter))) - bare)
    longest = Action("Type", text=letter * room)
    assert parse_action(format_action(longest)) == longest
    with pytest.raises(DataError, match="the maximum is 4096"):
        format_action(Action("Type", text=letter * (room + 1)))


@given(any_action())
def test_thoughts_before_and_a_closing_tag_after_do_not_matter(action):
    text = f"<think>where is it?</think>\n<answer>\n{format_action(action)}\n</answer>"
    assert parse_action(text) == action


@given(st.text(max_size=60) | st.text(alphabet='do(action="Tap", element=[1]5finish', max_size=60))
def test_any_text_parses_or_is_refused(text):
    for candidate in (text, f"do(action={text}", f"finish(message={text}"):
        with contextlib.suppress(DataError):
            assert isinstance(parse_action(candidate), Action)


def test_spelling():
    assert format_action(Action("Tap", element=(435, 715))) == 'do(action="Tap", element=[435,715])'
    assert format_action(Action("Back")) == 'do(action="Back")'
    assert format_action(Action("finish", message="done")) == 'finish(message="done")'
    swipe = 'do(action="Swipe", start=[505,705], end=[505,295])'
    assert format_action(Action("Swipe", start=(505, 705), end=(505, 295))) == swipe
    assert parse_action('do(action="Type", text="say \\"hi\\"")') == Action("Type", text='say "hi"')
    assert parse_action("do(action='Wait', duration='2 seconds')").duration == "2 seconds"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tap the star",
        'do(action="Tap")',
        'do(action="Tap", element=[435,715]',
        'do(action="Tap", element=[435])',
        'do(action="Tap", element=[435,715,3])',
        'do(action="Tap", element=[435,1000])',
        'do(action="Tap", element=[-1,5])',
        'do(action="Tap", element=[4.5,5])',
        'do(action="Tap", element=[True,5])',
        'do(action="Tap", element="435,715")',
        'do(action="Tap", element=[435,715], text="x")',
        'do(action="Tap", element=[435,715], element=[1,1])',
        'do(action="Tap", elements=[435,715])',
        'do(action="Type", text=5)',
        'do(action="Type", text=__import__("os").system("true"))',
        'do(action="Type", text=f"{1}")',
        'do(action="Type", **{"text": "x"})',
        'do(action="Jump")',
        'do(action="finish", message="done")',
        'do(action=["Tap"])',
        'do(action="Back", kind="Home")',
        "finish(message=None)",
        'finish(message="a", action="Tap")',
        'finish(message="a\x00b")',
        "do(action=" + "(" * 3000 + ")" * 3000,
        'do(action="Type", text="' + "x" * 5000 + '")',
    ],
)
def test_what_does_not_follow_the_grammar_is_refused(text):
    with pytest.raises(DataError):
        parse_action(text)


TAP = Action("Tap", element=(435, 715))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('do(action="Tap", element=[435,715]) and more', TAP),
        ('do(action="Back")\ndo(action="Tap", element=[435, 715])', TAP),
        ('do(action="Tap", element=[435,715])</answer>', TAP),
        ('do(action="Tap", element=[435,715])</answer><|user|>', TAP),
        ('<|begin_of_box|>do(action="Launch", app="A")<|end_of_box|>', Action("Launch", app="A")),
        ('I could do(action="Back") but better do(action="Home")', Action("Home")),
        ('<think>do(action="Back")?</think><answer>do(action="Home")</answer>', Action("Home")),
        ('do(action="Home"), not do(action="Tap", element=[4', Action("Home")),
        (
            'do(action="Type", text="shall we "eat" now?")',
            Action("Type", text='shall we "eat" now?'),
        ),
        ('do(action="Type", text=""eat"")', Action("Type", text='"eat"')),
        ("do(action='Type', text='it's ok')", Action("Type", text="it's ok")),
        (
            'do(action="Type", text="say do(action="Back") to go")',
            Action("Type", text='say do(action="Back") to go'),
        ),
        (
            'do(action="Type", text="say "hi"")\ndo(action="Back")',
            Action("Back"),
        ),
        ('do(action="Type", text="a\nb\r\n\nc")', Action("Type", text="a\nb\r\n\nc")),
        (
            'do(action="Tap", element=[1,2], message="pay "now"?")',
            Action("Tap", element=(1, 2), message='pay "now"?'),
        ),
        ('do( action = "Wait" , duration = "2 seconds" )', Action("Wait", duration="2 seconds")),
        (
            'finish(message="done:\n1. "a"\n2. b")</answer>',
            Action("finish", message='done:\n1. "a"\n2. b'),
        ),
        ('do(action="Type_Name", text="Li")', Action("Type_Name", text="Li")),
        ('do(action="Interact")', Action("Interact")),
        ('do(action="Take_over", message="log in")', Action("Take_over", message="log in")),
        ('do(action="Note", message="True")', Action("Note", message="True")),
        ('do(action="Call_API", instruction="sum")', Action("Call_API", instruction="sum")),
    ],
)
def test_parse_action_reads_what_models_write(text, expected):
    assert parse_action(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        '<think>do(action="Back")</think><answer>do(action="Tap", element=[1000,5])</answer>',
        '<think>do(action="Back")</think><answer>do(action="Tap", element=[10</answer>',
        'do(action="Back")</think>I do not know',
        'do(action="Back") or do(action="Tap", element=[1000,5])',
        "[{'Type': 'Type'}]",
    ],
)
def test_parse_action_never_takes_a_thought_for_the_answer(text):
    with pytest.raises(DataError):
        parse_action(text)


@pytest.mark.parametrize(
    "text",
    [
        'do(action="a", ' + 'x="b", ' * 550,
        'do(action="a", ' + 'x="b" ) ' * 500,
        "do(action='" * 180 + '", x="' * 9000,
        'do(action="Type", text="' * 150 + "\\" * 50_000,
        'finish(message="' + '"")' * 20_000,
    ],
    ids=range(5),
)
def test_parse_action_ends_soon_on_hostile_text(text):
    start = time.process_time()
    with contextlib.suppress(DataError):
        parse_action(text)
    assert time.process_time() - start < 5


def test_actions_check_their_fields():
    with pytest.raises(DataError, match="unknown action 'Jump'"):
        Action("Jump")
    with pytest.raises(DataError, match="Tap lacks element"):
        Action("Tap")
    with pytest.raises(DataError, match="Back has no field 'text'"):
        Action("Back", text="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Action("Back").kind = "Home"


@given(st.floats(0, 95.99), st.floats(0, 191.99))
def test_taps_are_bin_centres_close_to_the_point(x, y):
    point = actions.tap_at(x, y, 96, 192).element
    assert all(v % 10 == 5 for v in point)
    px, py = actions.to_pixels(point, 96, 192)
    assert abs(px + 0.5 - x) < 1.5
    assert abs(py + 0.5 - y) < 2.5


def test_points_off_the_screen_go_to_its_border():
    assert actions.tap_at(-3, 500, 96, 192).element == (5, 995)
