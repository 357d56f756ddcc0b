"""What facts are asked by, and which of its rows says each part of an answer.

Shape letters: B examples, T tokens, P positions, K relation dim.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsemem import distributed
from sparsemem.likelihood import before_labels
from sparsemem.memory.layer import MemoryLayer
from sparsemem.training.examples import Batch, Example

LENGTH = 5
"""Tokens of an answer that one row says, in the mean: up to 7 are left to one. What a row adds is the same at
each of them: enough for a name, and too little for a sentence. With 4 sentences are learned no better, with 6
worse (experiments/fictional)."""
MOST_ROWS = 256
"""Rows of one fact, at most. Row n of fact f goes by the number `f * MOST_ROWS + n`."""
END = MOST_ROWS - 1
"""The row of a fact that says no part of the answer, but that it is over."""
BEGINS, RESUMES, GOES_ON, OVER, ENDS = range(5)
"""Where a text is: before an answer, before what a further row says of it, elsewhere within it, and at the
last token of it, where nothing is to be said or that it is over."""
NOWHERE = -1
Number = TypeVar("Number", int, Tensor)


def fact_of(row: Number) -> Number:
    """Return the fact of a row, or those of several, by their numbers."""
    return row // MOST_ROWS


class Asked(NamedTuple):
    """Queries by which facts are asked for.

    Args:
        queries: Of length 1, shape (positions, relation_dim).
        rows: Number of the row that is to say what follows, shape (positions,), int64.
        where: `BEGINS`, `RESUMES`, `GOES_ON`, `OVER` or `ENDS`, same shape, int64.
    """

    queries: Tensor
    rows: Tensor
    where: Tensor

    @property
    def facts(self) -> Tensor:
        """The fact that each is about, shape (positions,)."""
        return fact_of(self.rows)

    @property
    def is_start(self) -> Tensor:
        """Where what a row says begins, shape (positions,)."""
        return (self.where == BEGINS) | (self.where == RESUMES) | (self.where == ENDS)

    def at(self, positions: Tensor) -> "Asked":
        """Take some of them."""
        return Asked(*(kind[positions] for kind in self))

    def starts(self) -> dict[int, Tensor]:
        """Return the mean of what rows are asked by where what they say begins, by row."""
        return _means(self.queries[self.is_start], self.rows[self.is_start])

    def begins(self) -> dict[int, Tensor]:
        """Return the mean of what facts are asked by where their answers begin, by fact."""
        begins = self.where == BEGINS
        return _means(self.queries[begins], self.facts[begins])

    def ending(self, facts: Collection[int]) -> "Asked":
        """Let a row of its own say that an answer is over, of some facts; of the others nothing does."""
        ends = self.where == ENDS
        said = ends & torch.isin(self.facts, self.facts.new_tensor([*facts]))
        where = torch.where(ends & ~said, OVER, self.where)
        return self._replace(rows=torch.where(said, self.facts * MOST_ROWS + END, self.rows), where=where)


def _means(queries_PK: Tensor, numbers_P: Tensor) -> dict[int, Tensor]:
    """Return the mean of the queries of each number."""
    return {number: queries_PK[numbers_P == number].mean(dim=0) for number in numbers_P.unique().tolist()}


def joined(parts: Sequence[Asked]) -> Asked:
    """Put some behind one another."""
    return Asked(*map(torch.cat, zip(*parts, strict=True)))


class Questions:
    """Listens to what facts are asked by, while their wordings run.

    Args:
        layer: A memory layer with relations.
    """

    def __init__(self, layer: MemoryLayer) -> None:
        self.layer = layer
        self.about: dict[int, int | None] = {}
        """Number of what each fact is about, if it is known."""
        self.heard: list[Asked] = []
        """What was heard by this process since `take`."""
        self.unended: set[int] = set()
        """Facts after whose answers the model would go on: a row of their own says that these are over."""
        self._lengths: dict[int, int] = {}
        nothing = layer.pool.slot_to_row[:0].long()
        self.nothing = Asked(layer.pool.rows.new_zeros(0, layer.relation_dim), nothing, nothing)
        """No query of no fact."""

    def introduce(self, examples: Iterable[Example]) -> None:
        """Say what facts are about, and how long their answers are."""
        for example in examples:
            fact = example.fact_index
            self.about[fact] = example.about
            if example.teaches:
                length = example.num_left_out + example.num_said
                self._lengths[fact] = max(self._lengths.get(fact, 1), length)

    def num_rows(self, fact: int) -> int:
        """How many rows a fact takes."""
        return self._num_parts(fact) + (fact in self.unended)

    def _num_parts(self, fact: int) -> int:
        return min(END, max(1, round(self._lengths.get(fact, 1) / LENGTH)))

    @contextlib.contextmanager
    def asked_in(self, part: Batch) -> Iterator[None]:
        """Within this context a pass of `part` up to where rows answer is listened to."""

        def keep(_block: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            rows_BT, where_BT = self._places(part)
            positions = where_BT != NOWHERE
            assert self.layer.relation is not None
            queries_PK = normalize(self.layer.relation(hidden[positions].float()), dim=-1)
            self.heard.append(Asked(queries_PK, rows_BT[positions], where_BT[positions]))

        # In front: others may end the pass there.
        handle = self.layer.beside.last.register_forward_hook(keep, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def take(self) -> Asked:
        """Return what was heard by all processes since the last time."""
        heard, self.heard = joined([self.nothing, *self.heard]), []  # a process may have run no wording
        return Asked(*map(distributed.gathered, heard))

    def _places(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Tell which row each token of a batch asks for, and where of it it is; or `NOWHERE`."""
        numbers = [
            (self._lengths.get(fact, 1), self._num_parts(fact), example.num_left_out)
            for fact, example in zip(part.fact_index.tolist(), part.examples, strict=True)
        ]
        length_B1, num_parts_B1, left_out_B1 = part.labels.new_tensor(numbers).T.unsqueeze(-1)
        before_BT = before_labels(part.labels)
        place_BT = left_out_B1 + before_BT.cumsum(dim=1) - 1
        row_BT = place_BT.clamp(min=0).minimum(length_B1 - 1) * num_parts_B1 // length_B1
        is_new_BT = row_BT.diff(dim=1, prepend=row_BT[:, :1]) > 0
        where_BT = torch.where(is_new_BT, RESUMES, GOES_ON)
        # A text that is learned whole goes on after the name: nothing was asked yet.
        where_BT = torch.where((place_BT == 0) & ~part.is_subject, BEGINS, where_BT)
        where_BT = torch.where(before_BT, where_BT, NOWHERE)
        for number, (example, start) in enumerate(zip(part.examples, part.starts, strict=True)):
            if example.teaches and example.over is not None:
                where_BT[number, example.over - start] = ENDS if example.says_end else OVER
        return part.fact_index.unsqueeze(1) * MOST_ROWS + row_BT, where_BT
