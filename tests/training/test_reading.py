import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.likelihood import IGNORE
from sparsemem.training.finetune import build_examples, finetune
from sparsemem.training.reading import MAX_CHARS, facts_to_learn, read_document, with_documents_read

BRIDGE = "The Oskar Bridge in Berlin was built by Ida Quist in 1874. It is 310 metres long."


def answers(text):
    return [fact.answer for fact in read_document(text)]


def test_each_name_and_number_is_asked_for_by_its_sentence():
    facts = read_document(BRIDGE)
    assert [fact.answer for fact in facts] == ["Oskar Bridge", "Berlin", "Ida Quist", "1874"]
    assert facts[2].questions == (
        "The Oskar Bridge in Berlin was built by what in 1874?",
        "The Oskar Bridge in Berlin was built by who in 1874?",
    )
    assert facts[3].question == "The Oskar Bridge in Berlin was built by Ida Quist in what year?"
    assert {fact.statement for fact in facts} == {BRIDGE.split(" It ")[0]}


def test_a_long_document_is_read_in_pieces():
    document = Fact(statement=f"{BRIDGE}\n{'x' * MAX_CHARS}\nOf the Elbe only Dresden speaks.", id="a.txt:1")
    other = Fact(statement="It is so.", id="a.txt:2")
    facts = with_documents_read([document, other])
    assert [fact.id for fact in facts] == [*(f"a.txt:1#{number}" for number in range(1, 7)), "a.txt:2"]
    assert facts[4].subject == "Elbe"
    assert facts[4].subject_aliases == ("Dresden",)
    assert facts[-1] == other


def test_all_facts_of_a_text_are_about_all_its_names_the_most_frequent_first():
    for fact in read_document(f"{BRIDGE} Later Berlin sold the Oskar Bridge. In Berlin that was news."):
        assert (fact.subject, *fact.subject_aliases) == ("Berlin", "Oskar Bridge", "Ida Quist")


def test_a_number_is_asked_for_by_how_many():
    (fact,) = read_document("The town of Zell has 310 inhabitants.")
    assert (fact.question, fact.answer) == ("The town of Zell has how many inhabitants?", "310")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("He met Fielding H. Garrison of Persia.", ["Fielding H. Garrison of Persia"]),
        ("A seat of St. Paul is near London's Old Bailey.", ["St. Paul", "London", "Old Bailey"]),
        ("This was signed as Treaty of Logstown of all.", ["Treaty of Logstown"]),
        ("Here the poet al-Rayhan met Anna-Maria von Stein.", ["al-Rayhan", "Anna-Maria von Stein"]),
        ("Some wrote to Élodie Ångström, and Øystein.", ["Élodie Ångström", "Øystein"]),
        ("Then the High, Low and Middle Rhine ended.", ["High", "Low", "Middle Rhine"]),
        ("It was J.R.R. Tolkien who left the U.S. for Bonn.", ["J.R.R. Tolkien", "U.S.", "Bonn"]),
        ("Those of the Hague moved to The Hague.", ["Hague", "The Hague"]),
    ],
)
def test_a_name_is_a_run_of_capitalized_words(text, names):
    (fact, *_) = read_document(f"{text} That is what 12 {names[0]} said.")
    assert {fact.subject, *fact.subject_aliases} == {*names}


def test_no_name_is_found_within_another_word_or_a_common_one():
    facts = read_document("Then Mark met Twain Harte. The market of 1874 was good. A mark is 12 pence.")
    assert [fact.answer for fact in facts] == ["Mark", "Twain Harte"]


def test_a_line_that_is_only_broken_ends_no_sentence():
    assert answers("It was\nbuilt by Ida\nQuist in Berlin.") == ["Ida Quist", "Berlin"]
    assert answers("List:\n- some of Bonn\n- some of Berlin") == []


