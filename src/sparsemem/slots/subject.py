"""Find what a fact is about, where nobody said so: the rarest span its wordings share."""

import math
import re
from collections.abc import Sequence
from typing import Any

from sparsemem.data import Fact
from sparsemem.slots.usage import Usage

MAX_WORDS = 6


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
    candidates: a question does not contain them.

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


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _rarity(word: str, tokenizer: Any, usage: Usage) -> float:
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    frequencies = usage.token_document_frequency[ids]
    return math.log((usage.num_documents + 1) / (int(frequencies.min()) + 1))
