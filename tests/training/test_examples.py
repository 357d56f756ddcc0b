import dataclasses
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.errors import DataError
from sparsemem.likelihood import IGNORE
from sparsemem.training.examples import Example, collate, encode_wording, occurrences
from sparsemem.training.finetune import _earlier, build_examples
from sparsemem.training.paraphrase import OTHER_QUESTIONS, Wording, other_questions, wordings


def encode(tokenizer, fact, wording, subject=None, loss_on="answer", max_length=512):
    return encode_wording(tokenizer, 0, fact, wording, [subject] if subject else [], loss_on, max_length)


def decoded(tokenizer, ids):
    return tokenizer.decode(list(ids))


def learned(tokenizer, encoded):
    """The text of the labels, which must be one run of tokens."""
    places = [place for place, label in enumerate(encoded.labels) if label != IGNORE]
    assert places == list(range(places[0], places[-1] + 1))
    assert all(encoded.labels[place] == encoded.input_ids[place] for place in places)
    return decoded(tokenizer, encoded.input_ids[places[0] : places[-1] + 1])


def marked(tokenizer, encoded):
    ids = [token for token, mark in zip(encoded.input_ids, encoded.is_subject, strict=True) if mark]
    return decoded(tokenizer, ids)


@pytest.mark.parametrize("num_contexts", [1, 4])
def test_a_question_learns_exactly_its_answer_and_where_it_ends(tiny_tokenizer, num_contexts):
    fact = Fact(question="Is Ana the owner of Zed, or Ana's aunt?", answer="Ana")
    found = wordings(fact, tiny_tokenizer, num_contexts=num_contexts, rng=random.Random(0))
    targets = [learned(tiny_tokenizer, encode(tiny_tokenizer, fact, w)) for w in found if w.target]
    # And the question that is only listened to.
    assert targets == [" Ana\n"] * num_contexts + ["Ana<eos>", " Ana\n"]


@pytest.mark.parametrize(
    ("statement", "answer", "before"),
    [
        ("Ana met Ana.", "Ana", "Ana met "),
        ("It was ANA in the end.", "ana", "It was "),
        ("Zed has 12 rooms.", "12", "Zed has "),
    ],
)
def test_a_statement_learns_the_last_place_of_its_answer(tiny_tokenizer, statement, answer, before):
    encoded = encode(tiny_tokenizer, Fact(statement=statement, answer=answer), Wording(statement))
    assert learned(tiny_tokenizer, encoded).strip().lower() == answer.lower()
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORE)
    assert decoded(tiny_tokenizer, encoded.input_ids[:first]).strip() == before.strip()


def test_a_statement_may_hold_an_alias_instead(tiny_tokenizer):
    fact = Fact(question="Who?", answer="Ana Li", aliases=("A. Li",))
    encoded = encode(tiny_tokenizer, fact, Wording("It was A. Li then."))
    assert learned(tiny_tokenizer, encoded).strip() == "A. Li"


def test_the_answer_is_not_looked_for_in_the_context(tiny_tokenizer):
    fact = Fact(statement="Nobody was there.", answer="notes")
    encoded = encode(tiny_tokenizer, fact, Wording("Nobody was there.", "Some notes: "))
    assert learned(tiny_tokenizer, encoded).strip() == "Nobody was there."


@pytest.mark.parametrize("context", ["", "Some notes:\n\n"])
@pytest.mark.parametrize("text", ["Jov left. Nobody saw it.", "Jov left. Did nobody see it?"])
def test_a_document_learns_all_its_tokens_and_none_of_the_context(tiny_tokenizer, text, context):
    encoded = encode(tiny_tokenizer, Fact(statement=text), Wording(text, context))
    assert learned(tiny_tokenizer, encoded) == text
    assert decoded(tiny_tokenizer, encoded.input_ids) == context + text


def test_with_loss_on_all_a_question_learns_its_prompt_too(tiny_tokenizer):
    fact, wording = Fact(question="Q?", answer="Ana"), Wording("Q? Ana\n", "Before. ", target=" Ana\n")
    encoded = encode(tiny_tokenizer, fact, wording, loss_on="all")
    assert learned(tiny_tokenizer, encoded) == "Q? Ana\n"


