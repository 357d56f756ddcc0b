"""The pool: a copy-on-write table of value rows.

Shape letters: T tokens, K reads per token, S slots, V value dim, R overlay rows, A active rows.

A slot's row is looked for in three places: among the `active` rows that are being trained, in the
overlay of rows that were ever written, and in the base table that never is (zeros when absent). One
int32 per slot says where: -1 base, r >= 0 overlay row r, r <= -2 active row -2 - r. Many slots may hold
one row, which then takes the memory of one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsemem.errors import ConfigError, PoolMismatchError
from sparsemem.memory.read import sparse_read
from sparsemem.memory.rows import NOWHERE, appended, distinct, order_of, places_in

IN_BASE = -1
"""`slot_to_row` of a slot that was never written."""
FIRST_ACTIVE = -2
"""`slot_to_row` of the first active row; the next is one less."""
NOTHING = IN_BASE
"""Group of a slot that was never written."""


class Selection(NamedTuple):
    """The slots that are being trained.

    Args:
        slot_ids: Shape (slots,), int64.
        row_of: Active row of each, same shape.
        tags: The number each active row goes by, which outlives the selection; shape (active rows,).
        holders: How many slots hold each active row, same shape.
    """

    slot_ids: Tensor
    row_of: Tensor
    tags: Tensor
    holders: Tensor


class Pool(nn.Module):
    """A table of `num_slots` rows of which only the written ones take memory.

    Args:
        num_slots: Rows a reader can address.
        value_dim: Width of a row.
        base: Read-only values behind the overlay, shape (num_slots, value_dim), for example a
            memory-mapped safetensors table; None means zeros and costs nothing.
        has_names: Whether the first number of a row is its name, from 1 on, which several rows may have.

    Raises:
        ConfigError: `base` has another shape.
    """

    slot_to_row: Tensor
    rows: Tensor
    holders: Tensor

    def __init__(
        self, num_slots: int, value_dim: int, base: Tensor | None = None, has_names: bool = False
    ) -> None:
        super().__init__()
        self.has_names = has_names
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
        # A state dict has the written slots in place of these: see `_save_to_state_dict`.
        self.register_buffer(
            "slot_to_row", torch.full((num_slots,), IN_BASE, dtype=torch.int32), persistent=False
        )
        self.register_buffer("rows", torch.zeros(0, value_dim), persistent=False)
        self.register_buffer("holders", torch.zeros(0, dtype=torch.int32), persistent=False)
        self.active: nn.Parameter | None = None
        self.selection: Selection | None = None

    @property
    def base(self) -> Tensor | None:
        """The table that is never written, or None for zeros."""
        return self._base[0]

    @property
    def num_rows(self) -> int:
        """Overlay rows, which is what the pool's memory grows with."""
        return int((self.holders > 0).sum())

    @property
    def written_ids(self) -> Tensor:
        """Slots that hold another row than the base, ascending; active ones too."""
        return (self.slot_to_row != IN_BASE).nonzero().squeeze(1)

    def is_written(self, slot_ids: Tensor) -> Tensor:
        """Tell which slots hold another row than the base; bool, in the shape of `slot_ids`."""
        return self.slot_to_row[slot_ids] != IN_BASE

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

    def groups(self, slot_ids: Tensor) -> Tensor:
        """Tell what each slot speaks for, in the shape of `slot_ids`; equal numbers speak for the same.

        Slots that hold one row do, and so do all slots that share theirs with no other. A slot that was
        never written speaks for NOTHING.
        """
        places = self.slot_to_row[slot_ids].long()
        if self.has_names:
            return self._names(places)
        alone = torch.zeros_like(places, dtype=torch.bool)
        if len(self.holders):
            alone |= (places >= 0) & (self.holders[places.clamp(min=0)] == 1)
        if self.selection is not None and len(self.selection.holders):
            rows = (FIRST_ACTIVE - places).clamp(min=0)
            alone |= (places <= FIRST_ACTIVE) & (self.selection.holders[rows] == 1)
        return torch.where(alone, self.num_slots, places)

    def _names(self, places: Tensor) -> Tensor:
        nothing = self.rows.new_full((1, 1), NOTHING)
        tables = [table for table in (self.rows, self.active, nothing) if table is not None]
        names = torch.cat([table.detach()[:, 0] for table in tables])
        of_active = torch.where(places == IN_BASE, -1, len(self.rows) + FIRST_ACTIVE - places)
        return names[torch.where(places >= 0, places, of_active)].long()

    def rows_named(self, names_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of some names, and which of these each has; gradients flow to the active ones.

        They come in one order wherever they lie, so that a sum over them has the same bits.
        """
        tables = [table for table in (self.rows, self.active) if table is not None]
        found = [(table.detach()[:, :1] == names_N).nonzero(as_tuple=True) for table in tables]
        rows = torch.cat([table[row_ids] for table, (row_ids, _) in zip(tables, found, strict=True)])
        order = order_of(rows.detach())
        return rows[order], torch.cat([number for _, number in found])[order]

    def is_empty(self) -> bool:
        """Whether every read is zero, so that a layer may skip it altogether."""
        return len(self.rows) == 0 and self.active is None and self.base is None

    def can_hold(self, num_slots: int, value_dim: int) -> bool:
        """Whether what was written to a pool of some size fits in: to this one before it grew, say."""
        return num_slots <= self.num_slots and value_dim == self.value_dim

    def grow(self, num_slots: int) -> None:
        """Add slots behind the others; all rows stay where they are.

        Raises:
            ConfigError: There is a base table, which has no rows for them, or `num_slots` is smaller.
        """
        if self.base is not None or num_slots < self.num_slots:
            raise ConfigError(
                f"a pool of {self.num_slots} slots {'with a base table ' if self.base is not None else ''}"
                f"cannot have {num_slots}; grow one without a table, to a larger number"
            )
        more = self.slot_to_row.new_full((num_slots - self.num_slots,), IN_BASE)
        self.slot_to_row = torch.cat([self.slot_to_row, more])
        self.num_slots = num_slots

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
        """Copy all rows that differ from the base, active ones too: slot ids (slots,) and their rows."""
        slot_ids = self.written_ids
        return slot_ids, self.current(slot_ids)

    @torch.no_grad()
    def write(self, slot_ids: Tensor, values: Tensor, index: Tensor | None = None) -> None:
        """Set rows in the overlay; a slot whose row equals its base row bit for bit leaves it.

        So the overlay always holds exactly the rows that differ from the base, each of them once, whatever
        the order of writes that led there, and undoing an update gives its memory back.

        Args:
            slot_ids: Distinct slots, shape (slots,), none of them active.
            values: Rows, shape (rows, value_dim).
            index: Which of them each slot gets, shape (slots,), int64; by default there is one for each.
        """
        self._check_ids(slot_ids)
        index = torch.arange(len(slot_ids)) if index is None else index
        device = self.slot_to_row.device
        slot_ids, index, values = slot_ids.to(device), index.to(device), values.to(self.rows).contiguous()
        assert values.shape[1:] == (self.value_dim,), values.shape
        assert (self.slot_to_row[slot_ids] >= IN_BASE).all(), "an active row is written by training only"
        values, same = distinct(values)
        self._put(slot_ids, values, same[index], places_in(self.rows, values))

    @contextlib.contextmanager
    def overwritten(self, slot_ids: Tensor, values: Tensor) -> Iterator[None]:
        """Within this context some slots hold other rows; arguments as in `write`.

        Afterwards every tensor of the pool is the very one it was, so nothing needs to be undone.
        """
        before = self.rows, self.holders, self.slot_to_row
        self.rows, self.holders, self.slot_to_row = (tensor.clone() for tensor in before)
        try:
            self.write(slot_ids, values)
            yield
        finally:
            self.rows, self.holders, self.slot_to_row = before

    @torch.no_grad()
    def activate(self, slot_ids: Tensor, tags: Tensor | None = None) -> nn.Parameter:
        """Make some rows a trainable parameter that starts from their current values.

        Rows that were active before are written to the overlay first.

        Args:
            slot_ids: Distinct slots, shape (slots,), int64.
            tags: A number for each of them: slots of one number will share a row, which starts as the one
                of the first of them that was written. By default each has a row of its own, and its id
                for a number.

        Returns:
            The `active` parameter, a row for each number, which ascend (or for each slot, in their order):
            give it to any optimizer.

        Raises:
            PoolMismatchError: A slot lies outside the pool.
        """
        self._check_ids(slot_ids)
        self.deactivate()
        slot_ids = slot_ids.to(self.slot_to_row.device)
        index = torch.arange(len(slot_ids), device=slot_ids.device)
        first, kinds = index, slot_ids
        if tags is not None:
            kinds, index = tags.to(slot_ids.device).unique(return_inverse=True)
            # Stable, so that within a number the order stays, and written slots come before others.
            is_unwritten = (self.slot_to_row[slot_ids] == IN_BASE).long()
            order = (2 * index + is_unwritten).argsort(stable=True)
            first = order[torch.searchsorted(index[order].contiguous(), torch.arange(len(kinds)).to(index))]
        self.active = nn.Parameter(self.current(slot_ids[first]))
        self.selection = Selection(slot_ids, index, kinds, torch.bincount(index, minlength=len(kinds)))
        self._release(slot_ids)
        self.slot_to_row[slot_ids] = (FIRST_ACTIVE - index).int()
        return self.active

    @torch.no_grad()
    def deactivate(self) -> None:
        """Write the active rows to the overlay and end their training."""
        if self.active is None or self.selection is None:
            return
        selection, values = self.selection, self.active.detach()
        self.active = self.selection = None
        self.slot_to_row[selection.slot_ids] = IN_BASE
        # What was trained is like no other row, and need not be looked for among them in each step.
        self._put(selection.slot_ids, values, selection.row_of, None)

    def _put(self, slot_ids: Tensor, values: Tensor, index: Tensor, places: Tensor | None) -> None:
        """Give slots new rows; `places` says where the overlay has them already, if it may."""
        if places is None:
            places = torch.full((len(values),), NOWHERE, device=values.device)
        self._release(slot_ids)
        # Compared as integers: -0.0 == 0.0, but they are not the same bits.
        bits = values.view(torch.int32)
        if self.base is None:
            kept = bits.any(dim=1)[index]
        else:
            kept = (bits[index] != self._base_rows(slot_ids).view(torch.int32)).any(dim=1)
        slot_ids, index = slot_ids[kept], index[kept]
        holders = torch.bincount(index, minlength=len(values)).int()
        is_there, is_new = places >= 0, (places < 0) & (holders > 0)
        self.holders.index_add_(0, places[is_there], holders[is_there])
        places = places.int()
        places[is_new] = self._add(values[is_new], holders[is_new])
        self.slot_to_row[slot_ids] = places[index]
        self._compact()

    def _release(self, slot_ids: Tensor) -> None:
        """Let go of the rows of some slots; one that nobody holds any more is free for another."""
        places = self.slot_to_row[slot_ids].long()
        self.holders.index_add_(0, places[places >= 0], torch.full_like(places[places >= 0], -1).int())
        self.slot_to_row[slot_ids] = IN_BASE

    def _add(self, rows: Tensor, holders: Tensor) -> Tensor:
        """Put rows where there is room, and return where; shape (rows,), int32."""
        free = (self.holders == 0).nonzero().squeeze(1)[: len(rows)]
        self.rows[free], self.holders[free] = rows[: len(free)], holders[: len(free)]
        more = torch.arange(len(self.rows), len(self.rows) + len(rows) - len(free), device=free.device)
        if len(more):
            self.rows = appended(self.rows, rows[len(free) :])
            self.holders = appended(self.holders, holders[len(free) :])
        return torch.cat([free, more]).int()

    def _compact(self) -> None:
        """Move the last rows to where rows are free, and cut off the end."""
        num = self.num_rows
        if num == len(self.rows):
            return
        free = (self.holders[:num] == 0).nonzero().squeeze(1)
        moved = num + (self.holders[num:] > 0).nonzero().squeeze(1)
        new_place = torch.full_like(self.holders, IN_BASE)
        new_place[moved] = free.int()
        slots = (self.slot_to_row >= num).nonzero().squeeze(1)
        self.slot_to_row[slots] = new_place[self.slot_to_row[slots].long()]
        self.rows[free], self.holders[free] = self.rows[moved], self.holders[moved]
        self.rows, self.holders = self.rows[:num].clone(), self.holders[:num].clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Pool":
        # `model.to(torch.bfloat16)` must not round what was learned: rows move, but stay float32.
        rows, device_before = self.rows, self.rows.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rows = rows.to(self.rows.device)
        if self.rows.device != device_before and self.selection is not None:
            self.selection = Selection(*(tensor.to(self.rows.device) for tensor in self.selection))
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        slot_ids = (self.slot_to_row >= 0).nonzero().squeeze(1)
        destination[prefix + "rows"] = self.rows
        destination[prefix + "slot_ids"] = slot_ids
        destination[prefix + "slot_rows"] = self.slot_to_row[slot_ids].long()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The number of rows is part of the content, so they are written rather than copied over.
        written = [state_dict.pop(prefix + name, None) for name in ("slot_ids", "rows", "slot_rows")]
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(tensor is None for tensor in written):
            missing_keys: list[str] = rest[2]
            missing_keys.append(prefix + "rows")
            return
        self.deactivate()
        self._release(self.written_ids)
        self._compact()
        self.write(*written)

    def _check_ids(self, slot_ids: Tensor) -> None:
        outside = slot_ids[(slot_ids < 0) | (slot_ids >= self.num_slots)]
        if len(outside):
            raise PoolMismatchError(
                f"slot {int(outside[0])} lies outside this pool of {self.num_slots} slots; "
                "the delta or usage was made for another pool"
            )
