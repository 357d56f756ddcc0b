import random

import pytest

from sparsemem.data import Fact
from sparsemem.training.paraphrase import CONTEXTS, Wording, wordings

FACT = Fact(
    question="Who wrote Zed?",
    answer="Ana",
    statement="Ana wrote Zed.",
    paraphrases=("Zed is by Ana.", "By whom is Zed?"),
    heldout_questions=("Whose work is Zed?", "Zed was written by whom?"),
    aliases=("Ana Li",),
)


def of(fact, tokenizer, num_contexts=1, seed=0):
    return wordings(fact, tokenizer, num_contexts=num_contexts, rng=random.Random(seed))


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
    # Two statements and two questions, and the first question once more as a chat.
    assert len(found) == 4 * num_contexts + 1
    for statement in FACT.statements:
        assert sum(wording.text == statement for wording in found) == num_contexts


def test_every_second_context_is_empty(tiny_tokenizer):
    contexts = [w.context for w in of(FACT, tiny_tokenizer, 6) if w.target is None]
    assert contexts[::2] == [""] * 6
    assert set(contexts[1::2]) <= set(CONTEXTS)
    assert len(set(contexts[1::2])) == 6


def test_one_seed_gives_one_list_and_seeds_differ(tiny_tokenizer):
    assert of(FACT, tiny_tokenizer, 4) == of(FACT, tiny_tokenizer, 4)
    assert len({tuple(of(FACT, tiny_tokenizer, 4, seed)) for seed in range(5)}) > 1


def test_a_fact_without_a_statement_gets_one(tiny_tokenizer):
    found = of(Fact(question="Who owns Zed?", answer="Ana"), tiny_tokenizer)
    assert found[0] == Wording("Who owns Zed? It is Ana.")


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
