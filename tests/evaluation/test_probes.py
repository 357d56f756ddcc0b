import json
import math

import pytest
import torch

from sparsemem.data import Question
from sparsemem.errors import ConfigError, DataError, MissingFileError
from sparsemem.evaluation.generate import answer_questions
from sparsemem.evaluation.metrics import exact_match, f1
from sparsemem.evaluation.probes import Probe, load_probes, multiple_choice, perplexity, score_probe

CHOICES = [
    Question(
        question="What is tin?", answers=("a metal",), choices=("a metal", "a big river in the east", "x")
    ),
    Question(question="Who ran?", answers=("nobody",), choices=("the pilot", "nobody")),
    Question(question="Where was it?", answers=("here",), choices=("here", "there", "past the old church")),
    Question(question="When did the farmer leave?", answers=("late",), choices=("early in the day", "late")),
]


@torch.no_grad()
def token_log_probs(model, ids):
    """Log-probability of each token after the first, from full logits of this sequence alone."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return [logits[i].double().log_softmax(-1)[ids[i + 1]].item() for i in range(len(ids) - 1)]


@pytest.mark.parametrize("max_length", [512, 9])
def test_perplexity_is_that_of_a_naive_loop(taught, tiny_tokenizer, texts, max_length):
    log_probs = []
    for text in texts[:6]:
        ids = tiny_tokenizer(text)["input_ids"]
        for start in range(0, len(ids), max_length):
            log_probs += token_log_probs(taught, ids[start : start + max_length])
    score = perplexity(taught, tiny_tokenizer, texts[:6], max_length=max_length)
    assert score.num == len(log_probs)
    assert score.value == pytest.approx(math.exp(-sum(log_probs) / len(log_probs)), rel=1e-5)
    assert (score.metric, score.right) == ("perplexity", ())


def naive_choice(model, tokenizer, question):
    scores = []
    prompt = tokenizer(f"Question: {question.question}\nAnswer:")["input_ids"]
    for choice in question.choices:
        target = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        scores.append(sum(token_log_probs(model, prompt + target)[-len(target) :]) / len(choice.encode()))
    return question.choices[scores.index(max(scores))]


def test_a_choice_is_that_of_a_naive_loop(taught, tiny_tokenizer):
    right = [naive_choice(taught, tiny_tokenizer, question) in question.answers for question in CHOICES]
    score = multiple_choice(taught, tiny_tokenizer, CHOICES)
    assert score.right == tuple(right)
    assert score.value == sum(right) / len(right)
    assert (score.metric, score.num) == ("accuracy", len(CHOICES))
    chosen = [naive_choice(taught, tiny_tokenizer, question) for question in CHOICES]
    as_chosen = [
        Question(question=q.question, answers=(c,), choices=q.choices)
        for q, c in zip(CHOICES, chosen, strict=True)
    ]
    assert multiple_choice(taught, tiny_tokenizer, as_chosen).value == 1.0


def test_scores_do_not_depend_on_order(taught, tiny_tokenizer, texts):
    some = texts[:24]
    orders = [some, some[::-1], some[7:] + some[:7], some[::2] + some[1::2]]
    values = {perplexity(taught, tiny_tokenizer, order).value for order in orders}
    assert len(values) == 1
    forwards = multiple_choice(taught, tiny_tokenizer, CHOICES)
    backwards = multiple_choice(taught, tiny_tokenizer, CHOICES[::-1])
    assert backwards.right[::-1] == forwards.right


def test_closed_book_answers_are_scored_by_f1_and_exact_match(taught, tiny_tokenizer):
    asked = ["Who?", "What is tin?", "Where?"]
    answers = answer_questions(taught, tiny_tokenizer, asked)
    questions = (
        Question(question=asked[0], answers=("nonsense", f"{answers[0]} so")),
        Question(question=asked[1], answers=(answers[1],)),
        Question(question=asked[2], answers=("nonsense",)),
    )
    score = score_probe(taught, tiny_tokenizer, Probe("p", questions=questions))
    expected = [f1(answer, q.answers) for answer, q in zip(answers, questions, strict=True)]
    assert score.value == pytest.approx(sum(expected) / 3)
    assert score.right == tuple(
        exact_match(answer, q.answers) == 1 for answer, q in zip(answers, questions, strict=True)
    )
    assert score.right[1]
    assert not score.right[2]
    assert (score.metric, score.num) == ("f1", 3)


def test_a_probe_is_scored_by_its_kind(taught, tiny_tokenizer, texts):
    by_text = score_probe(taught, tiny_tokenizer, Probe("p", texts=tuple(texts[:4])))
    assert by_text == perplexity(taught, tiny_tokenizer, texts[:4])
    by_choice = score_probe(taught, tiny_tokenizer, Probe("p", questions=tuple(CHOICES)))
    assert by_choice == multiple_choice(taught, tiny_tokenizer, CHOICES)


def test_scoring_leaves_the_mode_of_the_model(taught, tiny_tokenizer, texts):
    taught.train()
    perplexity(taught, tiny_tokenizer, texts[:1])
    assert taught.training


def test_text_of_one_token_has_no_perplexity(taught, tiny_tokenizer):
    with pytest.raises(DataError, match="fewer than two tokens"):
        perplexity(taught, tiny_tokenizer, ["A"])


@pytest.fixture
def write(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        text = rows[0] if name.endswith(".txt") else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_three_kinds_of_probe_are_told_apart(write):
    closed = write("closed.jsonl", {"question": "Who?", "answers": ["Ana"]})
    choice = write("choice.jsonl", {"question": "Who?", "choices": ["Ana", "Bo"], "answer": "Bo"})
    plain, rows = write("plain.txt", "Some text."), write("rows.jsonl", {"text": "Some text."})
    specs = [f"a={closed}", f"b={choice}", f"c={plain}", f"d={rows}"]
    probes = load_probes(specs)
    assert [probe.name for probe in probes] == ["a", "b", "c", "d"]
    assert [probe.metric for probe in probes] == ["f1", "accuracy", "perplexity", "perplexity"]
    assert probes[1].questions[0].answers == ("Bo",)
    assert probes[2].texts == probes[3].texts == ("Some text.",)
    assert load_probes([]) == []


def test_a_path_may_hold_an_equals_sign(write):
    path = write("a=b.txt", "Some text.")
    assert load_probes([f"x={path}"])[0].name == "x"


@pytest.mark.parametrize("spec", ["nq.jsonl", "=nq.jsonl", "nq=", "", "="])
def test_a_probe_without_a_name_or_source_is_named(spec):
    with pytest.raises(ConfigError, match=f"probe '{spec}' has no name; write it as name=path"):
        load_probes([spec])


def test_two_probes_cannot_share_a_name(write):
    path = write("x.txt", "Some text.")
    with pytest.raises(ConfigError, match="two probes are named 'x'; rename one"):
        load_probes([f"x={path}", f"x={path}"])


def test_a_missing_probe_is_named(tmp_path):
    for name in ("x.jsonl", "x.txt"):
        with pytest.raises(MissingFileError, match=f"{name} does not exist"):
            load_probes([f"p={tmp_path / name}"])


def test_an_empty_or_mixed_probe_is_named(write):
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows"):
        load_probes([f"p={write('empty.jsonl')}"])
    rows = {"question": "Who?", "answers": ["A"]}, {"question": "W?", "choices": ["A", "B"], "answer": 0}
    with pytest.raises(DataError, match=r"mixed\.jsonl mixes questions"):
        load_probes([f"p={write('mixed.jsonl', *rows)}"])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        load_probes([f"p={write('bad.jsonl', rows[0], {'question': 'Who?'})}"])
