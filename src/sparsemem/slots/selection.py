"""Selection: from the reads of a batch to the slots it may train."""

import math

import torch
from torch import Tensor

from sparsemem.slots.ranking import Ranking
from sparsemem.slots.usage import PoolUsage


def select_slots(
    reads: Tensor,
    groups: Tensor,
    usage: PoolUsage,
    ranking: Ranking,
    top_t: int,
    max_commonness: float = math.inf,
) -> Tensor:
    """Choose the best `top_t` slots of each group of reads (a group is one fact).

    Works on the slots that are read and never on the whole pool, so its cost does not grow with it.

    Args:
        reads: Slot id of every read that may count (no padding; only the subject's tokens where the
            selection is anchored there), shape (num_reads,).
        groups: Group of each read, shape (num_reads,).
        usage: Background usage of the pool.
        ranking: Score of a slot, one of `RANKINGS`.
        top_t: Slots per group; fewer where fewer are read or score above zero.
        max_commonness: Leave out slots that more background documents read than this many times the
            pool's average slot. The paper has no such limit: it relies on the ranking alone.

    Returns:
        Distinct slot ids of all groups, ascending.
    """
    chosen = []
    for group in groups.unique():
        slot_ids, times = reads[groups == group].unique(return_counts=True)
        background = usage.take(slot_ids)
        scores = ranking(times, background)
        common = background.document_frequency > max_commonness * usage.mean_document_frequency
        scores = scores.masked_fill(common.to(scores.device), 0.0)
        # A stable sort of ascending ids: equal scores fall the same way on every machine.
        best = scores.argsort(descending=True, stable=True)[:top_t]
        chosen.append(slot_ids[best[scores[best] > 0]])
    return torch.cat(chosen).unique() if chosen else reads.new_zeros(0)
