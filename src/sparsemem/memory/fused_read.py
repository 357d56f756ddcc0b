"""The sparse read as Triton kernels: nothing between the table and the answer is ever written to memory.

Shape letters: T tokens, K reads per token (all heads together), V value dim, R rows of a table.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

READS, VALUES = 16, 128
"""Reads and columns that one program handles at a time."""


class FusedRead(torch.autograd.Function):
    """`sparse_read`, to which see. Nothing in it waits for the device."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, table_RV: Tensor, row_ids_TK: Tensor) -> Tensor:
        """Return the sums, shape (tokens, value_dim)."""
        weights_TK, table_RV, row_ids_TK = (t.contiguous() for t in (weights_TK, table_RV, row_ids_TK))
        ctx.save_for_backward(weights_TK, table_RV, row_ids_TK)
        (num_tokens, num_reads), value_dim = weights_TK.shape, table_RV.shape[1]
        sums_TV = table_RV.new_empty(num_tokens, value_dim)
        grid = num_tokens, triton.cdiv(value_dim, VALUES)
        _launch(_sum_rows, grid, sums_TV, weights_TK, table_RV, row_ids_TK, num_reads, value_dim)
        return sums_TV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the weights and of the table."""
        weights_TK, table_RV, row_ids_TK = ctx.saved_tensors
        grad_TV = grads[0].contiguous()
        (num_tokens, num_reads), (num_rows, value_dim) = weights_TK.shape, table_RV.shape
        grad_weights = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_weights = torch.zeros_like(weights_TK)
            grid = num_tokens, triton.cdiv(num_reads, READS)
            _launch(_dot_rows, grid, grad_weights, grad_TV, table_RV, row_ids_TK, num_reads, value_dim)
        if ctx.needs_input_grad[1]:
            # The same sum the other way round: a row gathers the gradients of the tokens that read it, always
            # in one order, so that a step repeats to the bit.
            ids_N, order_N = row_ids_TK.flatten().sort(stable=True)
            ends = torch.searchsorted(ids_N, torch.arange(num_rows + 1, device=ids_N.device))
            grad_table = torch.zeros_like(table_RV)
            grid = num_rows, triton.cdiv(value_dim, VALUES)
            _launch(_sum_tokens, grid, grad_table, weights_TK, grad_TV, order_N, ends, num_reads, value_dim)
        return grad_weights, grad_table, None


def _launch(kernel: Any, grid: tuple[int, int], result: Tensor, *arguments: Any) -> None:
    """Let a kernel fill its result, on the device where that lies and not on the current one."""
    if result.numel():
        with torch.cuda.device(result.device) if result.is_cuda else contextlib.nullcontext():
            kernel[grid](result, *arguments, READS, VALUES)


@triton.jit
def _sum_rows(sums, weights, table, row_ids, num_reads, value_dim, READS: tl.constexpr, VALUES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    total = tl.zeros((VALUES,), dtype=tl.float32)
    for start in range(0, num_reads, READS):
        reads = start + tl.arange(0, READS)
        rows = tl.load(row_ids + token * num_reads + reads, mask=reads < num_reads, other=-1)
        weight = tl.load(weights + token * num_reads + reads, mask=rows >= 0, other=0.0)
        inside = (rows >= 0)[:, None] & (columns < value_dim)[None, :]
        values = tl.load(table + rows[:, None] * value_dim + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(values * weight[:, None], axis=0)
    tl.store(sums + token * value_dim + columns, total, mask=columns < value_dim)


@triton.jit
def _dot_rows(dots, grads, table, row_ids, num_reads, value_dim, READS: tl.constexpr, VALUES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    reads = tl.program_id(1) * READS + tl.arange(0, READS)
    rows = tl.load(row_ids + token * num_reads + reads, mask=reads < num_reads, other=-1)
    total = tl.zeros((READS,), dtype=tl.float32)
    for start in range(0, value_dim, VALUES):
        columns = start + tl.arange(0, VALUES)
        inside = (rows >= 0)[:, None] & (columns < value_dim)[None, :]
        values = tl.load(table + rows[:, None] * value_dim + columns[None, :], mask=inside, other=0.0)
        grad = tl.load(grads + token * value_dim + columns, mask=columns < value_dim, other=0.0)
        total += tl.sum(values * grad[None, :], axis=1)
    tl.store(dots + token * num_reads + reads, total, mask=reads < num_reads)


@triton.jit
def _sum_tokens(
    sums, weights, grads, order, ends, num_reads, value_dim, READS: tl.constexpr, VALUES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    first, end = tl.load(ends + row), tl.load(ends + row + 1)
    total = tl.zeros((VALUES,), dtype=tl.float32)
    for start in range(first, end, READS):
        places = start + tl.arange(0, READS)
        reads = tl.load(order + places, mask=places < end, other=0)
        weight = tl.load(weights + reads, mask=places < end, other=0.0)
        inside = (places < end)[:, None] & (columns < value_dim)[None, :]
        values = tl.load(
            grads + (reads // num_reads)[:, None] * value_dim + columns[None, :], mask=inside, other=0.0
        )
        total += tl.sum(values * weight[:, None], axis=0)
    tl.store(sums + row * value_dim + columns, total, mask=columns < value_dim)
