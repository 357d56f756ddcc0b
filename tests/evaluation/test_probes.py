import copy
import itertools
import json
import math

import pytest
import torch

from sparsemem.data import Completion, Question
from sparsemem.errors import ConfigError, DataError, MissingFileError
from sparsemem.evaluation.generate import answer_questions
from sparsemem.evaluation.metrics import exact_match, f1
from sparsemem.evaluation.probes import Probe, load_probes, multiple_choice, nll, perplexity, score_probe

CHOICES = [
    Question(
        question="What is tin?", answers=("a metal",), choices=("a metal", "a big river in the east", "x")
    ),
    Question(question="Who ran?", answers=("nobody",), choices=("the pilot", "nobody")),
    Question(question="Where was it?", answers=("here",), choices=("here", "there", "past the old church")),
    Question(question="When did the farmer leave?", answers=("late",), choices=("early in the day", "late")),
]
COMPLETIONS = [
    Completion(prompt="The baker walked", completion=" along the river on day 7."),
    Completion(prompt="", completion="It was cold."),
    Completion(prompt="Nobody was there. The ", completion="sun"),
    Completion(prompt="The youn", completion="g pilot drove into town"),
    Completion(prompt="Zürich \U0001f600", completion="\U0001f600 so"),
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


def naive_nll(model, tokenizer, completion, max_length=1024):
    """Cross-entropy of what is left when the tokens wholly within the prompt are taken off."""
    ids = tokenizer(completion.prompt + completion.completion)["input_ids"][:max_length]
    num_before = 0
    # Bytes and not text: a character may be cut in two.
    spelled = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    while sum(spelled[: num_before + 1]) <= len(completion.prompt.encode()):
        num_before += 1
    num_before = max(num_before, 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, num_before - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids[num_before:])).item()


def test_nll_is_the_cross_entropy_of_each_completion_alone(taught, tiny_tokenizer):
    score = nll(taught, tiny_tokenizer, COMPLETIONS)
    expected = [naive_nll(taught, tiny_tokenizer, completion) for completion in COMPLETIONS]
    assert len(set(expected)) == len(expected)
    assert score.scores == pytest.approx(expected, rel=1e-5)
    assert score.value == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert (score.metric, score.num, score.right) == ("nll", len(COMPLETIONS), ())


def test_a_token_across_the_border_belongs_to_the_completion(taught, tiny_tokenizer):
    prompt, completion = "Nobody was there. The ", "sun"
    ids = tiny_tokenizer(prompt + completion)["input_ids"]
    assert tiny_tokenizer.convert_ids_to_tokens(ids)[-2:] == ["Ġs", "un"]
    assert ids != tiny_tokenizer(prompt)["input_ids"] + tiny_tokenizer(completion)["input_ids"]
    log_probs = token_log_probs(taught, ids)
    score = nll(taught, tiny_tokenizer, [Completion(prompt=prompt, completion=completion)])
    assert score.value == pytest.approx(-sum(log_probs[-2:]) / 2, rel=1e-5)


def test_without_a_prompt_all_tokens_after_the_first_count(taught, tiny_tokenizer):
    log_probs = token_log_probs(taught, tiny_tokenizer("Nobody was there.")["input_ids"])
    score = nll(taught, tiny_tokenizer, [Completion(prompt="", completion="Nobody was there.")])
    assert score.value == pytest.approx(-sum(log_probs) / len(log_probs), rel=1e-5)


def test_a_token_put_before_a_text_is_context_and_one_behind_it_is_nothing(taught, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    ends = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", ends)]
    )
    ids = tiny_tokenizer("It was cold.")["input_ids"]
    assert tokenizer("It was cold.")["input_ids"] == [ends, *ids, ends]
    log_probs = token_log_probs(taught, [ends, *ids])
    score = nll(taught, tokenizer, [Completion(prompt="", completion="It was cold.")])
    assert score.value == pytest.approx(-sum(log_probs) / len(ids), rel=1e-5)


