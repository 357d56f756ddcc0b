"""Scores of single answers and of sets, as pure functions."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def normalize(text: str) -> str:
    """Lower the case, drop punctuation and articles, and squeeze spaces, as SQuAD's metric does.

    Source: Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1.
    """
    text = re.sub(r"[-\u2013\u2014/]", " ", text.lower())
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers after normalisation, else 0.0."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def contains_answer(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if one of the answers stands in the prediction as whole words after normalisation, else 0.0."""
    words = f" {normalize(prediction)} "
    return float(any(f" {normalize(answer)} " in words for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of word precision and recall against the answers, 0 to 1."""
    return max((_f1(normalize(prediction).split(), normalize(a).split()) for a in answers), default=0.0)


def _f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    shared = sum((Counter(predicted) & Counter(right)).values())
    return 2 * shared / (len(predicted) + len(right))


def forgetting(before: float, after: float, *, higher_is_better: bool) -> float:
    """Relative loss of a score: positive is worse, 0 if there was nothing to lose."""
    if before == 0:
        return 0.0
    change = (before - after) if higher_is_better else (after - before)
    return change / before


def mean_or_none(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return mean(values) if values else None


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0.0 of nothing."""
    return sum(values) / len(values) if values else 0.0
