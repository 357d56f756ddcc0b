"""One optimizer step: everything that adds gradients, whatever the method."""

import contextlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from sparsemem.config import FinetuneConfig
from sparsemem.training.examples import Batch, Example, FactBatch, collate_parts
from sparsemem.training.loss import FactLoss
from sparsemem.training.methods import DenseWeights, SparseMemory
from sparsemem.training.penalties import build_guards
from sparsemem.training.precision import MixedPrecision


class GradientStep:
    """Adds up the gradients of a step: facts, locality, penalties and replay.

    Args:
        method: What may move, in the state it is in before the first step.
        tokenizer: The (fast) tokenizer of the model.
        background: Texts for the guards that need some.
        config: Options.
        rng: Draws wordings.
    """

    def __init__(
        self,
        method: SparseMemory | DenseWeights,
        tokenizer: Any,
        background: Sequence[str],
        config: FinetuneConfig,
        rng: random.Random,
    ) -> None:
        self.method, self.config, self.rng = method, config, rng
        self.device = next(method.model.parameters()).device
        self.guards = build_guards(method.model, tokenizer, method.trained, background, config)
        self.precision = MixedPrecision(method.model, config.mixed_precision)
        locality = config.strength if config.is_local else 0.0
        self.loss = FactLoss(locality, random.Random(config.seed))

    def observe(self, batches: Sequence[FactBatch]) -> None:
        """Remember what all wordings of some batches predict, before they are trained."""
        examples = itertools.chain(*itertools.chain(*batches))
        self.loss.observe(self.method.model, examples, self._forward)

    def add_gradients(self, batch: FactBatch) -> float:
        """Add the gradients of a batch, part by part; returns its mean loss per label.

        Where what holds the model back is not finite, that is returned in its place.
        """
        drawn = self._draw(batch)
        parts = collate_parts(drawn, self.config.gradient_accumulation_steps, self.device)
        compared = [self.loss.draw(part) for part in parts]
        num_labels = sum(part.num_labels for part in parts)
        num_compared = max(1, sum(map(len, itertools.chain(*compared))))
        total = total_drift = 0.0
        with self.method.step(batch, parts):  # the slots of the whole batch are chosen in here, once
            for part, positions in zip(parts, compared, strict=True):
                with self.method.part(part), self.precision.step():
                    with self.precision.forward():
                        nll, drift = self.loss.of_part(self.method.model, part, positions)
                    fact_loss = nll / num_labels
                    (self.guards.fact_weight * fact_loss + drift / num_compared).backward()
                total += fact_loss.item()
                total_drift += drift.item()
        held = total_drift + self.guards.add_gradients(len(drawn))
        return total if math.isfinite(held) else held

    @contextlib.contextmanager
    def _forward(self, part: Batch) -> Iterator[None]:
        with self.method.part(part), self.precision.step(), self.precision.forward():
            yield

    def _draw(self, batch: FactBatch) -> list[Example]:
        """Draw wordings of each fact, and texts that are held; all where it has no more."""
        drawn = []
        num_held = self.config.held_per_step if self.loss.locality else 0
        for of_fact in batch:
            wordings = [example for example in of_fact if example.teaches]
            held = [example for example in of_fact if not example.teaches]
            drawn += self._sample(wordings, self.config.wordings_per_step) + self._sample(held, num_held)
        return drawn

    def _sample(self, examples: list[Example], num: int) -> list[Example]:
        return examples if num >= len(examples) else self.rng.sample(examples, num)
