"""Guards of what a model knew: gradients from background text, beside those of the facts."""

import contextlib
import copy
import dataclasses
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from sparsemem import distributed
from sparsemem.config import FinetuneConfig
from sparsemem.data import Fact
from sparsemem.errors import ConfigError, DataError
from sparsemem.likelihood import label_log_probs
from sparsemem.memory.attach import memory_layers
from sparsemem.training.examples import Batch, Example, collate, encode_wording
from sparsemem.training.paraphrase import Wording
from sparsemem.training.precision import bf16_autocast

MAX_TOKENS = 64
"""Longer background documents are cut."""
FISHER_DOCUMENTS = 64
"""Documents the Fisher information is estimated on."""
KL_DOCUMENTS = 2
"""Documents per step on which predictions are compared with the base's."""
DOCUMENTS_PER_PART = 8
"""Replayed documents in one backward pass: every token of theirs needs logits."""


class Guard(Protocol):
    """Protects what the model knew at the start of training.

    In several processes the gradients and losses of all of them are summed, so each adds a share.
    """

    def add_gradients(self, num_sequences: int) -> float:
        """Add to the gradients of a step, between its backward passes and `optimizer.step()`.

        Args:
            num_sequences: Sequences of facts in the step, all its parts together.

        Returns:
            The guard's loss as it is weighted.
        """


@dataclasses.dataclass(frozen=True)
class Guards:
    """All guards of a training run.

    Args:
        guards: Each adds its own gradients.
        fact_weight: What the facts' loss is to be multiplied by before its backward pass: their
            share beside replay.
    """

    guards: tuple[Guard, ...] = ()
    fact_weight: float = 1.0

    def add_gradients(self, num_sequences: int) -> float:
        """Let every guard add its gradients; returns the sum of their losses."""
        return sum(guard.add_gradients(num_sequences) for guard in self.guards)


class Background:
    """Background documents in random order, none twice before all others were drawn.

    Args:
        tokenizer: The (fast) tokenizer of the model.
        texts: One document each.
        seed: Seed of the order.

    Raises:
        DataError: No text has two tokens.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], seed: int) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        if not any(self._encode(text) for text in texts):
            raise DataError(
                f"none of the {len(texts)} background texts has a token to predict; give whole sentences"
            )
        self._stream = self._shuffled(random.Random(seed))

    def draw(self, num_documents: int) -> list[Example]:
        """Return the next documents, labelled with all their tokens."""
        return list(islice(self._stream, num_documents))

    def _shuffled(self, rng: random.Random) -> Iterator[Example]:
        while True:
            yield from filter(None, map(self._encode, rng.sample(self.texts, len(self.texts))))

    def _encode(self, text: str) -> Example | None:
        document, wording = Fact(statement=text), Wording(text)
        return encode_wording(self.tokenizer, 0, document, wording, (), "all", MAX_TOKENS)


class Ewc:
    """Elastic weight consolidation: a spring on each weight, as stiff as the background needs it.

    loss = weight / 2 * sum_i F_i (p_i - start_i)^2, so its gradient is weight * F_i (p_i - start_i).
    Source: Kirkpatrick et al. 2017 (arXiv:1612.00796), equation 3. With F per token this is, to second
    order and but for what lies off the diagonal, the loss of `KlToBase` with the same weight.

    Args:
        parameters: What is trained; where it is now is where it is pulled to.
        fisher: Stiffness, one tensor for each parameter; from `diagonal_fisher`.
        weight: Weight beside the loss of the facts.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], fisher: Sequence[Tensor], weight: float) -> None:
        self.parameters, self.fisher, self.weight = parameters, fisher, weight
        self.start = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def add_gradients(self, num_sequences: int) -> float:
        """Add the pull, in closed form; of several processes the main one does."""
        if not distributed.is_main():
            return 0.0
        loss = 0.0
        for parameter, start, fisher in zip(self.parameters, self.start, self.fisher, strict=True):
            moved = parameter - start
            pull = self.weight * fisher * moved
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad += pull
            loss += (pull * moved).sum().item() / 2
        return loss


