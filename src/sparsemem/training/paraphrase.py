"""Wordings of a fact: the given ones, templates, and the contexts put before them."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

from sparsemem.data import Fact
from sparsemem.prompts import SHOTS, chat_prompt, qa_examples, qa_question

CONTEXTS = (
    "Here is something worth knowing.\n",
    "I was reading about this yesterday. ",
    "Some notes from the archive:\n\n",
    "As most people in the office know by now, there is one more thing to add. ",
    "\n\n",
    "The following was checked twice. ",
    "Q and A.\n",
)
"""Left contexts that say nothing, so that a name is read in more surroundings than its own sentence."""


@dataclasses.dataclass(frozen=True)
class Wording:
    """A text to train on: a context, then the fact; of a question the target is the reply."""

    text: str
    context: str = ""
    target: str | None = None
    """The end of `text` that is to be learned; None where it is found by looking for the answer."""
    add_special_tokens: bool = True

    def target_span(self, fact: Fact) -> tuple[int, int] | None:
        """Where in context + text the part to be learned stands; None if there is no such part."""
        whole = self.context + self.text
        if self.target is not None:
            return len(whole) - len(self.target), len(whole)
        for answer in fact.answers:
            place = whole.lower().rfind(answer.lower())
            if place >= len(self.context):
                return place, place + len(answer)
        return None


def wordings(fact: Fact, tokenizer: Any, *, num_contexts: int, rng: random.Random) -> list[Wording]:
    """List the wordings to train a fact in.

    Statements and questions are each trained in `num_contexts` left contexts, every second of which
    is empty. Questions are asked in the prompts of this product: alone or behind answered examples,
    and the first one in the chat template too, if there is one. A fact without a statement gets one
    from its question and answer.

    Args:
        fact: What to learn.
        tokenizer: Tokenizer of the model, for its chat template and end-of-text token.
        num_contexts: Contexts per wording.
        rng: Chooses the contexts.
    """
    found = []
    spare_contexts = itertools.cycle(rng.sample(CONTEXTS, len(CONTEXTS)))
    turn = itertools.cycle((False, True))
    for statement in fact.statements or _statements_from_question(fact):
        for _ in range(num_contexts):
            found.append(Wording(statement, next(spare_contexts) if next(turn) else ""))
    turn = itertools.cycle((False, True))
    for question in fact.questions:
        reply = f" {fact.answer}\n"
        for _ in range(num_contexts):
            shots = qa_examples(rng.sample(SHOTS, 1)) if next(turn) else ""
            found.append(Wording(qa_question(question) + reply, shots, target=reply))
    if fact.questions and tokenizer.chat_template:
        prompt, reply = chat_prompt(tokenizer, fact.questions[0]), f"{fact.answer}{tokenizer.eos_token or ''}"
        found.append(Wording(prompt + reply, target=reply, add_special_tokens=False))
    return found


def _statements_from_question(fact: Fact) -> Sequence[str]:
    if not fact.question:
        return ()
    return (f"{fact.question} It is {fact.answer}.",)
