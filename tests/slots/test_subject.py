import pytest
import torch

from sparsemem.data import Fact
from sparsemem.slots.subject import MAX_WORDS, _run_around, find_subject, names_of
from sparsemem.slots.usage import Usage


@pytest.fixture
def usage(tiny_tokenizer, texts):
    """Usage of the background texts and of some question words."""
    documents = [
        *texts,
        *["Where was the born? Who is it? What did he invent? The river is in the town."] * 40,
    ]
    frequency = torch.zeros(300, dtype=torch.int64)
    for document in documents:
        frequency[list(set(tiny_tokenizer(document)["input_ids"]))] += 1
    return Usage({}, frequency, len(documents), 0, "")


@pytest.fixture
def find(tiny_tokenizer, usage):
    return lambda wordings, answers=(): find_subject(wordings, answers, tiny_tokenizer, usage)


@pytest.mark.parametrize(
    ("wordings", "answers", "subject"),
    [
        (
            [
                "Where was Zyqvex Quorl born?",
                "Zyqvex Quorl was born in Paris.",
                "The town of Zyqvex Quorl is?",
            ],
            ["Paris"],
            "Zyqvex Quorl",
        ),
        (["Who is Xizzy?", "Xizzy is the pilot."], ["the pilot"], "Xizzy"),
        (["Where is Qux-Zyx in the town?", "In the town is Qux-Zyx."], ["here"], "Qux-Zyx"),
        (["Who is Zed K. Quux?", "Zed K. Quux is it."], ["it"], "Zed K. Quux"),
    ],
    ids=["name", "one word", "hyphen", "initial"],
)
def test_the_rare_span_that_wordings_share_is_found(find, wordings, answers, subject):
    assert find(wordings, answers) == subject


def test_case_and_punctuation_do_not_hide_it_and_the_first_wording_decides_how_it_is_written(find):
    wordings = ["Where was ZYQVEX-QUORL born?", "born there: zyqvex quorl!", "Zyqvex (Quorl) was it"]
    assert find(wordings, ["Paris"]) == "ZYQVEX-QUORL"


def test_the_subject_stands_in_the_first_wording_as_it_is_given_back(find):
    wordings = ["Who is “Zyqvex,  Quorl”?", "Zyqvex Quorl is it."]
    found = find(wordings)
    assert found in wordings[0]
    assert found == "Zyqvex,  Quorl"


@pytest.mark.parametrize(
    "wordings",
    [
        [],
        ["Where was Zyqvex born?", "Who is Quux?"],
        ["Who is it?", "Where was it?"],
        ["", "Zyqvex"],
        ["?!", "?!"],
    ],
    ids=["no wording", "nothing rare is shared", "only common words", "empty", "no words"],
)
def test_there_is_none_where_nothing_rare_is_shared(find, wordings):
    assert find(wordings, ["Paris"]) is None


@pytest.mark.parametrize("answer", ["Quizzux", "QUIZZUX", "the Quizzux", "Quizzux."])
def test_the_answer_is_never_the_subject(find, answer):
    wordings = ["What did Zyqvex invent? The Quizzux", "Zyqvex did invent Quizzux", "Quizzux: Zyqvex did"]
    assert find(wordings, [answer]) == "Zyqvex"


def test_an_alias_of_the_answer_is_never_the_subject(find):
    wordings = ["It is Quizzux in town", "Quizzux is in the town"]
    assert find(wordings, ["Brazza"]) == "Quizzux"
    assert find(wordings, ["Brazza", "Quizzux"]) is None


def test_half_of_the_wordings_are_enough_and_fewer_are_not(find):
    shared, other = "Who is Zyqvex?", "Who is it?"
    assert find([shared, shared, other, other]) == "Zyqvex"
    assert find([shared, shared, other, other, other]) is None
    assert find([shared, other]) is None


