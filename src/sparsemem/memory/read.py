"""The sparse read: a weighted sum of the rows that are there, and its exact gradient.

Shape letters: T tokens, K reads per token (all heads together), V value dim, R rows of a table,
M reads that hit a row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK = 16_384
"""Reads whose rows are gathered at a time in the gradient of the weights."""


def sparse_read(weights_TK: Tensor, table_RV: Tensor, row_ids_TK: Tensor) -> Tensor:
    """Sum `weights * table[row_ids]` over the reads of each token, skipping negative row ids.

    Costs what its hits cost: no (tokens, reads, value_dim) tensor exists at any time, and a token
    that hits nothing gets an exact zero.

    Args:
        weights_TK: Read weights, shape (tokens, reads).
        table_RV: Rows, shape (rows, value_dim).
        row_ids_TK: Row per read, shape (tokens, reads), int64; negative where there is none.

    Returns:
        Shape (tokens, value_dim). Gradients flow to `weights_TK` and `table_RV`.
    """
    return _SparseRead.apply(weights_TK, table_RV, row_ids_TK)  # type: ignore[no-untyped-call,no-any-return]


class _SparseRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, table_RV: Tensor, row_ids_TK: Tensor) -> Tensor:
        hit_TK = row_ids_TK >= 0
        tokens_M = hit_TK.nonzero()[:, 0]
        rows_M = row_ids_TK[hit_TK]
        ctx.save_for_backward(weights_TK, table_RV, hit_TK, tokens_M, rows_M)
        return _bag(table_RV, rows_M, weights_TK[hit_TK], tokens_M, weights_TK.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_TV,) = grads
        weights_TK, table_RV, hit_TK, tokens_M, rows_M = ctx.saved_tensors
        grad_weights = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_weights = torch.zeros_like(weights_TK)
            # In parts, so that no (reads, value_dim) tensor is held at once.
            parts = zip(tokens_M.split(CHUNK), rows_M.split(CHUNK), strict=True)
            products = [(grad_TV[tokens] * table_RV[rows]).sum(-1) for tokens, rows in parts]
            grad_weights[hit_TK] = torch.cat(products).to(weights_TK.dtype)
        if ctx.needs_input_grad[1]:
            # The same sum the other way round: a row gathers the gradients of the tokens that read it.
            order_M = rows_M.argsort(stable=True)
            weights_M = weights_TK[hit_TK][order_M]
            grad_table = _bag(grad_TV, tokens_M[order_M], weights_M, rows_M[order_M], table_RV.shape[0])
        return grad_weights, grad_table, None


def _bag(table: Tensor, rows_M: Tensor, weights_M: Tensor, bags_M: Tensor, num_bags: int) -> Tensor:
    """Sum weighted rows into bags; `bags_M` is sorted, and a bag without rows is zero."""
    if rows_M.numel() == 0:
        return table.new_zeros(num_bags, table.shape[1])
    bag_ids = torch.arange(num_bags, device=bags_M.device)
    offsets = torch.searchsorted(bags_M.contiguous(), bag_ids)
    weights_M = weights_M.to(table.dtype)
    return embedding_bag(rows_M, table, offsets, mode="sum", per_sample_weights=weights_M)
