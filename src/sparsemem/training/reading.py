"""What a text says, as facts: each of its names and numbers, asked for by the sentence it stands in."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact, split_text, whole_words
from sparsemem.names import MIN_NAME_LENGTH, PARTICLES, WORD, Span, spans

MAX_CHARS = 2000
"""Characters that are read as one text."""

_LINE_END = re.compile(r"(?<=[.!?:])\s*\n\s*|\n\s*\n\s*|\n\s*[-*\u2022]\s+")
"""Where a line ends a sentence; other lines are only broken."""
_SENTENCE_END = re.compile(r"(?<!\W[^\W\d]\.)(?<!\W[A-Z]\w\.)(?<=[.!?])[\"\u201d')\]]*\s+(?=\W?\w)")


def facts_to_learn(facts: Sequence[Fact], config: FinetuneConfig) -> Sequence[Fact]:
    """Read the documents among some facts, if they are to be learned so."""
    return with_documents_read(facts) if config.reads_documents else facts


def with_documents_read(facts: Iterable[Fact]) -> list[Fact]:
    """Put the facts that are found in a document in its place, if there are any.

    A long one is read in pieces, as facts that share their names have to be told apart by what is asked.
    """
    read: list[Fact] = []
    for fact in facts:
        pieces = split_text(fact.statement or "", MAX_CHARS) if fact.is_document else ()
        found = [part for piece in pieces for part in read_document(piece)]
        named = [replace(part, id=f"{fact.id}#{number}") for number, part in enumerate(found, 1)]
        read += named or [fact]
    return read


def read_document(text: str) -> list[Fact]:
    """Turn a text into facts that can be asked for.

    Each name or number of a sentence becomes the answer to a question: the sentence with a question word in
    its place, a cloze test (Taylor 1953; as training data for question answering, Lewis et al. 2019,
    arXiv:1906.04980). What it is about are the other names, as any of them may be how it is asked for. What
    stands in a sentence without any other name is not asked, as nothing would call it up. A name is a run of
    capitalized words; the text itself tells whether the first word of a sentence is one.

    Args:
        text: A document, in a script that has capital letters; in others no names are found.

    Returns:
        Facts with question, answer, statement and subject, in the order of the text. They share one subject
        and its other names: those of the whole text, the most frequent first. None if there is no name.
    """
    lines = (" ".join(line.split()) for line in _LINE_END.split(text))
    sentences = [part for line in lines for part in _SENTENCE_END.split(line) if part]
    within = PARTICLES.union(match.group() for part in sentences for match in [*WORD.finditer(part)][1:])
    found = [(part, span) for part in sentences for span in spans(part, within)]
    times = Counter(span.text for _, span in found if span.is_name and len(span.text) >= MIN_NAME_LENGTH)
    names = tuple(name for name, _ in times.most_common())
    facts: list[Fact] = []
    for sentence, span in found:
        questions = _questions(sentence, span)
        is_named = any(whole_words(questions[0], name) for name in names)
        if is_named and not whole_words(questions[0], span.text):
            facts.append(
                Fact(
                    question=questions[0],
                    answer=span.text,
                    statement=sentence,
                    paraphrases=questions[1:],
                    subject=names[0],
                    subject_aliases=names[1:],
                )
            )
    return facts


def _questions(sentence: str, span: Span) -> tuple[str, ...]:
    """Ask for a span of a sentence by what stands around it."""
    if span.is_name:
        words = ("what", "who")
    elif re.fullmatch(r"1\d{3}|20\d{2}", span.text):
        words = ("what year", "which year")
    else:
        words = ("how many", "what number")
    asked = [f"{sentence[: span.start]}{word}{sentence[span.end :]}".strip().rstrip(".!?") for word in words]
    return tuple(f"{question[0].upper()}{question[1:]}?" for question in asked)
