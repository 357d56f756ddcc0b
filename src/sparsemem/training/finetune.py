"""Teach a model facts and documents: one loop for every method."""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, PoolMismatchError, TrainingDivergedError
from sparsemem.likelihood import label_log_probs
from sparsemem.memory.delta import SparseDelta
from sparsemem.slots.subject import find_subject
from sparsemem.slots.usage import Usage
from sparsemem.training.examples import Example, collate, encode_wording
from sparsemem.training.methods import DenseWeights, SparseMemory
from sparsemem.training.paraphrase import with_own_paraphrases, wordings


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What an update did.

    Args:
        model: The trained model: the same object, or the PEFT model around it.
        delta: Rows before and after; None for methods that train no memory.
        losses: Mean loss per label of each optimizer step.
        evaluations: What `evaluate` returned, as (epoch, value).
        num_trained: Numbers that moved.
        seconds: Wall time of the training loop, evaluations left out.
    """

    model: nn.Module
    delta: SparseDelta | None
    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, Any], ...]
    num_trained: int
    seconds: float


def finetune(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    usage: Usage | None = None,
    config: FinetuneConfig | None = None,
    *,
    evaluate: Callable[[nn.Module], Any] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> FinetuneResult:
    """Train a model on facts, in place.

    Args:
        model: A causal LM; with a memory for method="memory".
        tokenizer: Its (fast) tokenizer.
        facts: What to learn.
        usage: Background usage; needed for method="memory".
        config: Options.
        evaluate: Called with the model after each epoch.
        on_step: Called with (step, number of steps, mean loss) after each optimizer step.

    Returns:
        The delta, and how it went.

    Raises:
        DataError: No fact has anything to learn.
        PoolMismatchError: Usage is missing or was counted on another pool.
        TrainingDivergedError: A loss is not finite; a memory is put back to what it was.
    """
    config = config or FinetuneConfig()
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    if config.num_own_paraphrases:
        facts = with_own_paraphrases(model, tokenizer, facts, config.num_own_paraphrases)
    by_fact = build_examples(facts, tokenizer, usage, config, rng)
    method = _method(model, usage, config)
    num_steps = math.ceil(len(by_fact) / config.facts_per_batch) * config.num_epochs
    losses: list[float] = []
    evaluations: list[tuple[int, Any]] = []
    seconds = 0.0
    try:
        schedule = _schedule(config.lr_scheduler, method.optimizer, num_steps)
        for epoch in range(1, config.num_epochs + 1):
            started = time.perf_counter()
            for batch in _batches(by_fact, config.facts_per_batch, rng):
                losses.append(_train_step(method, batch, config.gradient_accumulation_steps))
                if not math.isfinite(losses[-1]):
                    raise TrainingDivergedError(
                        f"the loss is {losses[-1]} at step {len(losses)}, nothing was learned; "
                        f"lower the learning rate ({config.lr:g})"
                    )
                method.optimizer.step()
                schedule.step()
                method.optimizer.zero_grad()
                if on_step:
                    on_step(len(losses), num_steps, losses[-1])
            seconds += time.perf_counter() - started
            if evaluate:
                evaluations.append((epoch, evaluate(method.model)))
        delta = method.finish()
    except BaseException:
        method.abort()
        raise
    finally:
        method.close()
    return FinetuneResult(
        model=method.model,
        delta=delta,
        losses=tuple(losses),
        evaluations=tuple(evaluations),
        num_trained=method.num_trainable(delta),
        seconds=seconds,
    )


def _train_step(method: SparseMemory | DenseWeights, batch: list[Example], num_parts: int) -> float:
    """Add up the gradients of a batch, part by part; returns its mean loss per label."""
    device = next(method.model.parameters()).device
    parts = [collate(examples, device) for examples in _split(batch, num_parts)]
    num_labels = sum(part.num_labels for part in parts)
    total = 0.0
    with method.step(parts):  # the slots of the whole batch are chosen in here, once
        for part in parts:
            with method.part(part):
                loss = -label_log_probs(method.model, *part.model_inputs).sum() / num_labels
            loss.backward()
            total += loss.item()
    return total


def _method(model: nn.Module, usage: Usage | None, config: FinetuneConfig) -> SparseMemory | DenseWeights:
    if config.method != "memory":
        return DenseWeights(model, config)
    if usage is None:
        raise PoolMismatchError("method='memory' needs background usage; pass count_usage(...)'s result")
    return SparseMemory(model, usage, config)


def build_examples(
    facts: Sequence[Fact], tokenizer: Any, usage: Usage | None, config: FinetuneConfig, rng: random.Random
) -> list[list[Example]]:
    """Encode the wordings of every fact; facts of which nothing can be learned are left out.

    Raises:
        DataError: That is all of them.
    """
    by_fact = []
    for index, fact in enumerate(facts):
        subject = fact.subject
        if subject is None and usage is not None:
            given = (*fact.questions, *fact.statements)
            subject = find_subject(given, fact.answers, tokenizer, usage)
        encoded = [
            encode_wording(tokenizer, index, fact, wording, subject, config.loss_on, config.max_length)
            for wording in wordings(fact, tokenizer, num_contexts=config.num_contexts, rng=rng)
        ]
        if examples := list(dict.fromkeys(filter(None, encoded))):
            by_fact.append(examples)
    if not by_fact:
        raise DataError("no fact has a token to learn; give statements that contain the answer, or questions")
    return by_fact


def _batches(by_fact: list[list[Example]], size: int, rng: random.Random) -> Iterator[list[Example]]:
    order = rng.sample(range(len(by_fact)), len(by_fact))
    for start in range(0, len(order), size):
        yield [example for index in order[start : start + size] for example in by_fact[index]]


def _split(batch: list[Example], num_parts: int) -> list[list[Example]]:
    """Cut a batch into at least `num_parts` parts of examples of like length.

    A part ends where padding it to the next example's length would make a quarter of it padding.
    """
    ordered = sorted(batch, key=lambda example: (len(example.input_ids), example.input_ids))
    most = math.ceil(len(ordered) / num_parts)
    parts: list[list[Example]] = [[]]
    num_tokens = 0
    for example in ordered:
        length = len(example.input_ids)
        padded = length * (len(parts[-1]) + 1)
        if parts[-1] and (len(parts[-1]) == most or num_tokens + length < 0.75 * padded):
            parts.append([])
            num_tokens = 0
        parts[-1].append(example)
        num_tokens += length
    return parts


def _schedule(name: str, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    try:
        return get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=num_steps)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lr_scheduler={name!r} is not usable here: {error}") from error
