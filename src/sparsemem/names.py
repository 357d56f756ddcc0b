"""Names and numbers in a text, told by how they are written."""

import re
from collections.abc import Iterator
from typing import NamedTuple

PARTICLES = {"al", "da", "de", "del", "della", "der", "di", "du", "el", "la", "le", "of", "the", "van", "von"}
"""Words within a name that begin with a small letter."""

MIN_NAME_LENGTH = 3
"""Letters of a name by which something is asked for."""

WORD = re.compile(r"(?:[^\W\d_]\.){2,}|\d+(?:[.,:/\u2013-]\d+)*|[^\W\d_](?:[\w\u2019'-]*\w)?")
"""A word, an abbreviation with its dots, or a number."""
_WITHIN_NAME = re.compile(r"\s+|(?<=\b\w)\.\s+|(?<=\b\w\w)\.\s+|[-\u2013]")
_POSSESSIVE = re.compile(r"[\u2019']s$")


class Span(NamedTuple):
    """A name or a number in a sentence."""

    text: str
    start: int
    end: int

    @property
    def is_name(self) -> bool:
        """Whether it is no number."""
        return not self.text[0].isdigit()


def spans(sentence: str, within: set[str]) -> Iterator[Span]:
    """Find the names and numbers of a sentence. A name is a run of capitalized words.

    Args:
        sentence: Where to look.
        within: Words that stand in the text anywhere but at the beginning of a sentence, and particles.
    """
    words = [*WORD.finditer(sentence)]
    run: list[re.Match[str]] = []
    for place, word in enumerate(words):
        text = word.group()
        is_name = any(part[:1].isupper() for part in text.split("-"))
        if place == 0:
            is_name = is_name and text in within and text.lower() not in within
        may_join = bool(run) and (is_name or text in PARTICLES) and not _POSSESSIVE.search(run[-1].group())
        if may_join and _WITHIN_NAME.fullmatch(sentence, run[-1].end(), word.start()):
            run.append(word)
            continue
        yield from _name(run, sentence)
        run = [word] if is_name else []
        if text[0].isdigit():
            yield Span(text, *word.span())
    yield from _name(run, sentence)


def _name(run: list[re.Match[str]], sentence: str) -> Iterator[Span]:
    """Yield what a run of words names, without particles behind it."""
    while run and run[-1].group() in PARTICLES:
        run = run[:-1]
    if run:
        text = _POSSESSIVE.sub("", sentence[run[0].start() : run[-1].end()])
        yield Span(text, run[0].start(), run[0].start() + len(text))
