"""Teach a model facts and documents: one loop for every method."""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, get_scheduler

from sparsemem import distributed
from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError, PoolMismatchError, TrainingDivergedError
from sparsemem.memory.delta import SparseDelta
from sparsemem.slots.subject import names_of
from sparsemem.slots.usage import Usage
from sparsemem.training.baselines import DenseWeights
from sparsemem.training.examples import Example, FactBatch, encode_wording
from sparsemem.training.methods import SparseMemory
from sparsemem.training.paraphrase import Wording, other_questions, with_own_paraphrases, wordings
from sparsemem.training.penalties import check_guards
from sparsemem.training.reading import facts_to_learn
from sparsemem.training.step import GradientStep


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What an update did.

    Args:
        model: The trained model: the same object, or the PEFT model around it.
        delta: Rows before and after; None for methods that train no memory.
        losses: Mean loss per label of each optimizer step.
        evaluations: What `evaluate` returned, as (epoch, value), or (batch, value) of a stream.
        num_trained: Numbers that moved.
        seconds: Wall time of the training loop; evaluations, and what "ewc" and "kl" prepare, left out.
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
    taught: Sequence[Fact] = (),
    background: Sequence[str] = (),
    evaluate: Callable[[nn.Module], Any] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> FinetuneResult:
    """Train a model on facts, in place.

    In several processes (torchrun, `accelerate launch`) each calls this with the same arguments; they share
    the examples of each step, and all end with the same model.

    Args:
        model: A causal LM; with a memory for method="memory".
        tokenizer: Its (fast) tokenizer.
        facts: What to learn.
        usage: Background usage; needed for method="memory".
        config: Options.
        taught: What the memory was taught before, as far as it is known. A new fact does not answer what one
            of these about the same subject is asked, or takes its place if it is asked the same. Of one that
            is not known rows may stay when it is corrected, which say no more than that an answer is over, or
            later parts of a long one.
        background: Ordinary text for `penalty` and `replay_fraction`.
        evaluate: Called with the model after each epoch; of a stream, after each batch of facts. Of
            several processes the main one calls it (all, if the model is spread over them), and hands
            what it returns to the others.
        on_step: Called with (step, number of steps, mean loss) after each optimizer step.

    Returns:
        The delta, and how it went.

    Raises:
        ConfigError: The scheduler is unknown, there is no background for a penalty or replay, or the
            model is spread over processes and `check_fsdp` refuses.
        DataError: No fact has anything to learn.
        PoolMismatchError: Usage is missing or was counted on another pool.
        TrainingDivergedError: A loss is not finite; a memory is put back to what it was.
    """
    config = config or FinetuneConfig()
    _check(model, background, config)
    torch.manual_seed(config.seed)
    facts = facts_to_learn(facts, config)
    if config.num_own_paraphrases:
        num_own, given = config.num_own_paraphrases, facts
        facts = distributed.from_main(lambda: with_own_paraphrases(model, tokenizer, given, num_own), model)
    by_fact = build_examples(facts, tokenizer, usage, config)
    earlier = _earlier(by_fact, facts, taught, tokenizer, usage, config)
    method = _method(model, tokenizer, usage, config, earlier)
    num_steps = math.ceil(len(by_fact) / config.facts_per_batch) * config.num_epochs
    losses: list[float] = []
    evaluations: list[tuple[int, Any]] = []
    seconds = 0.0
    try:
        gradients = GradientStep(method, tokenizer, background, config, random.Random(config.seed))
        schedule = _schedule(config.lr_scheduler, method.optimizer, num_steps)
        for number, batches in enumerate(_rounds(by_fact, config), 1):
            started = time.perf_counter()
            gradients.observe(batches)
            for batch in batches:
                losses.append(gradients.add_gradients(batch))
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
                found = distributed.from_main(lambda: evaluate(method.model), method.model)
                evaluations.append((number, found))
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


def _method(
    model: nn.Module,
    tokenizer: Any,
    usage: Usage | None,
    config: FinetuneConfig,
    earlier: Sequence[Example],
) -> SparseMemory | DenseWeights:
    if config.method != "memory":
        return DenseWeights(model, config)
    if usage is None:
        raise PoolMismatchError("method='memory' needs background usage; pass count_usage(...)'s result")
    return SparseMemory(model, tokenizer, usage, config, earlier)


def build_examples(
    facts: Sequence[Fact], tokenizer: Any, usage: Usage | None, config: FinetuneConfig
) -> list[list[Example]]:
    """Encode the wordings of every fact, and other questions about its subject.

    Facts of which nothing can be learned are left out. A fact has the same wordings in whatever company.

    Raises:
        DataError: That is all of them.
    """
    by_fact = []
    names_by_fact = [names_of(fact, tokenizer, usage) for fact in facts]
    about: dict[str, list[Fact]] = {}
    for fact, names in zip(facts, names_by_fact, strict=True):
        for subject in names[:1]:
            about.setdefault(subject.casefold(), []).append(fact)
    numbers = {subject: number for number, subject in enumerate(about)}
    for index, (fact, names) in enumerate(zip(facts, names_by_fact, strict=True)):
        examples = _examples(fact, index, names, tokenizer, config)
        if any(any(example.is_subject) for example in examples):
            subject = names[0].casefold()
            # What has many names is a text, which may well answer other questions about one of them.
            if config.holds_others and len(names) == 1:
                others = other_questions(names[0], about[subject])
                examples += _encode(others, index, fact, names, tokenizer, config)
            examples = [dataclasses.replace(example, about=numbers[subject]) for example in examples]
        if any(example.teaches and example.is_trained for example in examples):
            by_fact.append(examples)
    if not by_fact:
        raise DataError("no fact has a token to learn; give statements that contain the answer, or questions")
    return by_fact