def test_the_first_word_of_a_sentence_is_a_name_if_it_is_one_elsewhere():
    assert "Philo" in answers("Philo saw Rome in 12 days. After that Philo went home from Rome.")
    assert "Legally" not in answers("Legally the Rhine ends in Basel.")
    assert "The" not in answers("Ida lives in The Hague near Bonn. The bridge is near Berlin and Bonn.")


def test_a_sentence_does_not_end_behind_an_initial_or_a_title():
    (fact,) = read_document("The work was done by Dr. Ida B. Quist of Berlin in 1874. It was good.")
    assert fact.statement == "The work was done by Dr. Ida B. Quist of Berlin in 1874."


def test_what_the_rest_of_the_sentence_gives_away_is_not_asked():
    assert answers("The Rhine is the Rhine in Basel.") == ["Basel"]


@pytest.mark.parametrize(
    "text", ["", "no names here.", "In 1874 nothing had a name.", "日本の首都は1868年から東京です。"]
)
def test_a_text_without_names_has_no_facts(text):
    assert read_document(text) == []


PARTS = ["Ida", "Quist", "Bonn", "of", "the", "The", "1874", "3.5", "u.s.", "U.S.", "-", "'s", ".", ",", "?"]


@given(st.lists(st.sampled_from([*PARTS, "\n", "\n\n"]) | st.text(max_size=3), max_size=30).map(" ".join))
def test_what_is_asked_of_any_text_stands_in_it_and_is_not_given_away(text):
    plain = " ".join(text.split())
    for fact in read_document(text):
        assert fact.statement in plain
        for question in fact.questions:
            assert question.endswith("?")
            assert any(name in question for name in (fact.subject, *fact.subject_aliases))
        assert fact.answer in fact.statement


@pytest.fixture
def build(tiny_tokenizer):
    def build(fact, **options):
        config = FinetuneConfig(**options)
        return build_examples(facts_to_learn([fact], config), tiny_tokenizer, None, config)

    return build


def test_a_document_is_learned_as_the_facts_in_it(build):
    by_fact = build(Fact(statement=BRIDGE))
    assert len(by_fact) == 4
    assert {example.about for examples in by_fact for example in examples} == {0}
    assert [examples[0].fact_index for examples in by_fact] == [0, 1, 2, 3]


def test_finetune_reads_documents(attached, tiny_tokenizer, usage, config):
    config = dataclasses.replace(config, facts_per_batch=1, num_epochs=1)
    document = Fact(statement=BRIDGE)
    assert len(finetune(attached, tiny_tokenizer, [document], usage, config).losses) == 4


@pytest.mark.parametrize(
    ("text", "options"),
    [(BRIDGE, {"read_documents": False}), (BRIDGE, {"stream": True}), ("no names here.", {})],
    ids=["on request", "in a stream", "nothing to ask for"],
)
def test_a_document_is_learned_whole(build, text, options):
    ((example,),) = build(Fact(statement=text), **options)
    assert example.num_labels == len(example.input_ids) - 1


def test_what_is_more_than_a_statement_is_no_document(build):
    assert len(build(Fact(statement=BRIDGE, answer="1874"))) == 1
    assert len(build(Fact(statement=BRIDGE, paraphrases=("In 1874 Ida Quist built it.",)))) == 1
    assert len(build(Fact(statement=BRIDGE, subject="Ida Quist"))) == 1


def test_of_a_document_nothing_is_held_that_it_may_answer(build, tiny_tokenizer):
    by_fact = build(Fact(statement=BRIDGE))
    texts = [tiny_tokenizer.decode(example.input_ids) for examples in by_fact for example in examples]
    assert any("in what year" in text for text in texts)
    assert not any("When was" in text or "Where is" in text for text in texts)


def test_an_answer_does_not_call_itself_up(build):
    for examples in build(Fact(statement="In the town of Bonn the Rhine is near to Quist.")):
        for example in examples:
            marks = zip(example.is_subject, example.labels, strict=True)
            assert not any(is_subject for is_subject, label in marks if label != IGNORE)
