"""One optimizer step: everything that adds gradients, whatever the method."""

import contextlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from sparsemem import distributed
from sparsemem.config import FinetuneConfig
from sparsemem.training.baselines import DenseWeights
from sparsemem.training.examples import (
    Batch,
    Example,
    FactBatch,
    by_length,
    collate,
    collate_parts,
    own_share,
)
from sparsemem.training.loss import FactLoss
from sparsemem.training.methods import SparseMemory
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
        self.own: set[Example] = set()  # what this process runs, of several that learn together

    def observe(self, batches: Sequence[FactBatch]) -> None:
        """Remember what all that is trained or held of some batches predicts, before they are trained."""
        self.method.prepare(batches)
        facts = [*itertools.chain(*batches)]
        self.own = {example for wordings in facts for example in own_share(wordings)}
        trained = [example for example in itertools.chain(*facts) if example.is_trained]
        self.loss.observe(self.method.model, trained, self._forward, self.own)

    def add_gradients(self, batch: FactBatch) -> float:
        """Add the gradients of a batch, part by part; returns its mean loss per label.

        Of several processes each adds those of the examples it runs; the loss is that of all. Where what
        holds the model back is not finite, that is returned in its place.
        """
        drawn = by_length(self._draw(batch), self.method.num_run)
        compared = self.loss.draw(drawn)
        num_labels = sum(example.num_labels for example in drawn)
        num_compared = max(1, sum(map(len, compared)))
        own = [
            (example, places) for example, places in zip(drawn, compared, strict=True) if example in self.own
        ]
        num_parts = self.config.gradient_accumulation_steps
        parts = collate_parts([e for e, _ in own], num_parts, self.device, self.method.num_run)
        positions = iter(places for _, places in own)
        total = total_drift = 0.0
        model = self.method.model
        with self.method.step(batch, parts):  # the slots of the whole batch are chosen in here, once
            for part, counts in distributed.in_step(model, parts, lambda: collate(drawn[:1], self.device)):
                compared = [*itertools.islice(positions, len(part.examples))] if counts else [[]]
                with self.precision.step(), self.method.part(part, self.precision.forward) as run:
                    with self.precision.forward(run.num_tokens):
                        nll, drift = self.loss.of_part(model, run, compared)
                    fact_loss = nll / num_labels
                    (counts * (self.guards.fact_weight * fact_loss + drift / num_compared)).backward()
                total += counts * fact_loss.item()
                total_drift += counts * drift.item()
        held = total_drift + self.guards.add_gradients(len(drawn))
        total, held = distributed.summed_numbers(total, held)
        return total if math.isfinite(held) else held

    @contextlib.contextmanager
    def _forward(self, part: Batch) -> Iterator[Batch]:
        forward = self.precision.forward
        with self.precision.step(), self.method.part(part, forward) as run, forward(run.num_tokens):
            yield run

    def _draw(self, batch: FactBatch) -> list[Example]:
        """Draw wordings of each fact, and texts that are held; all where it has no more."""
        drawn = []
        num_held = self.config.held_per_step if self.loss.locality else 0
        for of_fact in batch:
            wordings = [example for example in of_fact if example.teaches and example.is_trained]
            held = [example for example in of_fact if not example.teaches]
            drawn += self._sample(wordings, self.config.wordings_per_step) + self._sample(held, num_held)
        return drawn

    def _sample(self, examples: list[Example], num: int) -> list[Example]:
        return examples if num >= len(examples) else self.rng.sample(examples, num)
