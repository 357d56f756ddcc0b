"""Alignment: which tokens read the slots that were written, and whose slots those are.

Shape letters: T tokens, R reads per token (all heads together), C slots asked about.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NOBODY = -1
"""Owner of a slot that is no one's."""


def last_writers(slot_ids: Tensor, updates: Sequence[Tensor]) -> Tensor:
    """Find which update wrote each slot last.

    Args:
        slot_ids: Slots, any shape, int64.
        updates: Slots each update wrote, oldest update first.

    Returns:
        Index into `updates`, in the shape of `slot_ids`; `NOBODY` where none of them wrote.
    """
    writers = torch.full_like(slot_ids, NOBODY)
    for index, written in enumerate(updates):
        writers[torch.isin(slot_ids, written)] = index
    return writers


def most_weight(weights_by_reader: Tensor) -> Tensor:
    """Find which reader gives each slot the most weight, the first of equal ones.

    Args:
        weights_by_reader: Weight each reader's reads give each slot, shape (readers, slots).

    Returns:
        Reader of each slot, shape (slots,); `NOBODY` where none reads it.
    """
    if not len(weights_by_reader):
        return torch.full((weights_by_reader.shape[1],), NOBODY)
    weight_C, reader_C = weights_by_reader.max(dim=0)
    return reader_C.masked_fill(weight_C == 0, NOBODY)


def weight_of_slots(slot_ids: Tensor, weights: Tensor, asked_C: Tensor) -> Tensor:
    """Add up the weight that some reads give to each of the slots asked about.

    Args:
        slot_ids: Slot of each read, any shape.
        weights: Weight of each read, same shape.
        asked_C: Distinct slots, ascending, shape (slots,).

    Returns:
        Shape (slots,).
    """
    total_C: Tensor = weights.new_zeros(len(asked_C))
    asked = torch.isin(slot_ids, asked_C)
    total_C.index_add_(0, torch.searchsorted(asked_C, slot_ids[asked]), weights[asked])
    return total_C


def hits_per_token(slot_ids_TR: Tensor, chosen: Tensor) -> Tensor:
    """Count the reads of each token that find one of the chosen slots; shape (tokens,), int64."""
    hits_T: Tensor = torch.isin(slot_ids_TR, chosen).sum(dim=1)
    return hits_T


def core_set(wordings: Sequence[Tensor]) -> Tensor:
    """Find the slots that every wording reads.

    Source: Lin et al. 2025 (arXiv:2510.15103): the core set of a fact is read in all its paraphrases
    and in the question.

    Args:
        wordings: Slots each wording reads, at least one wording.

    Returns:
        Distinct slots, ascending.
    """
    core: Tensor = wordings[0].unique()
    for read in wordings[1:]:
        core = core[torch.isin(core, read)]
    return core


def share_at(hits: Sequence[Tensor], marks: Sequence[Tensor]) -> float | None:
    """Say what share of the hits of some sequences falls on marked tokens; None if there is no hit.

    Args:
        hits: Hits of each token of each sequence, shape (tokens,).
        marks: The tokens asked about, bool, same shapes.
    """
    total = sum(int(hits_T.sum()) for hits_T in hits)
    at_marks = sum(int(hits_T[marks_T].sum()) for hits_T, marks_T in zip(hits, marks, strict=True))
    return at_marks / total if total else None


def shift_test(
    hits: Sequence[Tensor], marks: Sequence[Tensor], *, num_shifts: int = 999, seed: int = 0
) -> tuple[float, float]:
    """Ask whether as many hits would fall on the marked tokens if these stood elsewhere.

    A permutation test: the marks of each sequence are turned by a random number of tokens, those that
    leave at one end coming in at the other, so that marked spans keep their lengths.
    p = (1 + shifts that reach the observed share) / (1 + num_shifts).
    Source: Phipson and Smyth 2010, "Permutation p-values should never be zero".

    Args:
        hits: As in `share_at`.
        marks: As in `share_at`.
        num_shifts: Random shifts.
        seed: Of the shifts.

    Returns:
        The mean share at shifted marks, and p. Without a hit: 0 and 1.
    """
    observed = share_at(hits, marks)
    if observed is None:
        return 0.0, 1.0
    generator = torch.Generator().manual_seed(seed)
    total = sum(int(hits_T.sum()) for hits_T in hits)
    at_marks = torch.zeros(num_shifts, dtype=torch.int64)
    for hits_T, marks_T in zip(hits, marks, strict=True):
        places = marks_T.nonzero().squeeze(1)
        shifts = torch.randint(len(hits_T), (num_shifts, 1), generator=generator)
        at_marks += hits_T[(places + shifts) % len(hits_T)].sum(dim=1)
    shares = at_marks.double() / total
    reached = int((shares >= observed).sum())
    return float(shares.mean()), (1 + reached) / (1 + num_shifts)
