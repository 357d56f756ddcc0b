"""The sparse read: a weighted sum of the rows that are there, and its exact gradient.

Shape letters: T tokens, K reads per token (all heads together), V value dim, R rows of a table,
M reads that hit a row.
"""

import functools
import warnings
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
    On CUDA this is one Triton kernel each way, where Triton is installed (torch brings it along on Linux).
    """
    read: Any = fused_read(weights_TK.device) or PlainRead
    return read.apply(weights_TK, table_RV, row_ids_TK)  # type: ignore[no-any-return]


@functools.cache
def fused_read(device: torch.device) -> type[torch.autograd.Function] | None:
    """Return the read in Triton, where it runs on a device and finds there what the plain one does."""
    if device.type != "cuda":
        return None
    try:
        from sparsemem.memory.fused_read import FusedRead
    except ImportError:
        return None
    try:
        if is_same_read(FusedRead, device):
            return FusedRead
        problem: Any = "it gives other numbers"
    except Exception as error:  # whatever a compiler says about a device that it does not know
        problem = error
    warnings.warn(f"sparsemem reads without Triton on {device}, which is slower: {problem}", stacklevel=2)
    return None


def is_same_read(read: type[torch.autograd.Function], device: torch.device) -> bool:
    """Whether a read gives the sums and gradients of `PlainRead` for a small table."""
    generator = torch.Generator().manual_seed(0)
    # The first read may be one of a server, which computes no gradients; the answer is for all that follow.
    with torch.inference_mode(False), torch.enable_grad():
        row_ids_TK = torch.randint(-3, 5, (7, 20), generator=generator).to(device)
        shapes = (7, 20), (5, 130), (7, 130)
        weights_TK, table_RV, grad_TV = (
            torch.randn(shape, generator=generator).to(device) for shape in shapes
        )
        inputs = weights_TK.requires_grad_(), table_RV.requires_grad_()

        def found(cls: Any) -> tuple[Tensor, ...]:
            sums_TV = cls.apply(*inputs, row_ids_TK)
            return sums_TV, *torch.autograd.grad(sums_TV, inputs, grad_TV)

        pairs = [*zip(found(read), found(PlainRead), strict=True)]
    return all(torch.allclose(own, plain, rtol=1e-4, atol=1e-4) for own, plain in pairs)


class PlainRead(torch.autograd.Function):
    """`sparse_read` in operations of torch, for every device; what other ways to do it are held against."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, table_RV: Tensor, row_ids_TK: Tensor) -> Tensor:
        """Return the sums, shape (tokens, value_dim)."""
        hit_TK = row_ids_TK >= 0
        tokens_M = hit_TK.nonzero()[:, 0]
        rows_M = row_ids_TK[hit_TK]
        ctx.save_for_backward(weights_TK, table_RV, hit_TK, tokens_M, rows_M)
        return _bag(table_RV, rows_M, weights_TK[hit_TK], tokens_M, weights_TK.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the weights and of the table."""
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
