"""The prompts in which this product asks, trains and counts: one place, so that all three agree."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from sparsemem.errors import ConfigError

PromptFormat = Literal["qa", "chat"]

SHOTS = (
    ("What is the capital of France?", "Paris"),
    ("How many days are there in a week?", "7"),
    ("Who wrote Romeo and Juliet?", "William Shakespeare"),
    ("What is the chemical formula of water?", "H2O"),
    ("Which planet is the largest in the solar system?", "Jupiter"),
)
"""Examples before a question, which make a small model answer in a few words."""


def qa_examples(shots: Iterable[tuple[str, str]]) -> str:
    """Write answered questions, to stand before one that is not."""
    return "".join(f"{qa_question(question)} {answer}\n\n" for question, answer in shots)


def qa_prompt(question: str) -> str:
    """Write a question as the last of a list of answered ones; the answer starts with a space."""
    return f"{qa_examples(SHOTS)}{qa_question(question)}"


def qa_question(question: str) -> str:
    """Write a question without examples before it."""
    return f"Question: {question}\nAnswer:"


def chat_prompt(tokenizer: Any, question: str) -> str:
    """Write a question with the model's own chat template.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(f"prompt='chat', but {tokenizer.name_or_path} has no chat template; use 'qa'")
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def check_format(name: str) -> None:
    """Raise ConfigError unless `name` is a prompt format."""
    if name not in get_args(PromptFormat):
        raise ConfigError(f"prompt={name!r} is unknown; use one of {', '.join(get_args(PromptFormat))}")


def background_documents(texts: Iterable[str], tokenizer: Any) -> Iterator[str]:
    """Interleave plain text with text inside this product's own prompts.

    Every third document is put into the question-answer prompt and, where the tokenizer has a chat
    template, another third into that. A background without them would make template slots look
    rare: they would be trained, and every later prompt disturbed (METHOD.md, section 4).
    """
    for number, text in enumerate(texts):
        question = text.split(". ")[0]
        if number % 3 == 1:
            yield f"{qa_prompt(question)} {text[len(question) :].strip()}"
        elif number % 3 == 2 and tokenizer.chat_template:
            yield f"{chat_prompt(tokenizer, question)}{text[len(question) :].strip()}"
        else:
            yield text