def _earlier(
    by_fact: Sequence[Sequence[Example]],
    facts: Sequence[Fact],
    taught: Sequence[Fact],
    tokenizer: Any,
    usage: Usage | None,
    config: FinetuneConfig,
) -> list[Example]:
    """Encode what earlier facts about the subjects of new ones were taught in, with numbers above theirs."""
    if config.method != "memory" or not taught:
        return []
    about = {
        names_of(facts[example.fact_index], tokenizer, usage)[0].casefold(): example.about
        for example, *_ in by_fact
        if example.about is not None
    }
    earlier = []
    for index, fact in enumerate(facts_to_learn(taught, config), len(facts)):
        text = " ".join((fact.subject or "", *fact.questions, *fact.statements)).casefold()
        if not any(subject in text for subject in about):
            continue  # as nearly all are, of a long history
        names = names_of(fact, tokenizer, usage)
        if names and names[0].casefold() in about:
            examples = _examples(fact, index, names, tokenizer, config)
            number = about[names[0].casefold()]
            earlier += [dataclasses.replace(example, about=number) for example in examples]
    return [example for example in earlier if example.teaches]


def _examples(
    fact: Fact, index: int, names: Sequence[str], tokenizer: Any, config: FinetuneConfig
) -> list[Example]:
    """Encode what a fact is taught in."""
    # What is asked for calls up nothing.
    called = [name for name in names if not any(name in answer for answer in fact.answers)] or names
    # Drawn by what it is, so that it has the same contexts again if it is taught again.
    rng = random.Random(f"{config.seed} {fact.question or fact.statement}")
    texts = wordings(fact, tokenizer, num_contexts=config.num_contexts, rng=rng)
    examples = _encode(texts, index, fact, called, tokenizer, config)
    trained = [example for example in examples if example.is_trained]
    if not config.is_anchored or not any(any(example.is_subject) for example in trained):
        return trained  # where any token chooses slots, those of other questions must not
    listened = [example.after_subject() for example in examples if not example.is_trained]
    return [*_within_reach(trained), *(example for example in listened if example.teaches)]


def _encode(
    texts: Sequence[Wording],
    index: int,
    fact: Fact,
    names: Sequence[str],
    tokenizer: Any,
    config: FinetuneConfig,
) -> list[Example]:
    encoded = (
        encode_wording(tokenizer, index, fact, text, names, config.loss_on, config.max_length)
        for text in texts
    )
    return list(dict.fromkeys(example for example in encoded if example))


def _within_reach(examples: list[Example]) -> list[Example]:
    """Keep the labels that come after the subject, unless there are none.

    What is written at the subject reaches nothing before it. A wording without a label still says how
    the subject is read, and has predictions to be held.
    """
    reached = [example.after_subject() for example in examples]
    return reached if any(example.teaches for example in reached) else examples


def _rounds(by_fact: list[list[Example]], config: FinetuneConfig) -> Iterator[list[FactBatch]]:
    """Yield the batches of each epoch, shuffled; of a stream, each batch as often as there are epochs.

    The order has a generator of its own, so that it is the same for every method.
    """
    rng = random.Random(config.seed)
    size = config.facts_per_batch
    if config.stream:
        for start in range(0, len(by_fact), size):
            yield [tuple(map(tuple, by_fact[start : start + size]))] * config.num_epochs
        return
    for _ in range(config.num_epochs):
        order = rng.sample(range(len(by_fact)), len(by_fact))
        yield [
            tuple(tuple(by_fact[index]) for index in order[start : start + size])
            for start in range(0, len(order), size)
        ]


def _check(model: nn.Module, background: Sequence[str], config: FinetuneConfig) -> None:
    if (name := config.lr_scheduler) not in (known := [kind.value for kind in SchedulerType]):
        raise ConfigError(f"lr_scheduler={name!r} is unknown; use one of {', '.join(known)}")
    check_guards(background, config)
    if distributed.is_spread(model):
        check_fsdp(config)


FOR_FSDP: dict[str, tuple[Any, ...]] = {
    "method": ("memory",),
    "penalty": ("auto", "local_kl", "none"),
    "replay_fraction": (0.0,),
    # Copies of the weights in bfloat16 would stay together from the forward to the backward pass.
    "mixed_precision": ("no",),
}
"""What a model that is spread over processes can be trained with. In bfloat16 it can be loaded."""


def check_fsdp(config: FinetuneConfig) -> None:
    """Raise ConfigError if a model that is spread over processes cannot be trained like this."""
    for name, fine in FOR_FSDP.items():
        if (value := getattr(config, name)) not in fine:
            raise ConfigError(
                f"{name}={value!r} is not for a model that is spread over processes (fsdp); "
                f"use {name}={fine[0]!r}"
            )


def _schedule(name: str, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    try:
        return get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=num_steps)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lr_scheduler={name!r} is not usable here: {error}") from error