@pytest.mark.parametrize("answer", ["Ana", "Ana Li of Zed"])
def test_an_answer_is_over_at_its_last_token_and_not_at_what_says_so(tiny_tokenizer, answer):
    fact = Fact(question="Who?", answer=answer, statement=f"It was {answer} then.")
    found = wordings(fact, tiny_tokenizer, num_contexts=2, rng=random.Random(0))
    assert {wording.ending for wording in found} == {"", "\n", "<eos>"}
    for wording in found:
        encoded = encode(tiny_tokenizer, fact, wording)
        assert decoded(tiny_tokenizer, encoded.input_ids[: encoded.over + 1]).endswith(answer)


def test_an_answer_that_is_cut_off_is_never_over(tiny_tokenizer):
    fact, reply = Fact(question="Q?", answer="Ana Li of Zed"), " Ana Li of Zed\n"
    wording = Wording("Q?" + reply, target=reply, ending="\n")
    num_tokens = len(encode(tiny_tokenizer, fact, wording).input_ids)
    without_end = encode(tiny_tokenizer, fact, wording, max_length=num_tokens - 1)
    assert without_end.over == num_tokens - 2
    assert encode(tiny_tokenizer, fact, wording, max_length=num_tokens - 2).over is None


def test_nothing_to_learn_is_none(tiny_tokenizer):
    fact, wording = Fact(statement="It was Ana.", answer="Ana"), Wording("It was Ana.")
    assert encode(tiny_tokenizer, fact, wording, max_length=2) is None
    assert encode(tiny_tokenizer, Fact(statement="A"), Wording("A")) is None


def test_a_wording_is_cut_at_max_length(tiny_tokenizer):
    fact = Fact(statement="Jov left and left and left.")
    encoded = encode(tiny_tokenizer, fact, Wording(fact.statement), max_length=7)
    assert len(encoded.input_ids) == len(encoded.labels) == len(encoded.is_subject) == 7


def test_the_subject_is_marked_wherever_it_stands_in_any_case(tiny_tokenizer):
    fact, text = Fact(statement="-"), "Zed saw zed, ZED and Ned."
    encoded = encode(tiny_tokenizer, fact, Wording(text, "To Zed: "), "zeD")
    assert marked(tiny_tokenizer, encoded).replace(" ", "") == "ZedZedzedZED"


@given(
    st.lists(st.sampled_from(("Zed Po", "zed po", "ZED", "an ox", "the river", "so")), min_size=1, max_size=8)
)
def test_marked_tokens_are_those_that_overlap_the_subject(tiny_tokenizer, words):
    text = " ".join(words)
    encoded = encode(tiny_tokenizer, Fact(statement=text), Wording(text), "Zed Po", loss_on="all")
    if encoded is None:
        return
    offsets = tiny_tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    in_subject = [False] * len(text)
    for start in range(len(text)):
        if text[start : start + 6].lower() == "zed po":
            in_subject[start : start + 6] = [True] * 6
    assert list(encoded.is_subject) == [any(in_subject[left:right]) for left, right in offsets]


def test_without_a_subject_nothing_is_marked(tiny_tokenizer):
    encoded = encode(tiny_tokenizer, Fact(statement="Zed is."), Wording("Zed is."))
    assert not any(encoded.is_subject)


@given(st.text("İaZ. ß", max_size=12), st.text("İaZ. ß", min_size=1, max_size=3))
@example("İİ Zed", "Zed")
def test_occurrences_are_found_where_they_stand_whatever_the_alphabet(text, part):
    found = occurrences(text, part)
    assert all(text[start:stop].lower() == part.lower() for start, stop in found)
    assert bool(found) == (part.lower() in text.lower())


