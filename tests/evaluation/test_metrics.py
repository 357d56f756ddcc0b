import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.evaluation.metrics import contains_answer, exact_match, f1, forgetting, mean, normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("A cat, an owl & the dog.", "cat owl dog"),
        ("Theodore ate anthems", "theodore ate anthems"),
        ("Jean-Luc", "jean luc"),
        ("1990\u20132000", "1990 2000"),
        ("and/or", "and or"),
        ("U.S.", "us"),
        ("  ", ""),
        ("the", ""),
        ("Zürich", "zürich"),
    ],
)
def test_normalized(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Paris.", ["paris"], 1.0),
        ("paris", ["London", "Paris"], 1.0),
        ("Paris, France", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("Paris", [], 0.0),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It was Ana Li, in Oslo.", ["ana li"], 1.0),
        ("It was Ana Li, in Oslo.", ["Bo", "Oslo"], 1.0),
        ("the Paris", ["Paris!"], 1.0),
        # Whole words, all of them, in their order.
        ("Anabel", ["Ana"], 0.0),
        ("Susana", ["Ana"], 0.0),
        ("Ana", ["Ana Li"], 0.0),
        ("Li Ana", ["Ana Li"], 0.0),
        ("Ana Bo Li", ["Ana Li"], 0.0),
        ("In 19901", ["1990"], 0.0),
        ("", ["Ana"], 0.0),
        # What normalises to nothing is not in everything.
        ("Ana", ["the"], 0.0),
        ("Ana", [], 0.0),
    ],
)
def test_contains_answer(prediction, answers, expected):
    assert contains_answer(prediction, answers) == expected


@given(st.lists(st.sampled_from("xyz")), st.lists(st.sampled_from("xyz")), st.lists(st.sampled_from("xyz")))
def test_an_answer_stays_in_whatever_is_said_around_it(before, answer, after):
    answer = answer or ["x"]
    assert contains_answer(" ".join([*before, *answer, *after]), [" ".join(answer)]) == 1
    assert contains_answer(" ".join(answer), [" ".join(answer)]) == 1


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Ana Li", ["Ana Li"], 1.0),
        ("the Ana", ["Ana"], 1.0),
        # One of two words right, one of one found: 2 * (1/2 * 1) / (1/2 + 1).
        ("Ana Li", ["Ana"], 2 / 3),
        # Two of four right, two of three found.
        ("Ana Li of Oslo", ["Li Ana Bo"], 2 * (2 / 4 * 2 / 3) / (2 / 4 + 2 / 3)),
        # The best of the answers counts.
        ("Ana Li", ["Bo", "Ana", "Li Ana"], 1.0),
        # A repeated word counts as often as both have it.
        ("no no no", ["no"], 2 * (1 / 3 * 1) / (1 / 3 + 1)),
        ("Bo", ["Ana"], 0.0),
        ("", ["Ana"], 0.0),
        ("the", ["a"], 1.0),
        ("Ana", [], 0.0),
    ],
)
def test_f1(prediction, answers, expected):
    assert f1(prediction, answers) == pytest.approx(expected)


@given(st.lists(st.sampled_from("xyz")), st.lists(st.sampled_from("xyz"), min_size=1))
def test_f1_is_symmetric_and_a_fraction_and_one_for_equal_words(first, second):
    a, b = " ".join(first), " ".join(second)
    assert f1(a, [b]) == f1(b, [a])
    assert 0 <= f1(a, [b]) <= 1
    assert (f1(a, [b]) == 1) == (sorted(first) == sorted(second))


@pytest.mark.parametrize(
    ("before", "after", "higher_is_better", "expected"),
    [
        (0.8, 0.6, True, 0.25),
        (0.5, 0.6, True, -0.2),
        (10.0, 11.0, False, 0.1),
        (10.0, 9.0, False, -0.1),
        (0.8, 0.8, True, 0.0),
        (0.5, 0.0, True, 1.0),
        (0.0, 0.5, True, 0.0),
    ],
)
def test_forgetting_is_the_relative_loss(before, after, higher_is_better, expected):
    assert forgetting(before, after, higher_is_better=higher_is_better) == pytest.approx(expected)


def test_mean():
    assert mean([1.0, 0.0, 0.5]) == 0.5
    assert mean([]) == 0.0
