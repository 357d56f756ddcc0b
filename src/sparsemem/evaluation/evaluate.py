"""One evaluation of facts and probes, and the report of two of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sparsemem.data import Fact
from sparsemem.evaluation.generate import answer_questions
from sparsemem.evaluation.metrics import contains_answer, exact_match, f1, forgetting, mean_or_none
from sparsemem.evaluation.probes import LOWER_IS_BETTER, Probe, ProbeScore, score_probe
from sparsemem.evaluation.result_cache import ResultCache
from sparsemem.prompts import PromptFormat

PER_QUESTION = ("answers", "seen_scores", "heldout_scores")
"""What `FactScores` holds of single questions, and reports leave out."""

MIN_ANSWER_TOKENS, MAX_ANSWER_TOKENS = 16, 64
"""Answers are cut at the length of the longest right one, but not below or above these."""


@dataclasses.dataclass(frozen=True)
class FactScores:
    """Recall of facts, 0 to 1.

    Args:
        num: Facts.
        seen_f1: F1 in the trained wordings of the question; None if no fact has one.
        seen_em: Exact match in them.
        heldout_f1: F1 in wordings never trained on; None if no fact has one.
        heldout_em: Exact match in them.
        heldout_recall: Share of the answers in them that contain a right one.
        answers: What was replied to each question, by question.
        seen_scores: F1 of each trained wording, in the order asked.
        heldout_scores: F1 of each held-out wording, in the order asked.
    """

    num: int
    seen_f1: float | None
    seen_em: float | None
    heldout_f1: float | None
    heldout_em: float | None
    heldout_recall: float | None
    answers: dict[str, str] = dataclasses.field(repr=False)
    seen_scores: tuple[float, ...] = dataclasses.field(repr=False)
    heldout_scores: tuple[float, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of one model state."""

    facts: FactScores
    probes: dict[str, ProbeScore]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact] = (),
    probes: Sequence[Probe] = (),
    *,
    prompt: PromptFormat = "qa",
    on_part: Callable[[str], None] | None = None,
    results: ResultCache | None = None,
) -> Evaluation:
    """Measure what a model knows of some facts, and its probes.

    Args:
        model: A causal LM, with or without a memory.
        tokenizer: Its tokenizer.
        facts: Facts to ask for, in their trained and in their held-out wordings.
        probes: What must not be forgotten.
        prompt: How questions are asked, "qa" or "chat".
        on_part: Called with the name of each part before it starts.
        results: Batches of an evaluation before, of the same model; what an update of its memory cannot
            have changed does not run again.
    """
    if on_part and facts:
        on_part("facts")
    fact_scores = recall(model, tokenizer, facts, prompt, results=results)
    scores = {}
    for probe in probes:
        if on_part:
            on_part(probe.name)
        scores[probe.name] = score_probe(model, tokenizer, probe, prompt, results)
    return Evaluation(fact_scores, scores)


def answer_tokens(tokenizer: Any, facts: Sequence[Fact]) -> int:
    """Tokens an answer may have: as many as the longest right one, within bounds."""
    lengths = [len(tokenizer(fact.answer)["input_ids"]) for fact in facts if fact.answer]
    return min(max([MIN_ANSWER_TOKENS, *lengths]), MAX_ANSWER_TOKENS)


def recall(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    prompt: PromptFormat,
    max_new_tokens: int | None = None,
    results: ResultCache | None = None,
) -> FactScores:
    """Ask for every fact in its main trained wording and in all its held-out ones.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        facts: What to ask for.
        prompt: How to ask.
        max_new_tokens: Where an answer is cut; by default at the longest right one.
        results: As in `evaluate`.
    """
    seen = [(fact, fact.question) for fact in facts if fact.question]
    heldout = [(fact, question) for fact in facts for question in fact.heldout_questions]
    asked = [question for _, question in (*seen, *heldout)]
    replies = answer_questions(
        model,
        tokenizer,
        asked,
        prompt=prompt,
        max_new_tokens=max_new_tokens or answer_tokens(tokenizer, facts),
        results=results,
    )
    answers = dict(zip(asked, replies, strict=True))

    def score(metric: Callable[[str, Sequence[str]], float], pairs: list[tuple[Fact, str]]) -> list[float]:
        return [metric(answers[question], fact.answers) for fact, question in pairs]

    seen_scores, heldout_scores = score(f1, seen), score(f1, heldout)
    return FactScores(
        num=len(facts),
        seen_f1=mean_or_none(seen_scores),
        seen_em=mean_or_none(score(exact_match, seen)),
        heldout_f1=mean_or_none(heldout_scores),
        heldout_em=mean_or_none(score(exact_match, heldout)),
        heldout_recall=mean_or_none(score(contains_answer, heldout)),
        answers=answers,
        seen_scores=tuple(seen_scores),
        heldout_scores=tuple(heldout_scores),
    )


def retention(before: ProbeScore, after: ProbeScore) -> float | None:
    """Share of the answers that were right before and still are; None where nothing was right."""
    return mean_or_none([float(a) for b, a in zip(before.right, after.right, strict=True) if b])


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Put two evaluations of the same questions side by side, as plain JSON values.

    Returns:
        `facts` with the scores after, and those before under "before"; `probes` by name with metric,
        before, after, forgetting (relative loss, positive is worse), num and, for questions, retention.
    """
    return {
        "facts": {**fact_values(after.facts), "before": fact_values(before.facts)},
        "probes": {
            name: {
                "metric": old.metric,
                "before": old.value,
                "after": after.probes[name].value,
                "forgetting": forgetting(
                    old.value, after.probes[name].value, higher_is_better=old.metric not in LOWER_IS_BETTER
                ),
                "num": old.num,
                **({"retention": retention(old, after.probes[name])} if old.right else {}),
            }
            for name, old in before.probes.items()
        },
    }


def fact_values(scores: FactScores) -> dict[str, Any]:
    """Fact scores as plain JSON values, without those of single questions."""
    return {name: value for name, value in dataclasses.asdict(scores).items() if name not in PER_QUESTION}
