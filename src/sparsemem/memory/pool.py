"""The pool: a copy-on-write table of value rows.

Shape letters: T tokens, K reads per token, S slots, V value dim, R overlay rows, A active rows.

A slot's row is looked for in three places: among the `active` rows that are being trained, in the
overlay of rows that were ever written, and in the base table that never is (zeros when absent). One
int32 per slot says where: -1 base, r >= 0 overlay row r, r <= -2 active row -2 - r.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem.errors import ConfigError, PoolMismatchError
from sparsemem.memory.read import sparse_read

IN_BASE = -1
"""`slot_to_row` of a slot that was never written."""
FIRST_ACTIVE = -2
"""`slot_to_row` of the first active row; the next is one less."""


class Pool(nn.Module):
    """A table of `num_slots` rows of which only the written ones take memory.

    Args:
        num_slots: Rows a reader can address.
        value_dim: Width of a row.
        base: Read-only values behind the overlay, shape (num_slots, value_dim), for example a
            memory-mapped safetensors table; None means zeros and costs nothing.

    Raises:
        ConfigError: `base` has another shape.
    """

    slot_to_row: Tensor
    rows: Tensor
    row_slot_ids: Tensor

    def __init__(self, num_slots: int, value_dim: int, base: Tensor | None = None) -> None:
        super().__init__()
        if base is not None and base.shape != (num_slots, value_dim):
            raise ConfigError(
                f"base has shape {tuple(base.shape)}, but the pool is ({num_slots}, {value_dim}); "
                "pass a table of that shape or none"
            )
        self.num_slots = num_slots
        self.value_dim = value_dim
        # In a list, so that `model.to(...)` leaves a memory-mapped table alone and no state dict
        # holds it: it is a file of its own.
        self._base = [base]
        # Not in the state dict either, since it follows from the slot ids.
        self.register_buffer(
            "slot_to_row", torch.full((num_slots,), IN_BASE, dtype=torch.int32), persistent=False
        )
        self.register_buffer("rows", torch.zeros(0, value_dim))
        self.register_buffer("row_slot_ids", torch.zeros(0, dtype=torch.int64))
        self.active: nn.Parameter | None = None
        self.active_ids: Tensor | None = None
        self._places_before: Tensor | None = None

    @property
    def base(self) -> Tensor | None:
        """The table that is never written, or None for zeros."""
        return self._base[0]

    @property
    def num_rows(self) -> int:
        """Overlay rows, which is what the pool's memory grows with."""
        return self.rows.shape[0]

    def read(self, slot_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum the weighted rows of each token.

        Args:
            slot_ids_TK: Slots to read, shape (tokens, reads), int64.
            weights_TK: Their weights, same shape.

        Returns:
            Shape (tokens, value_dim), float32. Gradients flow to the weights and the active rows.
        """
        places_TK = self.slot_to_row[slot_ids_TK].long()
        values = sparse_read(weights_TK, self.rows, places_TK)
        if self.active is not None:
            values = values + sparse_read(weights_TK, self.active, FIRST_ACTIVE - places_TK)
        if self.base is not None:
            base_ids_TK = torch.where(places_TK == IN_BASE, slot_ids_TK, -1)
            values = values + sparse_read(weights_TK, *self._base_table(base_ids_TK))
        return values

    def holds(self, slot_ids: Tensor) -> Tensor:
        """Tell which slots have a row, in the base table or since; bool, in the shape of `slot_ids`."""
        if self.base is not None:
            return torch.ones_like(slot_ids, dtype=torch.bool)
        return self.slot_to_row[slot_ids] != IN_BASE

    def is_empty(self) -> bool:
        """Whether every read is zero, so that a layer may skip it altogether."""
        return self.num_rows == 0 and self.active is None and self.base is None

    @torch.no_grad()
    def current(self, slot_ids: Tensor) -> Tensor:
        """Copy the rows of some slots, wherever they live; shape (slots, value_dim)."""
        self._check_ids(slot_ids)
        slot_ids = slot_ids.to(self.slot_to_row.device)
        places = self.slot_to_row[slot_ids].long()
        values = self._base_rows(slot_ids)
        values[places >= 0] = self.rows[places[places >= 0]]
        if self.active is not None:
            in_active = places <= FIRST_ACTIVE
            values[in_active] = self.active[FIRST_ACTIVE - places[in_active]].to(values.dtype)
        return values

    def written(self) -> tuple[Tensor, Tensor]:
        """Copy all rows that differ from the base, active ones too: slot ids (rows,) and rows."""
        slot_ids = self.row_slot_ids
        if self.active_ids is not None:
            slot_ids = torch.cat([slot_ids, self.active_ids]).unique()
        return slot_ids.clone(), self.current(slot_ids)

    @torch.no_grad()
    def write(self, slot_ids: Tensor, values: Tensor) -> None:
        """Set rows in the overlay; a row that equals its base row bit for bit is dropped from it.

        So the overlay always holds exactly the rows that differ from the base, whatever the order
        of writes that led there, and undoing an update gives its memory back.

        Args:
            slot_ids: Distinct slots, shape (slots,), none of them active.
            values: Their new rows, shape (slots, value_dim).
        """
        self._check_ids(slot_ids)
        assert values.shape == (len(slot_ids), self.value_dim), values.shape
        slot_ids, values = slot_ids.to(self.slot_to_row.device), values.to(self.rows)
        places = self.slot_to_row[slot_ids].long()
        assert (places >= IN_BASE).all(), "an active row is written by training only"
        known = places >= 0
        self.rows[places[known]] = values[known]
        if not known.all():
            first, new_ids = self.num_rows, slot_ids[~known]
            self.rows = _appended(self.rows, values[~known])
            self.row_slot_ids = _appended(self.row_slot_ids, new_ids)
            self.slot_to_row[new_ids] = torch.arange(first, self.num_rows, dtype=torch.int32).to(
                new_ids.device
            )
        base = self._base_rows(slot_ids)
        # Compared as integers: -0.0 == 0.0, but they are not the same bits.
        reset = (values.view(torch.int32) == base.view(torch.int32)).all(dim=1)
        if reset.any():
            self._keep(~torch.isin(self.row_slot_ids, slot_ids[reset]))

    @contextlib.contextmanager
    def overwritten(self, slot_ids: Tensor, values: Tensor) -> Iterator[None]:
        """Within this context some slots hold other rows; arguments as in `write`.

        Afterwards every tensor of the pool is the very one it was, so nothing needs to be undone.
        """
        before = self.rows, self.row_slot_ids, self.slot_to_row
        self.rows, self.row_slot_ids, self.slot_to_row = (tensor.clone() for tensor in before)
        try:
            self.write(slot_ids, values)
            yield
        finally:
            self.rows, self.row_slot_ids, self.slot_to_row = before

    @torch.no_grad()
    def activate(self, slot_ids: Tensor) -> nn.Parameter:
        """Make some rows a trainable parameter that starts from their current values.

        Rows that were active before are written to the overlay first.

        Args:
            slot_ids: Distinct slots, shape (slots,), int64.

        Returns:
            The `active` parameter, shape (slots, value_dim): give it to any optimizer.

        Raises:
            PoolMismatchError: A slot lies outside the pool.
        """
        self._check_ids(slot_ids)
        self.deactivate()
        values = self.current(slot_ids)
        self.active_ids = slot_ids.to(self.slot_to_row.device)
        self.active = nn.Parameter(values)
        places = FIRST_ACTIVE - torch.arange(len(slot_ids), device=self.slot_to_row.device)
        self._places_before = self.slot_to_row[self.active_ids]
        self.slot_to_row[self.active_ids] = places.to(torch.int32)
        return self.active

    @torch.no_grad()
    def deactivate(self) -> None:
        """Write the active rows to the overlay and end their training."""
        if self.active is None or self.active_ids is None or self._places_before is None:
            return
        ids, values = self.active_ids, self.active.detach()
        self.slot_to_row[ids] = self._places_before
        self.active = self.active_ids = self._places_before = None
        self.write(ids, values)

    def _keep(self, kept: Tensor) -> None:
        self.slot_to_row[self.row_slot_ids[~kept]] = IN_BASE
        self.rows, self.row_slot_ids = self.rows[kept], self.row_slot_ids[kept]
        order = torch.arange(self.num_rows, dtype=torch.int32, device=self.slot_to_row.device)
        self.slot_to_row[self.row_slot_ids] = order

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Pool":
        # `model.to(torch.bfloat16)` must not round what was learned: rows move, but stay float32.
        rows, device_before = self.rows, self.rows.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rows = rows.to(self.rows.device)
        if (
            self.rows.device != device_before
            and self.active_ids is not None
            and self._places_before is not None
        ):
            self.active_ids = self.active_ids.to(self.rows.device)
            self._places_before = self._places_before.to(self.rows.device)
        return self

    def _base_rows(self, slot_ids: Tensor) -> Tensor:
        """Copy the rows of some slots as they were before anything was written."""
        zeros = self.rows.new_zeros(len(slot_ids), self.value_dim)
        return zeros if self.base is None else self.base[slot_ids.to(self.base.device)].to(zeros)

    def _base_table(self, base_ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return base rows on the pool's device, and the ids of the reads among them.

        A base that lies elsewhere (a memory-mapped file behind a model on a GPU) sends over the rows
        that are hit, not the table.
        """
        assert self.base is not None
        if self.base.device == base_ids_TK.device:
            return self.base, base_ids_TK
        needed = base_ids_TK[base_ids_TK >= 0].unique()
        table = self.base[needed.to(self.base.device)].to(base_ids_TK.device)
        return table, torch.where(base_ids_TK >= 0, torch.searchsorted(needed, base_ids_TK), -1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The number of rows is part of the content, so they are written rather than copied over.
        rows = state_dict.pop(prefix + "rows", None)
        slot_ids = state_dict.pop(prefix + "row_slot_ids", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing_keys: list[str] = rest[2]
        if rows is not None and slot_ids is not None:
            missing_keys[:] = [k for k in missing_keys if k not in (prefix + "rows", prefix + "row_slot_ids")]
            self.deactivate()
            self._keep(torch.zeros_like(self.row_slot_ids, dtype=torch.bool))
            self.write(slot_ids, rows)

    def _check_ids(self, slot_ids: Tensor) -> None:
        outside = slot_ids[(slot_ids < 0) | (slot_ids >= self.num_slots)]
        if len(outside):
            raise PoolMismatchError(
                f"slot {int(outside[0])} lies outside this pool of {self.num_slots} slots; "
                "the delta or usage was made for another pool"
            )


def _appended(tensor: Tensor, more: Tensor) -> Tensor:
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
