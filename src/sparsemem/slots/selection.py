"""Selection: from the reads of a batch to the slots it may train."""

import torch
from torch import Tensor

from sparsemem.slots.ranking import Ranking
from sparsemem.slots.usage import PoolUsage

COMMON = 1.5
"""A slot is common if this many times as many documents read it as the mean slot; nine in ten are not."""


def select_slots(
    slot_ids: Tensor,
    weights: Tensor,
    groups: Tensor,
    usage: PoolUsage,
    ranking: Ranking,
    top_t: int,
    max_document_frequency: float | None = 1.0,
) -> dict[int, Tensor]:
    """Choose the best `top_t` slots of each group of reads (a group is one fact).

    Works on the slots that are read and never on the whole pool, so its cost does not grow with it.

    Args:
        slot_ids: Slot of every read that may count (no padding; only the subject's tokens where the
            selection is anchored there), shape (num_reads,).
        weights: How much each read counts, shape (num_reads,): one, as in the paper, or its weight.
        groups: Group of each read, shape (num_reads,).
        usage: Background usage of the pool.
        ranking: Score of a slot, one of `RANKINGS`.
        top_t: Slots per group; fewer where fewer are read or score above zero.
        max_document_frequency: Leave out slots that a larger share of the background's documents
            reads, 0 to 1, or with None that are `COMMON`; a group that reads no others keeps them. The
            paper has no such limit: it relies on the ranking alone.

    Returns:
        Slot ids by group, best first; groups may share some.
    """
    if max_document_frequency is None:
        # Relative: in a pool of a quarter of the slots, each is read by four times as many documents.
        max_document_frequency = COMMON * usage.mean_document_frequency
    # On the CPU, where usage is kept: there a sum is taken in one order, and slots that are nearly equal fall
    # the same way each time and in every process.
    device = slot_ids.device
    slot_ids, weights, groups = slot_ids.cpu(), weights.cpu(), groups.cpu()
    chosen = {}
    for group in groups.unique().tolist():
        in_group = groups == group
        candidates, place = slot_ids[in_group].unique(return_inverse=True)
        reads = weights.new_zeros(len(candidates)).index_add_(0, place, weights[in_group])
        background = usage.take(candidates)
        scores = ranking(reads, background)
        common = background.document_frequency > max_document_frequency * usage.num_documents
        if not common.all():
            scores = scores.masked_fill(common, 0.0)
        chosen[group] = candidates[_best(scores, top_t)].to(device)
    return chosen


def _best(scores: Tensor, top_t: int) -> Tensor:
    """Find the `top_t` highest scores above zero, best first; of equal ones the first."""
    least = scores.topk(min(top_t, len(scores))).values.min().clamp(min=torch.finfo(scores.dtype).tiny)
    reach = (scores >= least).nonzero().squeeze(1)
    # A stable sort: equal scores fall the same way on every machine.
    return reach[scores[reach].argsort(descending=True, stable=True)[:top_t]]
