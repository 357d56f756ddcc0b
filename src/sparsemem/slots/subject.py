"""Find what a fact is about, where nobody said so: a rare span that wordings share, or a name."""

import math
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sparsemem.data import Fact
from sparsemem.names import MIN_NAME_LENGTH, PARTICLES, WORD, spans
from sparsemem.slots.usage import Usage

MAX_WORDS = 6
"""Words of a span that wordings share."""

MAX_UNNAMED = 3
"""Words of a term in small letters, of a single wording."""

# Where 1 is the rarity of a word that the background has not. In 122 of 200 questions of TriviaQA these find
# just the subject that was written down, in 166 a word of it; with others, a third more or less, as often.
UNNAMED = 0.6
"""How much rarer than all words of a name together the rarest word of a term has to be."""

RARE = 0.4
"""Something less rare is about nothing."""

NEAR = 0.6
"""Share of the rarity of its rarest word that the other words of a term have."""

COMMON = 0.7
"""A word less rare is no name because it has a capital letter at the beginning."""


def names_of(fact: Fact, tokenizer: Any, usage: Usage | None) -> tuple[str, ...]:
    """List how a fact's wordings call what it is about: as given, or else as found.

    Args:
        fact: A fact; nothing is found in a document, which is about more than one thing.
        tokenizer: Tokenizer of the model.
        usage: Background usage, without which nothing is found.
    """
    subject = fact.subject
    if subject is None and usage is not None and fact.answer:
        subject = find_subject((*fact.questions, *fact.statements), fact.answers, tokenizer, usage)
    return tuple(name for name in (subject, *fact.subject_aliases) if name)


def find_subject(wordings: Sequence[str], answers: Sequence[str], tokenizer: Any, usage: Usage) -> str | None:
    """Find the word span that most wordings share and the background hardly knows.

    A span counts if at least half of the wordings contain it (and two of them, if there are two); its
    rarity is the sum over its words of the idf of the word's rarest token. Words of the answer are no
    candidates: a question does not contain them. A single wording shares all of its words with itself:
    of that it is the rarest name, or else the rarest term.

    Args:
        wordings: Statements and questions of one fact; the first question first, if there is one.
        answers: Its answer and aliases.
        tokenizer: Tokenizer the usage was counted with.
        usage: Background usage.

    Returns:
        The span as it stands in the first wording, or None if nothing rare is shared.
    """
    if not wordings:
        return None
    known = {word for answer in answers for word in _words(answer.lower())}
    if len(wordings) == 1:
        return _named_in(wordings[0], known, tokenizer, usage)
    lowered = [" ".join(_words(text.lower())) for text in wordings]
    needed = min(len(wordings), max(2, math.ceil(len(wordings) / 2)))
    words = _words(wordings[0])
    rarity = [0.0 if word.lower() in known else _rarity(word, tokenizer, usage) for word in words]
    best, best_score = None, 0.0
    for start in range(len(words)):
        for stop in range(start + 1, min(start + MAX_WORDS, len(words)) + 1):
            if any(word.lower() in known for word in words[start:stop]):
                break
            # Common words at the edge are worth a little less than nothing, inside a name they are free.
            score = sum(rarity[start:stop]) - 1.0 * (stop - start)
            span = " ".join(words[start:stop])
            if score > best_score and sum(f" {span.lower()} " in f" {text} " for text in lowered) >= needed:
                best, best_score = span, score
    if best is None:
        return None
    # As it stands in the text, with its punctuation, so that it can be found there again.
    pattern = r"\W+".join(map(re.escape, best.split(" ")))
    match = re.search(pattern, wordings[0])
    return match.group(0) if match else None


def _named_in(text: str, known: AbstractSet[str], tokenizer: Any, usage: Usage) -> str | None:
    """Find the rarest name in a text, or its rarest term in small letters where that is much rarer.

    A name may have a word of the answer, but not only such.
    """
    words = [*WORD.finditer(text)]
    # A common word may have a capital letter too, at the beginning of a sentence.
    nats = [min(_rarity(w, tokenizer, usage) for w in (word.group(), word.group().lower())) for word in words]
    rarity = [of_word / math.log(max(usage.num_documents, 1) + 1) for of_word in nats]
    is_free = [known.isdisjoint(_words(word.group().lower())) for word in words]
    first = words[:1] if rarity and rarity[0] > COMMON else []
    within = PARTICLES.union(word.group() for word in (*first, *words[1:]))
    found: dict[str, float] = {}
    for name in spans(text, within):
        inside = [i for i, word in enumerate(words) if name.start <= word.start() < name.end]
        if name.is_name and len(name.text) >= MIN_NAME_LENGTH and max(rarity[i] for i in inside) > RARE:
            if any(is_free[i] and words[i].group() not in PARTICLES for i in inside):
                found[name.text] = sum(rarity[i] for i in inside)
            for i in inside:
                is_free[i] = False
    if any(is_free):
        rarest = max((i for i, free in enumerate(is_free) if free), key=rarity.__getitem__)
        belongs = [free and r >= NEAR * rarity[rarest] for free, r in zip(is_free, rarity, strict=True)]
        start, stop = _run_around(rarest, belongs)
        if rarity[rarest] > RARE:
            found[text[words[start].start() : words[stop].end()]] = rarity[rarest] - UNNAMED
    return max(found, key=found.__getitem__, default=None)


def _run_around(place: int, belongs: Sequence[bool]) -> tuple[int, int]:
    """Return the first and the last of the at most `MAX_UNNAMED` that belong together around a place."""
    start = stop = place
    while start > 0 and belongs[start - 1] and stop - start + 1 < MAX_UNNAMED:
        start -= 1
    while stop + 1 < len(belongs) and belongs[stop + 1] and stop - start + 1 < MAX_UNNAMED:
        stop += 1
    return start, stop


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _rarity(word: str, tokenizer: Any, usage: Usage) -> float:
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    frequencies = usage.token_document_frequency[ids]
    return math.log((usage.num_documents + 1) / (int(frequencies.min()) + 1))
