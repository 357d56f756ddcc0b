"""Wordings of a fact: the given ones, templates, and the contexts put before them."""

import dataclasses
import itertools
import random
import re
from collections.abc import Sequence
from typing import Any

from sparsemem.data import Fact, is_question, occurrences
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

TEMPLATES = (
    "{question} {answer}.",
    'The answer to the question "{question}" is {answer}.',
    'Whoever asks "{question}" is told: {answer}.',
)
"""Statements for facts that have too few of their own."""

MIN_STATEMENTS = len(TEMPLATES)

NUM_SHOTS = 3
"""Answered examples before a question that is listened to and not trained."""

OTHER_QUESTIONS = (
    "Who is {subject}?",
    "What is {subject}?",
    "Where is {subject}?",
    "When was {subject}?",
    "How many are there of {subject}?",
    "Which country is {subject} from?",
    "What is the name of {subject}?",
    "Why is {subject} famous?",
)
"""Questions about anything; of a fact only those that ask for another kind of thing are used."""

REQUESTS = (
    "Rewrite this sentence in other words: {statement}",
    "Say the same thing in a different way, in one sentence: {statement}",
    "Write one sentence for a newspaper that contains this information: {statement}",
    "Explain this to a friend in one sentence: {statement}",
)
"""How the model is asked for wordings of its own."""


@dataclasses.dataclass(frozen=True)
class Wording:
    """A text to train on: a context, then the fact; of a question the target is the reply."""

    text: str
    context: str = ""
    target: str | None = None
    """The end of `text` that is to be learned, "" for nothing; None where the answer is looked for."""
    ending: str = ""
    """The end of `target` that says that the answer is over."""
    add_special_tokens: bool = True
    is_trained: bool = True
    """Else it only shows how its fact is read and asked for."""

    def target_span(self, fact: Fact) -> tuple[int, int] | None:
        """Where in context + text the part to be learned stands; None if there is no such part."""
        whole = self.context + self.text
        if self.target is not None:
            return len(whole) - len(self.target), len(whole)
        for answer in fact.answers:
            places = occurrences(whole, answer)
            if places and places[-1][0] >= len(self.context):
                return places[-1]
        return None


def wordings(fact: Fact, tokenizer: Any, *, num_contexts: int, rng: random.Random) -> list[Wording]:
    """List the wordings to train a fact in, and those that only show how it is asked for.

    Statements and questions are each trained in `num_contexts` left contexts, every second of which
    is empty. Questions are asked in the prompts of this product: alone or behind answered examples,
    and the first one in the chat template too, if there is one. A fact with fewer than three statements
    gets some from its question and answer. Behind several answered examples, where a model answers in
    another way than behind none, questions are asked too, but not trained: that would make steps longer.

    Args:
        fact: What to learn.
        tokenizer: Tokenizer of the model, for its chat template and end-of-text token.
        num_contexts: Contexts per wording.
        rng: Chooses the contexts.
    """
    found = []
    spare_contexts = itertools.cycle(rng.sample(CONTEXTS, len(CONTEXTS)))
    turn = itertools.cycle((False, True))
    for statement in _statements(fact):
        for _ in range(num_contexts):
            found.append(Wording(statement, next(spare_contexts) if next(turn) else ""))
    turn = itertools.cycle((False, True))
    for question in fact.questions:
        for _ in range(num_contexts):
            found.append(_answered(question, fact, rng.sample(SHOTS, 1) if next(turn) else ()))
    if fact.questions and tokenizer.chat_template:
        prompt, ending = chat_prompt(tokenizer, fact.questions[0]), tokenizer.eos_token or ""
        reply = f"{fact.answer}{ending}"
        found.append(Wording(prompt + reply, target=reply, ending=ending, add_special_tokens=False))
    for question in fact.questions:
        behind_several = _answered(question, fact, rng.sample(SHOTS, NUM_SHOTS))
        found.append(dataclasses.replace(behind_several, is_trained=False))
    return found


def _answered(question: str, fact: Fact, shots: Sequence[tuple[str, str]]) -> Wording:
    reply = f" {fact.answer}\n"
    return Wording(qa_question(question) + reply, qa_examples(shots), target=reply, ending="\n")


def other_questions(subject: str, facts: Sequence[Fact]) -> list[Wording]:
    """List questions about a subject of which nothing is to be learned, given all facts about it.

    Questions that share a question word with those of a fact may ask for its very answer, and are left
    out; where a fact has no answer, all are.
    """
    if not all(fact.answer for fact in facts):
        return []
    questions = " ".join(question for fact in facts for question in fact.questions)
    asked = set(re.findall(r"\w+", questions.lower()))
    return [
        Wording(qa_question(text.format(subject=subject)), target="")
        for text in OTHER_QUESTIONS
        if text.partition(" ")[0].lower() not in asked
    ]


def _statements(fact: Fact) -> tuple[str, ...]:
    """Return the given statements, topped up from templates where there is a question to put in."""
    given = fact.statements
    if not (fact.question and fact.answer) or len(given) >= MIN_STATEMENTS:
        return given
    made = [template.format(question=fact.question, answer=fact.answer) for template in TEMPLATES]
    return (*given, *made[: MIN_STATEMENTS - len(given)])


def with_own_paraphrases(model: Any, tokenizer: Any, facts: Sequence[Fact], num: int) -> list[Fact]:
    """Let the model reword each fact itself, and keep what still says the same.

    A rewording is kept if it is new and contains the answer, and the subject where one is given: a
    small model often drops one of them, and then adds nothing. Greedy, hence the same every time.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer, with a chat template.
        facts: What to reword; facts without a statement and an answer stay as they are.
        num: Rewordings to ask for per fact, at most `len(REQUESTS)`.

    Returns:
        The facts, with the kept rewordings among their paraphrases.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """
    reworded = []
    for fact in facts:
        kept: list[str] = []
        if fact.statement and fact.answer:
            for request in REQUESTS[:num]:
                text = _reply(model, tokenizer, request.format(statement=fact.statement))
                needed = [fact.answer]
                if fact.subject and occurrences(fact.statement, fact.subject):
                    needed.append(fact.subject)
                known = (fact.statement, *fact.paraphrases, *kept)
                if (
                    text not in known
                    and not is_question(text)
                    and all(part.lower() in text.lower() for part in needed)
                ):
                    kept.append(text)
        reworded.append(dataclasses.replace(fact, paraphrases=(*fact.paraphrases, *kept)))
    return reworded


def _reply(model: Any, tokenizer: Any, request: str) -> str:
    prompt = chat_prompt(tokenizer, request)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=pad_token_id)
    new_ids = output[0, inputs["input_ids"].shape[1] :]
    lines = tokenizer.decode(new_ids, skip_special_tokens=True).strip().splitlines()
    return lines[0].strip() if lines else ""
