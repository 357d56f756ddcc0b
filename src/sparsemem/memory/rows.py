"""Tables of rows, compared bit for bit: -0.0 == 0.0, but they are not the same row."""

import torch
from torch import Tensor

NOWHERE = -1
"""Place of a row that a table does not have."""


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find the rows that differ in a bit, in the order they come, and which of them each row is.

    Args:
        rows: Shape (rows, width), float32.

    Returns:
        Shapes (distinct rows, width) and (rows,), int64.
    """
    hashes, place = _hashes(rows).unique(return_inverse=True)
    numbers = torch.arange(len(rows), device=rows.device)
    if len(hashes) == len(rows):
        return rows, numbers
    first = torch.full_like(hashes, len(rows)).scatter_reduce_(0, place, numbers, "amin")
    first, order = first.sort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=rows.device)
    if _equal(rows, rows[first][rank[place]]).all():
        return rows[first], rank[place]
    # Two rows have one hash: as good as never, but then it has to be right.
    numbers_of: dict[bytes, int] = {}
    index = [numbers_of.setdefault(row.tobytes(), len(numbers_of)) for row in rows.cpu().numpy()]
    first_of = {number: place for place, number in reversed([*enumerate(index)])}
    return rows[[first_of[number] for number in range(len(first_of))]], torch.tensor(index).to(rows.device)


def places_in(table: Tensor, rows: Tensor) -> Tensor:
    """Find each row in a table of distinct ones; shape (rows,), int64, NOWHERE where it is not there."""
    places = torch.full((len(rows),), NOWHERE, device=rows.device)
    if len(table) and len(rows):
        hashes, order = _hashes(table).sort()
        found = order[torch.searchsorted(hashes, _hashes(rows)).clamp(max=len(table) - 1)]
        is_same = _equal(table[found], rows)
        places[is_same] = found[is_same]
    return places


def order_of(rows: Tensor) -> Tensor:
    """Return the places of rows in an order that only their bits decide, shape (rows,)."""
    return _hashes(rows).argsort()


def same_bits(some: Tensor, other: Tensor) -> bool:
    """Whether all rows are the same as their counterparts."""
    return torch.equal(some.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


def appended(tensor: Tensor, more: Tensor) -> Tensor:
    """Append to a tensor that is the whole beginning of its own storage.

    What is returned keeps room for half as much again, which the next call fills: else each update would
    copy all that was ever learned.
    """
    num, wanted = len(tensor), len(tensor) + len(more)
    of_one = more[0].numel()
    if tensor.untyped_storage().nbytes() < wanted * of_one * tensor.element_size():
        room = tensor.new_empty(max(wanted, num * 3 // 2), *tensor.shape[1:])
        room[:num] = tensor
        tensor = room
    longer = tensor.as_strided((wanted, *tensor.shape[1:]), tensor.stride(), 0)
    longer[num:] = more
    return longer


def _hashes(rows: Tensor) -> Tensor:
    """Hash the bits of each row; shape (rows,), int64."""
    # Two numbers at a time, where their number is even.
    bits = rows.view(torch.int64) if rows.shape[1] % 2 == 0 else rows.view(torch.int32).long()
    odd = 2 * torch.arange(bits.shape[1], device=rows.device) + 1
    factors = (odd * 0x9E3779B97F4A7C1) ^ (odd << 29) | 1
    return (bits * factors).sum(dim=1)


def _equal(some: Tensor, other: Tensor) -> Tensor:
    """Compare row with row; bool, shape (rows,)."""
    return (some.view(torch.int32) == other.view(torch.int32)).all(dim=1)
