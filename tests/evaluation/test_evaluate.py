import json

import pytest

import sparsemem.evaluation.evaluate as module
from sparsemem.data import Fact, Question
from sparsemem.evaluation.evaluate import (
    Evaluation,
    FactScores,
    compare,
    evaluate,
    fact_values,
    recall,
    retention,
)
from sparsemem.evaluation.generate import answer_questions
from sparsemem.evaluation.probes import Probe, ProbeScore

FACTS = [
    Fact(question="Who?", answer="Ana", heldout_questions=("Who is it?", "Who now?"), paraphrases=("Whom?",)),
    Fact(question="Where?", answer="Oslo", aliases=("Bergen",)),
    Fact(statement="Jov left."),
    Fact(statement="Bo ran.", answer="Bo", heldout_questions=("Who ran?",)),
]


def probe_score(metric, value, right=(), scores=()):
    return ProbeScore(metric=metric, value=value, num=4, right=right, scores=scores)


def evaluation(seen, heldout, em, **probes):
    facts = FactScores(
        num=2,
        seen_f1=seen,
        seen_em=seen and seen / 2,
        heldout_f1=heldout,
        heldout_em=em,
        heldout_recall=em,
        answers={"Who?": "Ana"},
        seen_scores=(0.5,),
        heldout_scores=(0.5,),
    )
    return Evaluation(facts, probes)


def test_facts_are_asked_in_their_trained_and_heldout_wordings(taught, tiny_tokenizer):
    asked = ["Who?", "Where?", "Who is it?", "Who now?", "Who ran?"]
    scores = evaluate(taught, tiny_tokenizer, FACTS).facts
    assert scores.num == 4
    assert scores.answers == dict(zip(asked, answer_questions(taught, tiny_tokenizer, asked), strict=True))


def test_recall_is_the_mean_over_questions(taught, tiny_tokenizer, monkeypatch):
    replies = {
        "Who?": "Ana",
        "Where?": "in Bergen",
        "Who is it?": "Ana Li",
        "Who now?": "Bo",
        "Who ran?": "bo",
    }
    monkeypatch.setattr(
        module, "answer_questions", lambda _m, _t, questions, **_: [replies[q] for q in questions]
    )
    scores = evaluate(taught, tiny_tokenizer, FACTS).facts
    assert scores.seen_scores == pytest.approx((1, 2 / 3))
    assert scores.seen_f1 == pytest.approx((1 + 2 / 3) / 2)
    assert scores.seen_em == pytest.approx(1 / 2)
    assert scores.heldout_scores == pytest.approx((2 / 3, 0, 1))
    assert scores.heldout_f1 == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert scores.heldout_em == pytest.approx(1 / 3)
    assert scores.heldout_recall == pytest.approx(2 / 3)


def test_what_is_not_asked_has_no_score(taught, tiny_tokenizer):
    scores = evaluate(taught, tiny_tokenizer, [Fact(statement="Jov left.")]).facts
    values = fact_values(scores)
    assert values.pop("num") == 1
    assert set(values.values()) == {None}
    assert (scores.seen_scores, scores.heldout_scores) == ((), ())
    assert evaluate(taught, tiny_tokenizer).facts.num == 0


def test_parts_are_announced_and_probes_scored(taught, tiny_tokenizer, texts):
    probes = [
        Probe("text", texts=tuple(texts[:2])),
        Probe("choice", questions=(Question(question="W?", answers=("a",), choices=("a", "b")),)),
    ]
    parts = []
    scores = evaluate(taught, tiny_tokenizer, FACTS[2:3], probes, on_part=parts.append)
    assert parts == ["facts", "text", "choice"]
    assert {name: score.metric for name, score in scores.probes.items()} == {
        "text": "perplexity",
        "choice": "accuracy",
    }


def test_evaluating_twice_gives_the_same(taught, tiny_tokenizer, texts):
    probes = [Probe("text", texts=tuple(texts[:4]))]
    assert evaluate(taught, tiny_tokenizer, FACTS, probes) == evaluate(taught, tiny_tokenizer, FACTS, probes)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((True, True, False, True), (True, False, True, True), 2 / 3),
        ((True, True), (True, True), 1.0),
        ((True, False), (False, True), 0.0),
        ((False, False), (True, True), None),
        ((), (), None),
    ],
)
def test_retention_is_the_share_of_right_answers_kept(before, after, expected):
    found = retention(probe_score("f1", 0.5, before), probe_score("f1", 0.5, after))
    assert found == (expected if expected is None else pytest.approx(expected))


def test_two_evaluations_are_put_side_by_side():
    before = evaluation(
        0.1,
        0.2,
        0.0,
        qa=probe_score("f1", 0.5, (True, False), (1.0, 0.0)),
        wiki=probe_score("perplexity", 10.0),
        maths=probe_score("nll", 2.0, scores=(1.0, 3.0)),
    )
    after = evaluation(
        1.0,
        0.9,
        0.8,
        qa=probe_score("f1", 0.4, (True, True), (0.4, 0.4)),
        wiki=probe_score("perplexity", 11.0),
        maths=probe_score("nll", 1.5, scores=(1.0, 2.0)),
    )
    report = compare(before, after)
    assert json.loads(json.dumps(report)) == report
    assert report["facts"] == {
        "num": 2,
        "seen_f1": 1.0,
        "seen_em": 0.5,
        "heldout_f1": 0.9,
        "heldout_em": 0.8,
        "heldout_recall": 0.8,
        "before": {
            "num": 2,
            "seen_f1": 0.1,
            "seen_em": 0.05,
            "heldout_f1": 0.2,
            "heldout_em": 0.0,
            "heldout_recall": 0.0,
        },
    }
    assert report["probes"] == {
        "qa": {
            "metric": "f1",
            "before": 0.5,
            "after": 0.4,
            "forgetting": pytest.approx(0.2),
            "num": 4,
            "retention": 1.0,
        },
        "wiki": {
            "metric": "perplexity",
            "before": 10.0,
            "after": 11.0,
            "forgetting": pytest.approx(0.1),
            "num": 4,
        },
        "maths": {
            "metric": "nll",
            "before": 2.0,
            "after": 1.5,
            "forgetting": pytest.approx(-0.25),
            "num": 4,
        },
    }


def test_fact_values_have_the_keys_of_the_contract():
    values = fact_values(evaluation(0.5, None, None).facts)
    assert values == {
        "num": 2,
        "seen_f1": 0.5,
        "seen_em": 0.25,
        "heldout_f1": None,
        "heldout_em": None,
        "heldout_recall": None,
    }


@pytest.mark.parametrize(("answer", "expected"), [("Rome", 16), ("very " * 30, 30), ("very " * 200, 64)])
def test_answers_may_be_as_long_as_the_longest_right_one(monkeypatch, answer, expected):
    asked = {}

    def answer_questions(_model, _tokenizer, questions, **options):
        asked.update(options)
        return ["" for _ in questions]

    monkeypatch.setattr(module, "answer_questions", answer_questions)
    fact = Fact(question="Where?", answer=answer)
    recall(None, lambda text: {"input_ids": text.split()}, [fact], "qa")
    assert asked["max_new_tokens"] == expected