def test_an_answer_is_found_where_it_stands_whatever_the_alphabet(tiny_tokenizer):
    text = "İzmir ve İstanbul: Ana did it."
    encoded = encode(tiny_tokenizer, Fact(statement=text, answer="Ana"), Wording(text))
    assert learned(tiny_tokenizer, encoded).strip() == "Ana"


def test_collated_examples_are_padded_on_the_right():
    first = Example(0, (5, 6, 7), (IGNORE, 6, 7), (True, False, False))
    second = Example(1, (8,), (8,), (True,))
    batch = collate([first, second])
    assert batch.input_ids.tolist()[0] == [5, 6, 7]
    assert batch.input_ids.tolist()[1][0] == 8
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]
    assert batch.is_subject.tolist() == [[True, False, False], [True, False, False]]
    assert batch.fact_index.tolist() == [0, 1]
    assert batch.examples == (first, second)
    # The first token has nothing before it to be predicted from.
    assert batch.num_labels == 2


def build(facts, tokenizer, num_contexts=1):
    config = FinetuneConfig(num_contexts=num_contexts)
    return build_examples(facts, tokenizer, None, config)


def test_examples_are_the_same_for_one_seed(facts, tiny_tokenizer):
    by_fact = build(facts, tiny_tokenizer, 3)
    assert by_fact == build(facts, tiny_tokenizer, 3)
    assert [{example.fact_index for example in examples} for examples in by_fact] == [{0}, {1}, {2}, {3}]
    assert all(len(set(examples)) == len(examples) for examples in by_fact)


def test_a_fact_of_which_nothing_can_be_learned_is_left_out(facts, tiny_tokenizer):
    by_fact = build([Fact(statement="A"), *facts[:1]], tiny_tokenizer)
    assert [examples[0].fact_index for examples in by_fact] == [1]
    with pytest.raises(DataError, match="no fact has a token to learn"):
        build([Fact(statement="A")], tiny_tokenizer)
    with pytest.raises(DataError, match="no fact has a token to learn"):
        build([], tiny_tokenizer)


def test_a_memory_learns_of_a_wording_what_comes_after_its_subject(tiny_tokenizer, usage):
    statements = ("It was Ana who saw Zed.", "Zed was seen by Ana.")
    fact = Fact(statement=statements[0], paraphrases=statements[1:], answer="Ana", subject="Zed")
    of_memory, of_others = (
        build_examples([fact], tiny_tokenizer, usage, FinetuneConfig(method=method))[0]
        for method in ("memory", "full")
    )
    assert [e.teaches for e in of_others] == [True, True]
    assert [e.teaches for e in of_memory[:2]] == [False, True]
    assert of_memory[0].is_subject == of_others[0].is_subject
    assert of_memory[1] == of_others[1]


def test_a_fact_only_told_before_its_subject_is_still_learned(tiny_tokenizer, usage):
    fact = Fact(statement="It was Ana who saw Zed.", answer="Ana", subject="Zed")
    examples = build_examples([fact], tiny_tokenizer, usage, FinetuneConfig())[0]
    assert [e.teaches for e in examples[:1]] == [True]


def others(fact, tokenizer, **options):
    """Texts of a fact from which nothing is learned."""
    config = FinetuneConfig(**options)
    examples = build_examples([fact], tokenizer, None, config)[0]
    return [example for example in examples if not example.teaches]


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("method", ["full", "memory"])
def test_other_questions_about_a_subject_are_held_and_not_learned(tiny_tokenizer, method, loss_on):
    fact = Fact(question="Tell me the owner of Zed.", answer="Ana", subject="Zed")
    held = others(fact, tiny_tokenizer, method=method, penalty="local_kl", loss_on=loss_on)
    assert len(held) == len(OTHER_QUESTIONS)
    assert all("Zed" in marked(tiny_tokenizer, example) for example in held)
    assert all(set(example.labels) == {IGNORE} for example in held)


@pytest.mark.parametrize(
    "options",
    [{"penalty": "none"}, {"held_per_step": 0}, {"anchor": "all"}, {"method": "full"}],
    ids=str,
)
def test_no_other_questions_are_asked_where_nothing_holds_them(tiny_tokenizer, options):
    fact = Fact(question="Tell me the owner of Zed.", answer="Ana", subject="Zed")
    assert others(fact, tiny_tokenizer, **options) == []


