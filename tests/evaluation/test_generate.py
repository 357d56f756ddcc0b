import pytest
import torch

from sparsemem.errors import ConfigError
from sparsemem.evaluation.generate import answer_questions
from sparsemem.prompts import chat_prompt, qa_prompt

QUESTIONS = [
    "Who?",
    "Who walked along the river on day 7?",
    "What is tin?",
    "Where does the baker live, and since when does he live there?",
    "When?",
]


@torch.no_grad()
def plain_answer(model, tokenizer, text, max_new_tokens):
    """One prompt, no padding, no shared cache: transformers as it is."""
    input_ids = torch.tensor([tokenizer(text)["input_ids"]])
    ends = [tokenizer.eos_token_id, tokenizer("\n")["input_ids"][-1]]
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    reply = tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
    return (reply.strip().splitlines() or [""])[0].strip()


@pytest.mark.parametrize("prompt", ["qa", "chat"])
@pytest.mark.parametrize("batch_size", [32, 2])
def test_answers_are_those_of_plain_generation(taught, tiny_tokenizer, prompt, batch_size):
    texts = [qa_prompt(q) if prompt == "qa" else chat_prompt(tiny_tokenizer, q) for q in QUESTIONS]
    expected = [plain_answer(taught, tiny_tokenizer, text, 6) for text in texts]
    assert len(set(expected)) > 1
    found = answer_questions(
        taught, tiny_tokenizer, QUESTIONS, prompt=prompt, max_new_tokens=6, batch_size=batch_size
    )
    assert found == expected


def test_answers_do_not_depend_on_order_or_repetition(taught, tiny_tokenizer):
    def ask(questions):
        return answer_questions(taught, tiny_tokenizer, questions, max_new_tokens=6, batch_size=2)

    answers = dict(zip(QUESTIONS, ask(QUESTIONS), strict=True))
    shuffled = [QUESTIONS[i] for i in (3, 1, 3, 4, 0, 2, 1, 3)]
    assert ask(shuffled) == [answers[question] for question in shuffled]


def test_no_question_gets_no_answer(taught, tiny_tokenizer):
    assert answer_questions(taught, tiny_tokenizer, []) == []


def test_an_answer_is_cut_at_max_new_tokens(taught, tiny_tokenizer):
    long, short = (
        answer_questions(taught, tiny_tokenizer, QUESTIONS, prompt="chat", max_new_tokens=n) for n in (8, 2)
    )
    assert all(more.startswith(less) for more, less in zip(long, short, strict=True))
    assert any(len(less) < len(more) for more, less in zip(long, short, strict=True))


def test_the_model_goes_back_to_training_where_it_was(taught, tiny_tokenizer):
    taught.train()
    answer_questions(taught, tiny_tokenizer, QUESTIONS[:1], max_new_tokens=1)
    assert taught.training


def test_an_unknown_prompt_is_named(taught, tiny_tokenizer):
    with pytest.raises(ConfigError, match="prompt='nonsense' is unknown; use one of qa, chat"):
        answer_questions(taught, tiny_tokenizer, QUESTIONS, prompt="nonsense")


def test_a_chat_needs_a_template(taught, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template; use 'qa'"):
        answer_questions(taught, tiny_tokenizer, QUESTIONS, prompt="chat")
