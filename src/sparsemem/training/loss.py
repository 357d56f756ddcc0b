"""The loss of facts: what is to be learned, and what is to stay as it was beside it.

Shape letters: P positions, K most likely tokens, V vocabulary.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsemem import distributed
from sparsemem.likelihood import IGNORE, before_labels, log_probs_at, next_tokens
from sparsemem.training.examples import Batch, Example, by_length, collate, collate_passes

POSITIONS_KEPT = 32
"""Positions of an example whose predictions are remembered; drawn, where a wording has more."""
POSITIONS_PER_STEP = 8
"""Positions of an example that are compared in a step: each costs a pass through the output head."""
TOP_TOKENS = 64
"""Tokens whose probabilities are remembered; all others count as one."""

Positions = list[list[int]]
"""Positions of each of some examples, ascending."""


class FactLoss:
    """Learns the labels, and keeps what the other tokens of a wording predict.

    loss = mean over labels of -log p + locality * mean over positions of KL(before || now)

    Only the answer is to be learned, but rows written at a name change every prediction from there on,
    in any text that mentions it. So the divergence is taken from the subject on (everywhere, where a
    wording names none), wherever no label is predicted, over the `TOP_TOKENS` most likely tokens and
    everything else as one: a lower bound of the whole.
    The idea is the essence drift of Meng et al. 2022 (arXiv:2202.05262), which holds the predictions
    of one prompt about the subject.

    Args:
        locality: Weight of the divergence; 0 for none.
        rng: Draws the positions.
    """

    def __init__(self, locality: float, rng: random.Random) -> None:
        self.locality, self.rng = locality, rng
        self._positions: dict[Example, list[int]] = {}
        self._before: dict[Example, _Predictions] = {}

    @torch.no_grad()
    def observe(
        self,
        model: Any,
        examples: Iterable[Example],
        forward: Callable[[Batch], contextlib.AbstractContextManager[Batch]],
        own: Collection[Example] | None = None,
    ) -> None:
        """Remember what a model predicts now for examples not seen in the call before; forget all others.

        Args:
            model: What is trained.
            examples: All that will be trained before the next call.
            forward: Context of a forward pass of a batch, with what of it is to be run.
            own: Examples that this process runs, if not all. Positions are drawn for the others too, so
                that every process draws the same.
        """
        if not self.locality:
            return
        asked = dict.fromkeys(examples)
        new = by_length(example for example in asked if example not in self._positions)
        self._positions = {e: places for e, places in self._positions.items() if e in asked}
        self._positions |= {example: self._sample(_free(example), POSITIONS_KEPT) for example in new}
        self._before = {e: before for e, before in self._before.items() if e in asked}
        self._predict(model, new, [e for e in new if own is None or e in own], forward)

    def _predict(
        self,
        model: Any,
        new: Sequence[Example],
        own: Sequence[Example],
        forward: Callable[[Batch], contextlib.AbstractContextManager[Batch]],
    ) -> None:
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        passes = collate_passes(own, device)
        for batch, _ in distributed.in_step(model, passes, lambda: collate(new[:1], device)):
            positions = [self._positions[example] for example in batch.examples]
            with forward(batch) as run:
                marked = _marked(run, positions)
                log_probs_PV = log_probs_at(model, run.input_ids, run.attention_mask, marked, **run.others)
            top = log_probs_PV.topk(min(TOP_TOKENS, log_probs_PV.shape[1]), dim=1)
            sizes = list(map(len, positions))
            expected = zip(top.values.split(sizes), top.indices.int().split(sizes), strict=True)
            self._before.update(zip(batch.examples, itertools.starmap(_Predictions, expected), strict=True))
        model.train(was_training)

    def draw(self, examples: Iterable[Example]) -> Positions:
        """Draw the positions of examples, observed before, that are compared in this step."""
        if not self.locality:
            return [[] for _ in examples]
        kept = [self._positions[example] for example in examples]
        return [self._sample(positions, POSITIONS_PER_STEP) for positions in kept]

    def of_part(self, model: Any, part: Batch, drawn: Positions) -> tuple[Tensor, Tensor]:
        """Run a forward pass.

        Args:
            model: What is trained.
            part: Examples, observed before.
            drawn: Positions from `draw`.

        Returns:
            Sum of -log p over the labels, and locality times the sum of the divergence over positions.
        """
        labelled, compared = before_labels(part.labels), _marked(part, drawn)
        either = labelled | compared
        log_probs_PV = log_probs_at(model, part.input_ids, part.attention_mask, either, **part.others)
        is_label = labelled[either]
        found = log_probs_PV[is_label].gather(-1, next_tokens(part.labels, labelled))
        return -found.sum(), self.locality * self._divergence(log_probs_PV[~is_label], part, drawn)

    def _sample(self, positions: list[int], num: int) -> list[int]:
        return sorted(self.rng.sample(positions, min(num, len(positions))))

    def _divergence(self, log_probs_PV: Tensor, part: Batch, drawn: Positions) -> Tensor:
        if not len(log_probs_PV):
            return log_probs_PV.sum()
        expected, tokens = [], []
        for example, positions in zip(part.examples, drawn, strict=True):
            before = self._before[example]
            rows = [self._positions[example].index(position) for position in positions]
            expected.append(before.log_probs[rows])
            tokens.append(before.tokens[rows])
        expected_PK = _with_rest(torch.cat(expected))
        found_PK = _with_rest(log_probs_PV.gather(-1, torch.cat(tokens).long()))
        return (expected_PK.exp() * (expected_PK - found_PK)).sum()


class _Predictions(NamedTuple):
    """What a model predicted at some positions of an example; tensors have shape (positions, kept tokens)."""

    log_probs: Tensor
    tokens: Tensor


def _free(example: Example) -> list[int]:
    """List the positions of an example whose predictions may be held: those that are not to be learned."""
    start = example.is_subject.index(True) if any(example.is_subject) else 0
    next_labels = (*example.labels[1:], IGNORE)
    return [position for position in range(start, len(next_labels)) if next_labels[position] == IGNORE]


def _marked(part: Batch, positions: Positions) -> Tensor:
    """Turn the positions of each example into a mask of the part."""
    mask = torch.zeros_like(part.input_ids, dtype=torch.bool)
    for row, (of_example, start) in enumerate(zip(positions, part.starts, strict=True)):
        mask[row, [position - start for position in of_example]] = True
    return mask


def _with_rest(log_probs_PK: Tensor) -> Tensor:
    """Append the log-probability of everything else; shape (positions, kept tokens + 1)."""
    # Kept off 1: near it the remainder is a difference of equal numbers, and its gradient has no end.
    total_P1 = log_probs_PK.logsumexp(dim=1, keepdim=True).clamp(max=-1e-4)
    return torch.cat([log_probs_PK, torch.log(-torch.expm1(total_P1))], dim=1)