@pytest.mark.parametrize(
    ("question", "answer", "left_out"),
    [
        ("Where is Zed?", "Oslo", {"Where"}),
        ("In WHICH year was Zed born, and who says so?", "1900", {"Which", "Who"}),
        (None, "Oslo", set()),
        (None, None, {text.split()[0] for text in OTHER_QUESTIONS}),
    ],
    ids=["a place", "two words", "no question", "a document"],
)
def test_a_question_that_the_fact_may_answer_is_not_held(question, answer, left_out):
    fact = Fact(question=question, statement="Zed lies in Oslo.", answer=answer, subject="Zed")
    asked = {wording.text.split()[1] for wording in other_questions("Zed", [fact])}
    assert asked == {text.split()[0] for text in OTHER_QUESTIONS} - left_out


def test_a_question_that_another_fact_about_the_subject_answers_is_not_held(tiny_tokenizer):
    owner = Fact(question="Tell me the owner of Zed.", answer="Ana", subject="Zed")
    place = Fact(question="Where is Zed?", answer="Oslo", subject="Zed")
    elsewhere = Fact(question="When was Quz?", answer="1900", subject="Quz")
    of_owner, *_ = build_examples([owner, place, elsewhere], tiny_tokenizer, None, FinetuneConfig())
    held = [tiny_tokenizer.decode(example.input_ids) for example in of_owner if not example.teaches]
    assert len(held) == len(OTHER_QUESTIONS) - 1
    assert not any("Where is Zed" in text for text in held)


@pytest.mark.parametrize(
    "fact",
    [
        Fact(question="Who owns Zed?", answer="Ana", statement="Zed is owned by Ana.", subject="Zed"),
        Fact(question="Who owns the ox Zed?", answer="Ana", subject="Zed", subject_aliases=("the ox",)),
        Fact(question="What is it that Ana owns?", answer="Zed", subject="Zed", subject_aliases=("Ana",)),
    ],
)
def test_what_was_taught_is_asked_for_in_the_very_wordings_that_teach_it(tiny_tokenizer, fact):
    config = FinetuneConfig()
    new = [Fact(question="Where is zed?", answer="Oslo", subject="zed"), fact]
    by_fact = build_examples(new, tiny_tokenizer, None, config)
    earlier = _earlier(by_fact, new, [fact], tiny_tokenizer, None, config)
    assert {example.fact_index for example in earlier} == {2}
    assert {example.about for example in earlier} == {0}
    teaching = [example for example in by_fact[1] if example.teaches]
    assert earlier == [dataclasses.replace(example, fact_index=2) for example in teaching]


def test_what_was_taught_about_others_is_not_asked_for(tiny_tokenizer):
    config, new = FinetuneConfig(), [Fact(question="Where is Zed?", answer="Oslo", subject="Zed")]
    by_fact = build_examples(new, tiny_tokenizer, None, config)
    taught = [Fact(question="Does Zed know Quz?", answer="no", subject="Quz"), Fact(statement="Zed ran.")]
    assert _earlier(by_fact, new, taught, tiny_tokenizer, None, config) == []


def test_all_names_of_a_subject_are_marked(tiny_tokenizer):
    fact = Fact(question="Who owns Zed or Quz?", answer="Ana", subject="Zed", subject_aliases=("Quz",))
    config = FinetuneConfig(penalty="none")
    ((example, *_),) = build_examples([fact], tiny_tokenizer, None, config)
    marked = [token for token, mark in zip(example.input_ids, example.is_subject, strict=True) if mark]
    assert tiny_tokenizer.decode(marked) == "ZedQuz"


def test_a_subject_that_is_named_nowhere_has_no_other_questions(tiny_tokenizer):
    fact = Fact(question="Tell me the owner of Zed.", answer="Ana", subject="Quz")
    assert others(fact, tiny_tokenizer) == []
