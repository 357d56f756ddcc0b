"""Product-key lookup: the best slots of a table of N x N without scoring all of it.

Shape letters: T tokens, H heads, N sub-keys per half, K top-k, Q half key dim.

A slot is a pair (a, b) of sub-keys; its score is the sum of both halves' scores, so the K best slots
are among the K x K pairs of each half's K best sub-keys. Source: Lample et al. 2019
(arXiv:1907.05242), section 3.1.
"""

import torch
from torch import Tensor

SCORES_AT_ONCE = {"cpu": 2**20}
"""Scores held at a time, by device: those of a whole batch are hundreds of megabytes, and writing them to
main memory and reading them back takes longer than computing them. 4 MB stay in a cache."""
MOST_SCORES = 2**28
"""The same on other devices, where a call costs more than memory traffic: 1 GiB."""


def best_slots(
    queries_TH2Q: Tensor, keys_H2NQ: Tensor, bias_H2N: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Find the best slots of each head, some tokens at a time; what `product_key_top_k` returns for all.

    Args:
        queries_TH2Q: As in `sub_key_scores`, like the next two.
        keys_H2NQ: Sub-keys.
        bias_H2N: Added to each score.
        top_k: Slots to return per head.

    Returns:
        Slot scores and slot ids, both of shape (tokens, heads, top_k), best first.
    """
    at_once = SCORES_AT_ONCE.get(queries_TH2Q.device.type, MOST_SCORES)
    parts = queries_TH2Q.split(max(1, at_once // bias_H2N.numel()))
    found = [product_key_top_k(sub_key_scores(part, keys_H2NQ, bias_H2N), top_k) for part in parts]
    if len(found) == 1:
        return found[0]
    scores, slot_ids = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(slot_ids)


def sub_key_scores(queries_TH2Q: Tensor, keys_H2NQ: Tensor, bias_H2N: Tensor) -> Tensor:
    """Score every sub-key of both halves: `q . k + bias`.

    Args:
        queries_TH2Q: Queries, shape (tokens, heads, 2, query_dim).
        keys_H2NQ: Sub-keys, shape (heads, 2, num_keys, query_dim).
        bias_H2N: Added to each score, shape (heads, 2, num_keys). `-|k|^2 / 2` makes the ranking one
            by Euclidean distance, which is what fitted keys need.

    Returns:
        Scores, shape (tokens, heads, 2, num_keys).
    """
    return torch.einsum("thsq,hsnq->thsn", queries_TH2Q, keys_H2NQ) + bias_H2N


def product_key_top_k(scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the best slots of each head, best first.

    Args:
        scores_TH2N: Sub-key scores, shape (tokens, heads, 2, num_keys).
        top_k: Slots to return per head; at most num_keys**2.

    Returns:
        Slot scores and slot ids, both of shape (tokens, heads, top_k); slot id = a * num_keys + b.
    """
    num_keys = scores_TH2N.shape[-1]
    per_half = min(top_k, num_keys)
    half_scores_TH2K, half_ids_TH2K = scores_TH2N.topk(per_half, dim=-1)
    first_scores_THK, second_scores_THK = half_scores_TH2K.unbind(dim=2)
    first_ids_THK, second_ids_THK = half_ids_TH2K.unbind(dim=2)
    pair_scores = first_scores_THK.unsqueeze(-1) + second_scores_THK.unsqueeze(-2)
    scores_THK, pairs_THK = pair_scores.flatten(-2).topk(top_k, dim=-1)
    rows_THK = first_ids_THK.gather(-1, pairs_THK // per_half)
    columns_THK = second_ids_THK.gather(-1, pairs_THK % per_half)
    return scores_THK, rows_THK * num_keys + columns_THK
