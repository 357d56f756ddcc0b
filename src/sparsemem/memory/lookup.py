"""Product-key lookup: the best slots of a table of N x N without scoring all of it.

Shape letters: T tokens, H heads, P halves of all heads (H * 2), N sub-keys per half, K top-k, Q half key dim.

A slot is a pair (a, b) of sub-keys; its score is the sum of both halves' scores, so the K best slots
are among the K x K pairs of each half's K best sub-keys. Source: Lample et al. 2019
(arXiv:1907.05242), section 3.1.

Slots are numbered in shells, (0, 0) first, then the pairs that have a 1 and nothing larger, and so on
(Szudzik 2006, "An elegant pairing function"): so those of N sub-keys are the first N * N, and a slot keeps
its number when sub-keys are added.
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
    # One call that starts from the bias: a product and a sum would write all scores twice.
    scores_PTN = torch.baddbmm(
        bias_H2N.flatten(0, 1).unsqueeze(1),
        queries_TH2Q.flatten(1, 2).transpose(0, 1),
        keys_H2NQ.flatten(0, 1).transpose(1, 2),
    )
    return scores_PTN.view(*bias_H2N.shape[:2], *scores_PTN.shape[1:]).permute(2, 0, 1, 3)


def product_key_top_k(scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the best slots of each head, best first.

    Args:
        scores_TH2N: Sub-key scores, shape (tokens, heads, 2, num_keys).
        top_k: Slots to return per head; at most num_keys**2.

    Returns:
        Slot scores and slot ids, both of shape (tokens, heads, top_k).
    """
    num_keys = scores_TH2N.shape[-1]
    per_half = min(top_k, num_keys)
    # Tokens last but one, as the scores lie in memory.
    half_scores_H2TK, half_ids_H2TK = scores_TH2N.permute(1, 2, 0, 3).topk(per_half, dim=-1)
    first_scores_HTK, second_scores_HTK = half_scores_H2TK.unbind(dim=1)
    first_ids_HTK, second_ids_HTK = half_ids_H2TK.unbind(dim=1)
    pair_scores = first_scores_HTK.unsqueeze(-1) + second_scores_HTK.unsqueeze(-2)
    scores_HTK, pairs_HTK = pair_scores.flatten(-2).topk(top_k, dim=-1)
    rows_HTK = first_ids_HTK.gather(-1, pairs_HTK // per_half)
    columns_HTK = second_ids_HTK.gather(-1, pairs_HTK % per_half)
    slot_ids_HTK = slot_number(rows_HTK, columns_HTK)
    return scores_HTK.transpose(0, 1).contiguous(), slot_ids_HTK.transpose(0, 1).contiguous()


def slot_number(first: Tensor, second: Tensor) -> Tensor:
    """Number of the slots of some pairs of sub-keys, of either half; int64, in their shape."""
    shell = torch.maximum(first, second)
    # Up the column of the shell, then along its row.
    return shell * shell + first + torch.where(first == shell, second, 0)
