"""Wordings of written instructions, in two disjoint parts: for training and for the exam.

A template is a sentence with a slot. The split is by template and by noun. The commonest ones
(`COMMON`) are trained, since every user says them. A hash of its letters assigns every other one,
so that nobody chooses the exam's wordings, and the same text is in the same part everywhere. A
template or a noun that contains a noun of the exam also belongs to the exam.

Names of glyphs and colours belong to both parts, since no model knows the meaning of a word that it
has never read. `UNTRAINED_NAMES` are a probe of that, apart from the exam.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping

from glm_edge.errors import DataError

PARTS = ("train", "exam")
EXAM_SHARE = 0.3

# Names of glyphs, the icon's own name first.
SYNONYMS = {
    "star": ("star", "favorites", "favourites", "starred"),
    "heart": ("heart", "like", "love"),
    "camera": ("camera", "photo", "photos"),
    "mail": ("mail", "envelope", "email", "letter"),
    "home": ("home", "house", "start page"),
    "search": ("search", "magnifier", "magnifying glass"),
    "lock": ("lock", "padlock", "security"),
    "cloud": ("cloud", "weather", "forecast"),
    "flag": ("flag", "banner"),
    "user": ("user", "profile", "account", "person"),
    "play": ("play", "video", "triangle", "movie"),
    "clock": ("clock", "time", "watch"),
    "music": ("music", "song", "note", "notes"),
    "plus": ("plus", "add", "plus sign"),
    "bell": ("bell", "alarm", "notifications"),
    "pin": ("pin", "map", "location"),
}
# Names that no training contains: a probe beside the exam, not a part of it.
UNTRAINED_NAMES = {
    "star": "asterisk", "heart": "valentine", "camera": "snapshot", "mail": "inbox",
    "home": "cottage", "search": "lens", "lock": "secure", "cloud": "sky", "flag": "pennant",
    "user": "contact", "play": "arrow", "clock": "hour", "music": "melody", "plus": "cross",
    "bell": "ringer", "pin": "marker",
}  # fmt: skip
COLOUR_NAMES = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
}
NOUNS = {
    "icon": (
        "icon", "symbol", "sign", "image", "logo", "pictogram", "drawing", "emblem", "graphic",
        "glyph", "thumbnail", "figure",
    ),
    "key": (
        "key", "digit", "number", "numeral", "figure", "cipher", "integer", "character",
        "keypad button", "dial key", "handwritten digit", "written figure",
    ),
    "button": (
        "button", "field", "bar", "box", "block", "rectangle", "control", "patch", "area", "strip",
        "switch", "widget",
    ),
    "row": (
        "row", "entry", "item", "line", "option", "position", "record", "element", "listing",
        "choice", "list row", "menu entry",
    ),
}  # fmt: skip
# Phrases for an element; the first ones have a noun.
PHRASES = {
    "icon": (
        "the {name} {noun}", "the {noun} of the {name}", "the {noun} with the {name}",
        "the {name} {noun}", "the {name}", "{name}",
    ),
    "key": (
        "the {noun} {name}", "{noun} {name}", "the {name} {noun}", "the {noun} {name}",
        "{name}", "the {name}",
    ),
    "button": (
        "the {name} {noun}", "the {noun} in {name}", "the {name} {noun}", "the {name} {noun}",
        "the {name} one", "{name}",
    ),
    "row": (
        "the {name} {noun}", "the {noun} {name}", "the {noun} for {name}",
        "the {noun} with the {name}", "the {name} {noun}", "{name}",
    ),
}  # fmt: skip
_TAP = (
    "tap {thing}", "tap on {thing}", "press {thing}", "press on {thing}", "click {thing}",
    "click on {thing}", "touch {thing}", "hit {thing}", "select {thing}", "choose {thing}",
    "pick {thing}", "push {thing}", "find {thing} and tap it", "find {thing} and press it",
    "look for {thing} and click it", "locate {thing} and tap on it",
    "search out {thing} and hit it",
    "i want {thing}", "i need {thing}", "i want you to tap {thing}", "i would like {thing}",
    "i would like you to press {thing}", "could you tap {thing}", "can you press {thing} for me",
    "would you click on {thing}", "can you hit {thing}", "you should tap {thing}",
    "you need to press {thing}", "let us tap {thing}", "let's press {thing}", "give {thing} a tap",
    "give {thing} a press", "put your finger on {thing}", "place a finger on {thing}",
    "move to {thing} and tap", "go to {thing} and press it", "make a tap on {thing}",
    "do a click on {thing}", "where is {thing}? tap it", "do you see {thing}? press it",
    "the one to tap is {thing}", "next, press {thing}", "use {thing}", "activate {thing}",
    "trigger {thing}", "tap once on {thing}", "take {thing}", "{thing} please",
    "{thing}, please tap it", "just tap {thing}", "simply press {thing}",
    "the next tap goes to {thing}",
    "my choice is {thing}", "it is time to press {thing}", "tap where you see {thing}",
    "press the screen at {thing}", "click the spot with {thing}", "touch the place of {thing}",
    "go for {thing}", "hit {thing} with your finger", "point at {thing} and click",
    "{thing}: tap it", "kindly select {thing}", "make sure to tap {thing}",
    "don't forget to press {thing}", "tap it: {thing}", "try {thing}", "i will take {thing}",
)  # fmt: skip
TEMPLATES: dict[str, tuple[str, ...]] = {
    "icon": (
        *_TAP,
        "open {thing}", "launch {thing}", "start {thing}", "show me {thing} by tapping it",
        "bring up {thing}", "tap the {noun} of a {name}", "tap the {noun} that shows a {name}",
        "press the {noun} that looks like a {name}", "open what is behind {thing}",
        "the {noun} showing the {name}, tap it", "run {thing}",
    ),
    "key": (
        *_TAP,
        "dial {name}", "enter {name}", "enter {thing}", "key in {name}", "punch in {name}",
        "input {thing}", "dial {thing}", "push the button for {name}",
        "press the one that says {name}",
        "tap the {noun} that reads {name}", "there is a {name}, press it", "add a {name}",
    ),
    "button": (
        *_TAP,
        "press the {noun} that is {name}", "tap the {noun} coloured {name}",
        "click the {name} coloured {noun}", "hit the {noun} painted {name}",
        "the {noun} is {name}, press it", "push the one in {name}", "tap whatever is {name}",
        "the {name} thing, press it", "confirm with {thing}",
        "use the {noun} that has the colour {name}",
    ),
    "row": (
        *_TAP,
        "open {thing}", "go to {thing}", "show {thing}", "view {thing}", "jump to {thing}",
        "expand {thing}", "take me to {thing}", "open the {noun} called {name}",
        "open the {noun} named {name}", "select {name} from the list", "choose {name} in the list",
        "read {thing}", "enter the {noun} of the {name}",
        "the {noun} that starts with the {name}, open it",
    ),
    "type": (
        "type {word}", "write {word}", "type the word {word}", "write the word {word}",
        "write down {word}", "type in {word}", "enter the word {word}", "enter the text {word}",
        "put in the word {word}", "put {word} into the field", "fill in {word}",
        "fill the field with {word}", "the text is {word}, type it", "spell {word}",
        "note down {word}", "input the word {word}", "key in the word {word}",
        "i want to write {word}", "i want the word {word} in the field", "could you type {word}",
        "can you write {word} for me", "write {word} there", "compose {word}",
        "add the text {word}", "insert {word}", "insert the word {word}", "let's write {word}",
        "put the text {word}", "use the keyboard to write {word}",
        "use the keyboard and type {word}", "with the keyboard enter {word}",
        "the message is {word}, write it", "make the field say {word}",
        "the field should say {word}", "it should read {word}", "let the text be {word}",
        "set the text to {word}", "write out {word}", "type out {word}",
        "the word to type is {word}", "the word to write is {word}", "answer with the word {word}",
        "write this: {word}", "type this word: {word}", "type exactly {word}",
        "enter {word} as the text", "i would like to type {word}", "please put down {word}",
    ),
    "scroll": (
        "scroll {toward}", "scroll {toward} a bit", "scroll a little {toward}",
        "scroll the page {toward}", "scroll the list {toward}", "move {toward}",
        "move the page {toward}", "move the list {toward}", "go {toward}", "go {toward} a bit",
        "go further {toward}", "slide the list {toward}", "page {toward}", "pan {toward}",
        "keep scrolling {toward}", "continue {toward}", "roll the screen {toward}",
        "can you scroll {toward}", "could you move {toward}", "i want to scroll {toward}",
        "i want to go {toward}", "take me {toward}", "let's go {toward}", "browse {toward}",
        "look {toward}", "show me what is {at}", "show what is {at}", "i want to see what is {at}",
        "let me see what is {at}", "what is {at}?", "what comes {at}?", "is there anything {at}?",
        "there must be more {at}", "show more of what is {at}", "view the part {at}",
        "look at what is {at}", "display the content {at}", "the rest is {at}, show it",
        "reveal what is {at}", "see what stands {at}", "i would like to see what is {at}",
        "scroll to what is {at}", "the next part is {at}", "find more {at}",
    ),
    "page": (
        "swipe {aside}", "flick {aside}", "swipe the page {aside}", "swipe the screen {aside}",
        "swipe once {aside}", "do a swipe {aside}", "make a swipe {aside}",
        "swipe your finger {aside}", "a swipe {aside}", "can you swipe {aside}",
        "i want you to swipe {aside}", "flick the screen {aside}", "flick your finger {aside}",
        "a flick {aside}", "wipe {aside}", "slide your finger {aside}", "move your finger {aside}",
        "drag your finger {aside}", "perform a swipe {aside}", "let's swipe {aside}",
        "could you flick {aside}", "{which} page", "go to the {which} page",
        "open the {which} page", "show the {which} page", "turn to the {which} page",
        "the {which} page please", "move to the {which} page", "i want the {which} page",
        "i want to see the {which} page", "show me the {which} page", "switch to the {which} page",
        "jump to the {which} page", "take me to the {which} page", "can you show the {which} page",
        "could you open the {which} page", "flip to the {which} page", "bring up the {which} page",
        "let me see the {which} page", "continue with the {which} page", "view the {which} page",
        "i would like the {which} page", "display the {which} page", "look at the {which} page",
    ),
    "back": (
        "go back", "return to the last screen", "back please", "leave this screen",
        "one step back", "go back one step", "back", "return", "go to the previous screen",
        "take me back", "bring me back", "i want to go back", "back to the last screen",
        "back to where we were", "go back to where you came from",
        "return to the previous screen", "return to the screen before", "step back", "move back",
        "one screen back", "get out of here", "get me out of this screen", "exit this screen",
        "close this screen", "close this view", "leave this view", "quit this screen", "hit back",
        "press back", "navigate back", "navigate to the previous screen",
        "the screen before this one", "show the screen before this one",
        "show the last screen again", "wrong screen, go back",
        "this is the wrong screen, return", "let's go back", "can you go back",
        "could you take me back", "get back", "head back", "jump back", "turn back",
        "go one screen back", "leave and return", "i am in the wrong place, go back",
        "back to the screen before", "undo and go back",
    ),
    "done": (
        "say done", "we are finished", "that is all", "the task is complete", "we are done",
        "i am done", "done", "finished", "that was it", "that was all", "everything is done",
        "all done", "the job is done", "the work is complete", "you can say done",
        "report that it is done", "the task is finished", "the task is done", "nothing else to do",
        "nothing more to do", "there is nothing left to do", "no more steps", "mission complete",
        "that is everything", "it is finished", "it is done", "this is complete",
        "that completes the task", "that was the last step", "we have everything",
        "i have what i need", "that will be all", "mark the task as done",
        "declare the task complete", "say that you are done", "tell me that it is done",
        "task completed", "the job is complete", "everything is finished", "this task is done",
    ),
    "stopped": (
        "stop here", "cancel the task", "stop", "stop now", "cancel", "cancel this", "abort",
        "abort the task", "end it here", "stop the task", "do not continue", "don't go on",
        "give up", "quit the task", "break off", "break it off", "call it off", "halt",
        "halt here", "stop working", "stop this now", "forget it", "never mind", "leave the task",
        "drop the task", "end the task now", "cancel everything", "no further, stop",
        "stop what you are doing", "do not go any further", "cancel that", "end this now",
        "give it up", "stop right there", "that's enough, stop", "abandon the task",
        "quit", "don't continue", "i changed my mind, stop", "cancel the job",
    ),
}  # fmt: skip
OPENINGS = (
    "please", "now", "ok,", "hey,", "so", "now please", "then", "next", "alright,", "well,",
    "go ahead and", "okay, now",
)  # fmt: skip
CLOSINGS = (
    "please", "now", "for me", "thanks", "right away", "then", "quickly", "if you can", "again",
    "thank you", "this time", "at once",
)  # fmt: skip
TOWARD = {"down": ("down", "downwards", "lower"), "up": ("up", "upwards", "higher")}
AT = {"down": ("below", "further below", "underneath"), "up": ("above", "further above", "on top")}
ASIDE = {"left": ("left", "to the left"), "right": ("right", "to the right")}
WHICH = {"left": ("next", "following"), "right": ("previous", "preceding")}


COMMON = frozenset(
    (
        "tap {thing}", "press {thing}", "click on {thing}", "touch {thing}", "hit {thing}",
        "select {thing}", "choose {thing}", "push {thing}", "open {thing}", "dial {name}",
        "enter {name}", "go to {thing}", "show {thing}", "type {word}", "write {word}",
        "type the word {word}", "scroll {toward}", "show me what is {at}", "swipe {aside}",
        "go to the {which} page", "go back", "say done", "we are finished", "stop here",
        "cancel the task", "icon", "symbol", "key", "digit", "number", "button", "field", "row",
        "entry", "item", "please", "now", "then",
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Wordings:
    """Wordings of one part; the lists of two parts have no element in common.

    Args:
      templates: sentences by kind of instruction, a key of `TEMPLATES`.
      nouns: words for an element by its type.
      openings: words before an instruction.
      closings: words after an instruction.
    """

    templates: Mapping[str, tuple[str, ...]]
    nouns: Mapping[str, tuple[str, ...]]
    openings: tuple[str, ...]
    closings: tuple[str, ...]


@functools.cache
def wordings(part: str) -> Wordings:
    """Return the wordings of one part.

    Args:
      part: "train" or "exam".

    Returns:
      The wordings.

    Raises:
      DataError: the part is unknown.
    """
    if part not in PARTS:
        raise DataError(f"unknown part {part!r} of the wordings; use one of {', '.join(PARTS)}")

    def of_part(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(text for text in texts if part_of(text) == part)

    return Wordings(
        {kind: of_part(templates) for kind, templates in TEMPLATES.items()},
        {kind: of_part(nouns) for kind, nouns in NOUNS.items()},
        of_part(OPENINGS),
        of_part(CLOSINGS),
    )


@functools.cache
def part_of(text: str) -> str:
    """Return the part of a template, a noun, an opening or a closing."""
    if text in COMMON:
        return "train"
    words = set(re.findall(r"[a-z]+", text))
    nouns = {noun for kind in NOUNS.values() for noun in kind}
    if text not in nouns and any(part_of(noun) == "exam" for noun in nouns & words):
        return "exam"
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "exam" if value < EXAM_SHARE * 2**64 else "train"