@pytest.mark.parametrize(
    ("wording", "subject"),
    [
        ("Where was Zyqvex Quorl born?", "Zyqvex Quorl"),
        ("Who is the Duke of Quux-Zyx of the town?", "Duke of Quux-Zyx"),
        ("Zyqvex Quorl is in the town of?", "Zyqvex Quorl"),
        ("Where was the xyzzyk qoph born? Who is it?", "xyzzyk qoph"),
        ("Where was the zyqvexing Quux born?", "Quux"),
        ("Where was it?", None),
        ("", None),
    ],
    ids=["name", "particles", "at the beginning", "term", "names come first", "nothing rare", "empty"],
)
def test_one_wording_alone_is_about_its_rarest_name_or_term(find, wording, subject):
    assert find([wording], ["Paris"]) == subject


def test_a_common_word_at_the_beginning_is_no_name(find):
    assert find(["Town is the river of Zyq in?"]) == "Zyq"
    assert find(["Zyq is the river of the town in?"]) == "Zyq"


def test_the_answer_is_no_subject_of_a_wording_alone(find):
    assert find(["Is the Quizzux in Zyq born?"], ["Quizzux"]) == "Zyq"
    assert find(["Is the Quizzux of the Vox in Zyq born?"], ["Quizzux of the Vox"]) == "Zyq"
    assert find(["Is the quizzuxyk of the zyqo born?"], ["quizzuxyk"]) == "zyqo"


@pytest.mark.parametrize(
    ("wording", "answer", "subject"),
    [
        ("Where is Zyqvex Quorl of the town?", "Zyqvex", "Zyqvex Quorl"),
        ("Who is the Duke of Quux?", "Xizzy, the king of it", "Duke of Quux"),
    ],
    ids=["a word of it", "only a particle"],
)
def test_a_name_may_have_a_word_of_the_answer(find, wording, answer, subject):
    assert find([wording], [answer]) == subject


@pytest.mark.parametrize("letter", ["Z", "ZQ"])
def test_a_letter_or_two_are_no_name(find, letter):
    assert find([f"Who is the xyzzyk {letter} of the town?"], []) == f"xyzzyk {letter}"


def test_a_term_has_at_most_three_words(find):
    assert find(["Who is the xyzzyk qophyx zyqvex kvuxyz quuxyk?"]) == "xyzzyk qophyx zyqvex"


@pytest.mark.parametrize(
    ("place", "belongs", "run"),
    [
        (0, [True] * 5, (0, 2)),
        (4, [True] * 5, (2, 4)),
        (2, [False, True, True, True, True], (1, 3)),
        (2, [True, False, True, False, True], (2, 2)),
        (1, [True, True], (0, 1)),
    ],
)
def test_a_run_has_what_belongs_together_around_its_middle(place, belongs, run):
    assert _run_around(place, belongs) == run


def test_a_word_inside_another_is_not_shared(find):
    assert find(["Who is Zyq?", "Who is Zyqvex?"]) is None


def test_spans_have_at_most_six_words(find):
    name = " ".join(f"{first}zyq" for first in "KVXJQZKVX")
    found = find([f"Who is {name}?", f"{name} is it."])
    assert found is not None
    assert len(found.split()) == MAX_WORDS
    assert found in name


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"subject": "Quz", "subject_aliases": ("Q",)}, ("Quz", "Q")),
        ({"subject_aliases": ("Q",)}, ("Zyqvex", "Q")),
        ({}, ("Zyqvex",)),
        ({"subject": ""}, ()),
    ],
)
def test_a_fact_is_called_as_it_says_or_as_is_found(tiny_tokenizer, usage, given, names):
    fact = Fact(question="Where was Zyqvex born?", answer="Oslo", **given)
    assert names_of(fact, tiny_tokenizer, usage) == names


def test_nothing_is_found_in_a_document_or_without_usage(tiny_tokenizer, usage):
    assert names_of(Fact(statement="Where was Zyqvex born"), tiny_tokenizer, usage) == ()
    assert names_of(Fact(question="Where was Zyqvex born?", answer="Oslo"), tiny_tokenizer, None) == ()