def test_a_long_completion_is_cut_at_the_right(taught, tiny_tokenizer):
    long = COMPLETIONS[0]
    num_tokens = len(tiny_tokenizer(long.prompt + long.completion)["input_ids"])
    whole, cut = (nll(taught, tiny_tokenizer, [long], max_length=n).value for n in (1024, num_tokens - 2))
    assert cut == pytest.approx(naive_nll(taught, tiny_tokenizer, long, num_tokens - 2), rel=1e-5)
    assert cut != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("completion", "max_length"), [(COMPLETIONS[0], 2), (Completion(prompt="", completion="A"), 9)]
)
def test_a_completion_without_a_token_to_score_is_named(taught, tiny_tokenizer, completion, max_length):
    with pytest.raises(DataError, match=f"'{completion.completion}' has no token to score.*shorter"):
        nll(taught, tiny_tokenizer, [COMPLETIONS[1], completion], max_length=max_length)


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
    assert score.scores == tuple(map(float, right))
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
    many = [Completion(prompt=text[:9], completion=text[9:]) for text in some] + COMPLETIONS
    assert nll(taught, tiny_tokenizer, many[::-1]).scores[::-1] == nll(taught, tiny_tokenizer, many).scores


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
    assert score.scores == tuple(expected)
    assert score.right == tuple(
        exact_match(answer, q.answers) == 1 for answer, q in zip(answers, questions, strict=True)
    )
    assert score.right[1]
    assert not score.right[2]
    assert (score.metric, score.num) == ("f1", 3)


def test_a_probe_is_scored_by_its_kind(taught, tiny_tokenizer, texts):
    by_text = score_probe(taught, tiny_tokenizer, Probe("p", texts=tuple(texts[:4])))
    assert by_text == perplexity(taught, tiny_tokenizer, texts[:4])
    assert by_text.scores == ()
    by_choice = score_probe(taught, tiny_tokenizer, Probe("p", questions=tuple(CHOICES)))
    assert by_choice == multiple_choice(taught, tiny_tokenizer, CHOICES)
    by_completion = score_probe(taught, tiny_tokenizer, Probe("p", completions=tuple(COMPLETIONS)))
    assert by_completion == nll(taught, tiny_tokenizer, COMPLETIONS)


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


def test_the_kinds_of_probe_are_told_apart(write):
    closed = write("closed.jsonl", {"question": "Who?", "answers": ["Ana"]})
    choice = write("choice.jsonl", {"question": "Who?", "choices": ["Ana", "Bo"], "answer": "Bo"})
    plain, rows = write("plain.txt", "Some text."), write("rows.jsonl", {"text": "Some text."})
    pairs = write("pairs.jsonl", {"prompt": "One ", "completion": " two "}, {"prompt": "", "completion": "3"})
    specs = [f"a={closed}", f"b={choice}", f"c={plain}", f"d={rows}", f"e={pairs}"]
    probes = load_probes(specs)
    assert [probe.name for probe in probes] == ["a", "b", "c", "d", "e"]
    assert [probe.metric for probe in probes] == ["f1", "accuracy", "perplexity", "perplexity", "nll"]
    assert probes[1].questions[0].answers == ("Bo",)
    assert probes[2].texts == probes[3].texts == ("Some text.",)
    assert [(c.prompt, c.completion) for c in probes[4].completions] == [("One ", " two "), ("", "3")]
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


ONE_OF_EACH = (
    {"question": "Who?", "answers": ["A"]},
    {"text": "Some text."},
    {"prompt": "One", "completion": " two"},
)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(ONE_OF_EACH, 2)))
def test_a_row_of_another_kind_is_named_by_file_and_line(write, first, second):
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: "):
        load_probes([f"p={write('mixed.jsonl', first, second)}"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "One"}, '"completion" is None'),
        ({"completion": "two"}, '"prompt" is None; it must be a text, "" if there is none'),
        ({"prompt": None, "completion": "two"}, '"prompt" is None'),
        ({"prompt": ["One"], "completion": "two"}, '"prompt" is'),
        ({"prompt": "One", "completion": ""}, "\"completion\" is ''"),
        ({"prompt": "One", "completion": ["two"]}, '"completion" is'),
    ],
)
def test_a_malformed_completion_is_named_by_file_and_line(write, row, reason):
    for number, rows in ((1, [row]), (2, [ONE_OF_EACH[2], row])):
        with pytest.raises(DataError, match=rf"c\.jsonl:{number}: {reason}"):
            load_probes([f"p={write('c.jsonl', *rows)}"])
