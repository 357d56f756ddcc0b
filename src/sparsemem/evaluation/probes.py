"""Probes: what must not be forgotten, as question sets, multiple choice, completions and plain text."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sparsemem.data import Completion, Question, load_completions, load_questions, load_texts, read_rows
from sparsemem.encode import pad
from sparsemem.errors import ConfigError, DataError
from sparsemem.evaluation.generate import answer_questions
from sparsemem.evaluation.metrics import exact_match, f1, mean
from sparsemem.evaluation.result_cache import ResultCache
from sparsemem.likelihood import IGNORE, label_log_probs
from sparsemem.prompts import PromptFormat, qa_question

Metric = Literal["f1", "accuracy", "nll", "perplexity"]

LOWER_IS_BETTER: frozenset[Metric] = frozenset({"nll", "perplexity"})
"""Metrics that rise when something is forgotten; the others fall."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A named set of questions, of completions or of texts; exactly one of the three is not empty."""

    name: str
    questions: tuple[Question, ...] = ()
    texts: tuple[str, ...] = ()
    completions: tuple[Completion, ...] = ()

    @property
    def metric(self) -> Metric:
        """What is measured: F1 of answers, accuracy of choices, likelihood of completions and of text."""
        if self.texts:
            return "perplexity"
        if self.completions:
            return "nll"
        return "accuracy" if self.questions[0].choices else "f1"


@dataclasses.dataclass(frozen=True)
class ProbeScore:
    """Result of one probe.

    Args:
        metric: What `value` is; see `LOWER_IS_BETTER`.
        value: The score.
        num: Questions or completions, or tokens of text.
        right: Whether each question was answered right (exact match, or the right choice).
        scores: What `value` is the mean of: F1 per question, 1.0 or 0.0 per choice, nats per token of
            each completion. Empty for "perplexity".
    """

    metric: Metric
    value: float
    num: int
    right: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()


def load_probes(specs: Sequence[str]) -> list[Probe]:
    """Read probes given as "name=source".

    A source is a .txt file or rows with "text" (perplexity), `{prompt, completion}` (nll),
    `{question, answers}` (closed-book) or `{question, choices, answer}` (multiple choice), from a local
    file or a Hub data set.

    Raises:
        ConfigError: A spec has no name or repeats one.
        MissingFileError: A source does not exist.
        DataError: A row is malformed.
    """
    probes: list[Probe] = []
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"probe {spec!r} has no name; write it as name=path.jsonl")
        if name in {probe.name for probe in probes}:
            raise ConfigError(f"two probes are named {name!r}; rename one")
        probes.append(load_probe(name, source))
    return probes


def load_probe(name: str, source: str) -> Probe:
    """Read one probe; its first row tells of which kind it is."""
    if Path(source).suffix == ".txt":
        return Probe(name, texts=tuple(load_texts(source)))
    _, row = next(iter(read_rows(source)), ("", None))
    if row is None:
        raise DataError(f"{source} has no rows; give at least one")
    if "question" not in row and "text" in row:
        return Probe(name, texts=tuple(load_texts(source)))
    if "question" not in row and {"prompt", "completion"} & set(row):
        return Probe(name, completions=tuple(load_completions(source)))
    questions = tuple(load_questions(source))
    if len({bool(question.choices) for question in questions}) > 1:
        raise DataError(f"{source} mixes questions with and without choices; split it into two probes")
    return Probe(name, questions=questions)


def score_probe(
    model: nn.Module,
    tokenizer: Any,
    probe: Probe,
    prompt: PromptFormat = "qa",
    results: ResultCache | None = None,
) -> ProbeScore:
    """Measure one probe; `results` as in `answer_questions`."""
    if probe.metric == "perplexity":
        return perplexity(model, tokenizer, probe.texts, results=results)
    if probe.metric == "nll":
        return nll(model, tokenizer, probe.completions, results=results)
    if probe.metric == "accuracy":
        return multiple_choice(model, tokenizer, probe.questions, results=results)
    questions = [q.question for q in probe.questions]
    answers = answer_questions(model, tokenizer, questions, prompt=prompt, results=results)
    pairs = list(zip(answers, probe.questions, strict=True))
    scores = tuple(f1(answer, question.answers) for answer, question in pairs)
    return ProbeScore(
        metric="f1",
        value=mean(scores),
        num=len(pairs),
        right=tuple(exact_match(answer, question.answers) == 1.0 for answer, question in pairs),
        scores=scores,
    )


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    results: ResultCache | None = None,
) -> ProbeScore:
    """Perplexity per token of texts, each read from its beginning and cut into `max_length` tokens.

    `results` as in `answer_questions`.
    """
    windows = [
        ids[start : start + max_length]
        for ids in tokenizer(list(texts))["input_ids"]
        for start in range(0, len(ids), max_length)
        if len(ids) - start > 1
    ]
    log_probs = _log_probs(model, windows, [ids[1:] for ids in windows], results)
    num_tokens = sum(len(ids) - 1 for ids in windows)
    if not num_tokens:
        raise DataError("the text has fewer than two tokens; give more")
    return ProbeScore("perplexity", math.exp(-sum(log_probs) / num_tokens), num_tokens)