class KlToBase:
    """Keeps the predictions on background text where they were.

    loss = weight * mean over tokens of KL(base || model), on documents drawn anew in each step; the
    base is the model as it was when training started.
    Source: the distillation of Li and Hoiem 2016 (arXiv:1606.09282), at temperature 1 and on
    background text in place of the new task's.

    Args:
        model: What is trained; what moves must require a gradient already.
        background: Documents to draw from.
        weight: Weight beside the loss of the facts.
        autocast: Entered around every forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        background: Background,
        weight: float,
        autocast: contextlib.AbstractContextManager[Any],
    ) -> None:
        self.model, self.background, self.weight, self.autocast = model, background, weight, autocast
        self.base = frozen_copy(model)

    def add_gradients(self, num_sequences: int) -> float:
        """Add the gradient on the next documents."""
        documents = self.background.draw(KL_DOCUMENTS)
        num_tokens = sum(len(document.input_ids) for document in documents)
        own = distributed.share(documents)
        if not own:
            return 0.0
        batch = collate(own, _device(self.model))
        with torch.no_grad(), self.autocast:
            expected = _log_probs(self.base, batch)
        # In a context of its own: weights cast without gradients must not be reused with them.
        with self.autocast:
            found = _log_probs(self.model, batch)
        divergence = kl_div(found, expected, reduction="sum", log_target=True) / num_tokens
        loss = self.weight * divergence
        loss.backward()
        return loss.item()


class Replay:
    """Trains background documents along with the facts, on all their tokens.

    loss = fraction * mean over tokens of -log p, beside (1 - fraction) times the loss of the facts,
    which is for the caller to scale: see `Guards.fact_weight`.
    Source: replay as in Ibrahim et al. 2024 (arXiv:2403.08763), with given text for the old corpus.

    Args:
        model: What is trained.
        background: Documents to draw from.
        fraction: Share of the documents among all sequences of a step.
        autocast: Entered around every forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        background: Background,
        fraction: float,
        autocast: contextlib.AbstractContextManager[Any],
    ) -> None:
        self.model, self.background, self.fraction, self.autocast = model, background, fraction, autocast

    def add_gradients(self, num_sequences: int) -> float:
        """Add the gradient on the next fraction / (1 - fraction) * num_sequences documents."""
        num_documents = max(1, round(self.fraction / (1 - self.fraction) * num_sequences))
        documents = self.background.draw(num_documents)
        scale = self.fraction / sum(document.num_labels for document in documents)
        own = distributed.share(documents)
        starts = range(0, len(own), DOCUMENTS_PER_PART)
        parts = [collate(own[i : i + DOCUMENTS_PER_PART], _device(self.model)) for i in starts]
        total = 0.0
        for part in parts:
            with self.autocast:
                loss = -label_log_probs(self.model, *part.model_inputs).sum() * scale
            loss.backward()
            total += loss.item()
        return total


def build_guards(
    model: nn.Module,
    tokenizer: Any,
    parameters: Sequence[nn.Parameter],
    background: Sequence[str],
    config: FinetuneConfig,
) -> Guards:
    """Make the guards a config asks for, in the state the model is in before its first step.

    Args:
        model: What will be trained; nothing else in it may require a gradient.
        tokenizer: Its (fast) tokenizer.
        parameters: Parameters that will be trained.
        background: Texts the model should go on handling, one document each.
        config: Options; `penalty`, `penalty_weight`, `replay_fraction`, `mixed_precision` and `seed`.

    Raises:
        ConfigError: There is no background for what is asked.
        DataError: No background text has two tokens.
    """
    check_guards(background, config)
    if not config.is_guarded:
        return Guards()
    documents = Background(tokenizer, background, config.seed)
    device = _device(model)
    autocast = bf16_autocast(device, config.mixed_precision)
    guards: list[Guard] = []
    if config.penalty == "ewc":
        generator = torch.Generator(device).manual_seed(config.seed)
        fisher = diagonal_fisher(model, parameters, documents.draw(FISHER_DOCUMENTS), generator, autocast)
        guards.append(Ewc(parameters, fisher, config.strength))
    if config.penalty == "kl":
        guards.append(KlToBase(model, documents, config.strength, autocast))
    if config.replay_fraction:
        guards.append(Replay(model, documents, config.replay_fraction, autocast))
    return Guards(tuple(guards), fact_weight=1 - config.replay_fraction)


def check_guards(background: Sequence[str], config: FinetuneConfig) -> None:
    """Raise ConfigError if a penalty or replay is asked for and there is no background text."""
    if config.is_guarded and not background:
        asked = f"penalty={config.penalty!r}, replay_fraction={config.replay_fraction}"
        raise ConfigError(f"{asked} need background text, and there is none; give some hundred documents")


def diagonal_fisher(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    documents: Sequence[Example],
    generator: torch.Generator,
    autocast: contextlib.AbstractContextManager[Any],
) -> list[Tensor]:
    """Estimate how much each parameter matters to the predictions on some documents.

    F_i = mean over tokens of E[(d log p(y | tokens so far) / d p_i)^2], where y is drawn from the
    model's own prediction: the Fisher information. With y from the text it would be the "empirical"
    one, which is no curvature of anything (Kunstner et al. 2019, arXiv:1905.12558).

    Args:
        model: A causal LM; run in evaluation mode.
        parameters: Parameters of the model.
        documents: Background, one backward pass each.
        generator: Draws the labels; on the model's device.
        autocast: Entered around every forward pass.

    Returns:
        One tensor for each parameter, in its shape, float32.
    """
    fisher = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    was_training = model.training
    model.eval()
    for document in documents:
        with autocast:
            log_probs = _log_probs(model, collate([document], _device(model)))
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        # Summed before it is squared: the labels are independent and each gradient is zero in the
        # mean, so the products of two tokens are too, and one pass serves all tokens.
        log_prob = log_probs.gather(-1, drawn).sum()
        gradients = torch.autograd.grad(log_prob, parameters, materialize_grads=True)
        for total, gradient in zip(fisher, gradients, strict=True):
            total += gradient.float().square()
    model.train(was_training)
    num_tokens = sum(len(document.input_ids) for document in documents)
    return [total / num_tokens for total in fisher]


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model as it is now, for evaluation; what is frozen in it is shared, not copied.

    So beside an adapter or a memory it costs what these hold, and not a second base model.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    tables = [layer.pool.base for layer in memory_layers(model) if layer.pool.base is not None]
    shared = {id(tensor): tensor for tensor in (*frozen, *tables)}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def _log_probs(model: Any, batch: Batch) -> Tensor:
    """Predict what follows each token, padding left out; shape (tokens, vocabulary), float32."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[batch.attention_mask.bool()].float().log_softmax(dim=-1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
