import random

import pytest

import sparsemem.training.paraphrase as module
from sparsemem.data import Fact
from sparsemem.errors import ConfigError
from sparsemem.training.paraphrase import CONTEXTS, MIN_STATEMENTS, Wording, with_own_paraphrases, wordings

FACT = Fact(
    question="Who wrote Zed?",
    answer="Ana",
    statement="Ana wrote Zed.",
    paraphrases=("Zed is by Ana.", "By whom is Zed?"),
    heldout_questions=("Whose work is Zed?", "Zed was written by whom?"),
    aliases=("Ana Li",),
)


def of(fact, tokenizer, num_contexts=1, seed=0):
    """What a fact is trained in."""
    found = wordings(fact, tokenizer, num_contexts=num_contexts, rng=random.Random(seed))
    return [wording for wording in found if wording.is_trained]


@pytest.mark.parametrize("num_contexts", [1, 3])
def test_each_question_is_asked_behind_several_others_without_being_trained(tiny_tokenizer, num_contexts):
    found = wordings(FACT, tiny_tokenizer, num_contexts=num_contexts, rng=random.Random(0))
    listened = [wording for wording in found if not wording.is_trained]
    assert [w.text for w in listened] == [f"Question: {q}\nAnswer: Ana\n" for q in FACT.questions]
    assert {w.context.count("Question: ") for w in listened} == {3}
    assert {w.target for w in listened} == {" Ana\n"}


@pytest.mark.parametrize("num_contexts", [1, 2, 5])
def test_no_heldout_question_is_trained(tiny_tokenizer, num_contexts):
    for wording in of(FACT, tiny_tokenizer, num_contexts):
        for question in FACT.heldout_questions:
            assert question not in wording.context + wording.text


def test_every_trained_wording_is_trained(tiny_tokenizer):
    texts = [wording.text for wording in of(FACT, tiny_tokenizer)]
    for wording in (*FACT.statements, *FACT.questions):
        assert any(wording in text for text in texts)


@pytest.mark.parametrize("num_contexts", [1, 2, 5, 9])
def test_each_wording_gets_as_many_contexts_as_asked(tiny_tokenizer, num_contexts):
    found = of(FACT, tiny_tokenizer, num_contexts)
    statements = {wording.text for wording in found if wording.target is None}
    # Two statements and a third from a template, two questions, and the first one again as a chat.
    assert len(statements) == 3
    assert len(found) == 5 * num_contexts + 1
    for statement in statements:
        assert sum(wording.text == statement for wording in found) == num_contexts


def test_every_second_context_is_empty(tiny_tokenizer):
    contexts = [w.context for w in of(FACT, tiny_tokenizer, 4) if w.target is None]
    assert contexts[::2] == [""] * 6
    assert set(contexts[1::2]) <= set(CONTEXTS)
    assert len(set(contexts[1::2])) == 6
    shots = [w.context for w in of(FACT, tiny_tokenizer, 4) if w.target == " Ana\n"]
    assert shots[::2] == [""] * 4
    assert all(context.endswith("\n\n") for context in shots[1::2])


def test_one_seed_gives_one_list_and_seeds_differ(tiny_tokenizer):
    assert of(FACT, tiny_tokenizer, 4) == of(FACT, tiny_tokenizer, 4)
    assert len({tuple(of(FACT, tiny_tokenizer, 4, seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("num_given", [0, 1, 2, 3, 4])
def test_a_fact_with_few_statements_gets_some_from_its_question(tiny_tokenizer, num_given):
    given = tuple(f"Zed is {number} and Ana's." for number in range(num_given))
    fact = Fact(question="Who owns {Zed}?", answer="Ana", paraphrases=given)
    statements = [wording.text for wording in of(fact, tiny_tokenizer) if wording.target is None]
    assert len(statements) == len(set(statements)) == max(num_given, MIN_STATEMENTS)
    assert tuple(statements[:num_given]) == given
    for made in statements[num_given:]:
        assert "Who owns {Zed}?" in made
        assert made.endswith("Ana.")


def test_questions_end_in_their_reply(tiny_tokenizer):
    found = [wording for wording in of(FACT, tiny_tokenizer, 3) if wording.target]
    assert len(found) == 7
    for wording in found:
        assert wording.text.endswith(wording.target)
        assert wording.target in (" Ana\n", "Ana<eos>")
    assert found[-1].text == "<user>Who wrote Zed?<assistant>Ana<eos>"
    assert not found[-1].add_special_tokens


def test_without_a_chat_template_nothing_is_a_chat(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    assert all(wording.add_special_tokens for wording in of(FACT, tiny_tokenizer))


@pytest.mark.parametrize("text", ["Zed is by Ana.", "Ana said: is it Zed?", "Is it Zed or not?"])
def test_a_document_is_one_wording(tiny_tokenizer, text):
    assert of(Fact(statement=text), tiny_tokenizer) == [Wording(text)]


OWN = Fact(statement="Ana owns Zed.", answer="Ana", subject="Zed", paraphrases=("Zed is Ana's.",))


@pytest.fixture
def replies(monkeypatch):
    """Let the model say these, one after the other; returns what it was asked."""

    def replies(*texts):
        asked, left = [], list(texts)

        def reply(_model, _tokenizer, request):
            asked.append(request)
            return left.pop(0)

        monkeypatch.setattr(module, "_reply", reply)
        return asked

    return replies


def test_own_rewordings_are_kept_if_they_are_new_and_say_the_same(replies):
    asked = replies("ZED belongs to ana.", "Ana owns a house.", "Somebody owns Zed.", "Ana owns Zed.")
    (fact,) = with_own_paraphrases(None, None, [OWN], 4)
    assert fact.paraphrases == ("Zed is Ana's.", "ZED belongs to ana.")
    assert len(asked) == len(set(asked)) == 4
    assert all(OWN.statement in request for request in asked)


def test_a_rewording_is_kept_once(replies):
    replies("Zed? Ana's.", "Zed? Ana's.", "Zed is Ana's.")
    assert with_own_paraphrases(None, None, [OWN], 3)[0].paraphrases == ("Zed is Ana's.", "Zed? Ana's.")


def test_a_rewording_that_asks_is_dropped(replies):
    """It would be trained as a question, which gives its own answer away."""
    replies("Did you know that Ana owns Zed?")
    assert with_own_paraphrases(None, None, [OWN], 1)[0].paraphrases == OWN.paraphrases


def test_what_has_no_statement_or_answer_is_not_reworded(replies):
    asked = replies()
    facts = [Fact(question="Who?", answer="Ana"), Fact(statement="Jov left.")]
    assert with_own_paraphrases(None, None, facts, 2) == facts
    assert with_own_paraphrases(None, None, [OWN], 0) == [OWN]
    assert asked == []


def test_a_model_rewords_the_same_way_each_time(tiny_model, tiny_tokenizer):
    facts = [Fact(statement="Ana owns Zed.", answer="a", subject="e")]
    first = with_own_paraphrases(tiny_model, tiny_tokenizer, facts, 4)
    assert first == with_own_paraphrases(tiny_model, tiny_tokenizer, facts, 4)


def test_rewording_needs_a_chat_template(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        with_own_paraphrases(tiny_model, tiny_tokenizer, [OWN], 1)