def nll(
    model: nn.Module,
    tokenizer: Any,
    completions: Sequence[Completion],
    *,
    max_length: int = 1024,
    results: ResultCache | None = None,
) -> ProbeScore:
    """Negative log-likelihood per token of completions given their prompts; each counts the same.

    score_i = -1 / |C_i| * sum over t in C_i of log p(token_t | tokens before t)

    Prompt and completion are tokenized as one text. C_i are the tokens that reach into the completion:
    one that begins in the prompt, as " Paris" does where the prompt ends with a space, is among them,
    and the first token of a sequence is not, for nothing stands before it.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer, of the fast kind.
        completions: What to score.
        max_length: Tokens of prompt and completion together; what is longer is cut at the right.
        results: As in `answer_questions`.

    Returns:
        Nats per token; `scores` in the order given.

    Raises:
        DataError: A completion has no token to score, being one token without a prompt or cut off.
    """
    encoded = tokenizer([c.prompt + c.completion for c in completions], return_offsets_mapping=True)
    sequences, targets = [], []
    for completion, ids, offsets in zip(
        completions, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        # Not from len(tokens of the prompt): a token across the border would shift all that follow.
        inside = [i for i, (_, end) in enumerate(offsets[:max_length]) if i and end > len(completion.prompt)]
        if not inside:
            raise DataError(
                f"completion {completion.completion[:40]!r} has no token to score: it is one token without "
                f"a prompt, or begins behind {max_length} tokens; give it a prompt, or a shorter one"
            )
        sequences.append(ids[: inside[-1] + 1])
        targets.append(ids[inside[0] : inside[-1] + 1])
    log_probs = _log_probs(model, sequences, targets, results)
    scores = tuple(-total / len(target) for total, target in zip(log_probs, targets, strict=True))
    return ProbeScore("nll", mean(scores), len(scores), scores=scores)


def multiple_choice(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], *, results: ResultCache | None = None
) -> ProbeScore:
    """Accuracy of the likeliest choice, its log-probability divided by its length in bytes.

    That is `acc_norm` of lm-evaluation-harness, so that long choices are not at a disadvantage.
    `results` as in `answer_questions`.
    """
    sequences, targets, lengths = [], [], []
    for question in questions:
        prompt = tokenizer(qa_question(question.question))["input_ids"]
        for choice in question.choices:
            target = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            sequences.append(prompt + target)
            targets.append(target)
            lengths.append(len(choice.encode()))
    totals = _log_probs(model, sequences, targets, results)
    per_byte = iter(total / length for total, length in zip(totals, lengths, strict=True))
    right = []
    for question in questions:
        of_choices = [next(per_byte) for _ in question.choices]
        right.append(question.choices[of_choices.index(max(of_choices))] in question.answers)
    scores = tuple(map(float, right))
    return ProbeScore("accuracy", mean(scores), len(right), tuple(right), scores)


@torch.no_grad()
def _log_probs(
    model: nn.Module,
    sequences: Sequence[list[int]],
    targets: Sequence[list[int]],
    results: ResultCache | None = None,
    max_tokens: int = 4096,
) -> list[float]:
    """Sum the log-probability of the target at the end of each sequence.

    Batches are made by length, then content, so that scores do not depend on the order given.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), sequences[i], len(targets[i])))
    totals = [0.0] * len(sequences)
    while order:
        size = max(1, max_tokens // len(sequences[order[-1]]))
        batch, order = order[-size:], order[:-size]
        rows = tuple((tuple(sequences[i]), tuple(targets[i])) for i in batch)
        run = functools.partial(_log_probs_of_batch, model, rows)
        of_batch = results.get(model, rows, run) if results else run()
        for i, total in zip(batch, of_batch, strict=True):
            totals[i] = total
    model.train(was_training)
    return totals


def _log_probs_of_batch(
    model: nn.Module, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[float]:
    """As `_log_probs`, of pairs of a sequence and its target."""
    device = next(model.parameters()).device
    padded = pad([sequence for sequence, _ in rows])
    labels = torch.full_like(padded["input_ids"], IGNORE)
    for row, (sequence, target) in enumerate(rows):
        labels[row, len(sequence) - len(target) : len(sequence)] = torch.tensor(target)
    inputs = padded["input_ids"], padded["attention_mask"], labels
    log_probs = label_log_probs(model, *(tensor.to(device) for tensor in inputs))
    return [part.double().sum().item() for part in log_probs.split([len(target) for _, target in rows])]
