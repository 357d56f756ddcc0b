"""Rankings: which of the slots a batch reads are its own.

Shape letters: C candidate slots (all slots of the pool, or those read). A ranking is a function of the
reads of the candidates and of the background's usage of the same candidates; higher is better.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsemem.errors import PoolMismatchError
from sparsemem.slots.usage import PoolUsage

Ranking = Callable[[Tensor, PoolUsage], Tensor]


def tf_idf(reads_C: Tensor, usage: PoolUsage) -> Tensor:
    """Score slots that this batch reads often and the background rarely.

    score_i = reads_i / sum(reads) * log((num_documents + 1) / (document_frequency_i + 1))
    Source: Lin et al. 2025 (arXiv:2510.15103), section 3; a document is one background batch.

    Args:
        reads_C: Reads per slot in the batch, shape (candidates,), counted or weighted, no padding.
        usage: Background usage of the same candidates.

    Returns:
        Scores, shape (candidates,), float32; zero where the batch reads nothing.

    Raises:
        PoolMismatchError: `usage` is of other candidates.
    """
    _check(reads_C, usage)
    inverse_frequency_C = torch.log((usage.num_documents + 1) / (usage.document_frequency + 1))
    return _share(reads_C) * inverse_frequency_C


def tf(reads_C: Tensor, usage: PoolUsage) -> Tensor:
    """Score slots by their share of the batch's reads; arguments and errors as in `tf_idf`."""
    _check(reads_C, usage)
    return _share(reads_C)


def kl(reads_C: Tensor, usage: PoolUsage) -> Tensor:
    """Score slots by their part of the divergence of the batch's reads from the background's.

    score_i = p_i log(p_i / q_i), with p the share of reads in the batch and q the share in the
    background, its counts plus one. Source: Gupta et al. 2026 (arXiv:2605.03229). Arguments and
    errors as in `tf_idf`.
    """
    _check(reads_C, usage)
    batch_C = _share(reads_C)
    background_C = (usage.reads + 1) / (usage.total_reads + usage.num_slots)
    return torch.where(reads_C > 0, batch_C * torch.log(batch_C / background_C), 0.0)


def random(reads_C: Tensor, usage: PoolUsage) -> Tensor:
    """Score the slots read by lot: what any other ranking has to beat.

    The lot is the same in every call on the same candidates, so a fact keeps its slots as long as its
    reads stay: with one memory layer. Arguments and errors as in `tf_idf`.
    """
    _check(reads_C, usage)
    scores_C = 1 - torch.rand(len(reads_C), generator=torch.Generator().manual_seed(0))
    return scores_C.masked_fill(reads_C == 0, 0.0)


RANKINGS: dict[str, Ranking] = {"tf_idf": tf_idf, "tf": tf, "kl": kl, "random": random}


def _share(reads_C: Tensor) -> Tensor:
    return reads_C.float() / reads_C.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _check(reads_C: Tensor, usage: PoolUsage) -> None:
    if reads_C.shape != usage.reads.shape:
        raise PoolMismatchError(
            f"reads of {len(reads_C)} slots, but usage of {len(usage.reads)}; "
            "the usage was counted on a pool of another size: count_usage(...) again"
        )
