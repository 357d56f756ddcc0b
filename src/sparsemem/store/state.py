"""The rows of a version: what a chain of commits has written, and what stood there before any of them."""

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparsemem.errors import PoolMismatchError
from sparsemem.memory.delta import RowChange, SparseDelta
from sparsemem.memory.pool import Pool
from sparsemem.memory.rows import distinct, same_bits
from sparsemem.store.objects import AS_BEFORE, Stored, StoredRows


@dataclasses.dataclass(frozen=True)
class Table:
    """Distinct rows, shape (rows, value_dim), and which of them each slot has, shape (slots,)."""

    rows: Tensor
    index: Tensor

    def take(self, places: Tensor) -> Tensor:
        """Return the rows of some slots."""
        return self.rows[self.index[places]]


@dataclasses.dataclass(frozen=True)
class PoolState:
    """Slots of one pool that a version has written at some time.

    Args:
        slot_ids: Ascending, shape (slots,), int64.
        now: Their rows.
        attached: Their rows when the memory was attached.
        num_slots: Slots of the pool.
    """

    slot_ids: Tensor
    now: Table
    attached: Table
    num_slots: int

    def find(self, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place of each slot here, and whether it has one."""
        places = torch.searchsorted(self.slot_ids, slot_ids).clamp(max=max(0, len(self.slot_ids) - 1))
        known = self.slot_ids[places] == slot_ids if len(self.slot_ids) else slot_ids < 0
        return places, known


State = Mapping[str, PoolState]
"""By pool; a pool that is missing is as it was attached."""


def replay(commits: Iterable[Stored]) -> dict[str, PoolState]:
    """Put together what commits wrote, the oldest first: of each slot the last row counts."""
    by_pool: dict[str, list[StoredRows]] = {}
    for stored in commits:
        for name, rows in stored.items():
            by_pool.setdefault(name, []).append(rows)
    return {name: _replayed(parts) for name, parts in by_pool.items()}


def as_stored(state: State) -> dict[str, StoredRows]:
    """Turn a version into one change of the memory as attached."""
    return {
        name: StoredRows(
            pool.slot_ids,
            pool.now.rows,
            pool.now.index,
            pool.attached.rows,
            pool.attached.index,
            pool.num_slots,
        )
        for name, pool in state.items()
    }


def _replayed(parts: list[StoredRows]) -> PoolState:
    slot_ids = torch.cat([part.slot_ids for part in parts])
    # Stable, so that within a slot the order of commits stays.
    ordered, order = slot_ids.sort(stable=True)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    is_first = torch.ones_like(is_last)
    is_first[1:] = is_last[:-1]
    now = _gathered([part.after for part in parts], [part.after_index for part in parts], order[is_last])
    then = _gathered([part.before for part in parts], [part.before_index for part in parts], order[is_first])
    return PoolState(ordered[is_last], now, then, max(part.num_slots for part in parts))


def _gathered(tables: list[Tensor], indices: list[Tensor], chosen: Tensor) -> Table:
    """Take the rows of some slots of several commits, each distinct row once.

    Args:
        tables: Rows of each commit.
        indices: Which of them each of its slots has.
        chosen: Places of slots in all indices put together.
    """
    starts = torch.tensor([0, *map(len, tables)]).cumsum(0)
    table_of_slot = torch.arange(len(tables)).repeat_interleave(torch.tensor([*map(len, indices)]))[chosen]
    wanted, index = (torch.cat(indices)[chosen] + starts[table_of_slot]).unique(return_inverse=True)
    sizes = torch.searchsorted(wanted, starts).diff()
    wanted -= starts[:-1].repeat_interleave(sizes)
    # Table by table: of a long history most rows were written over, and are not worth a copy.
    parts = zip(tables, wanted.split(sizes.tolist()), strict=True)
    rows = [table[places] for table, places in parts if len(places)]
    return Table(torch.cat(rows or [tables[0][:0]]), index)


def stored(delta: SparseDelta, state: State) -> dict[str, StoredRows]:
    """Turn a delta into what is stored of it behind a version.

    Raises:
        PoolMismatchError: It does not start from the rows of that version.
    """
    result = {}
    for name, change in delta.changes.items():
        after, after_index = distinct(change.after)
        is_new = torch.ones_like(change.slot_ids, dtype=torch.bool)
        if name in state:
            places, known = state[name].find(change.slot_ids)
            if not same_bits(state[name].now.take(places[known]), change.before[known]):
                raise PoolMismatchError(
                    f"delta {delta.digest[:12]} starts from other rows of pool {name!r} than this version "
                    "has; learn again on top of it"
                )
            is_new = ~known
        before, index = distinct(change.before[is_new])
        before_index = torch.full_like(change.slot_ids, AS_BEFORE)
        before_index[is_new] = index
        result[name] = StoredRows(change.slot_ids, after, after_index, before, before_index, change.num_slots)
    return result


def recorded(rows: Stored, state: State) -> SparseDelta:
    """Turn what is stored of a commit back into its delta, on the version it was made on."""
    changes = {}
    for name, of_pool in rows.items():
        before = of_pool.before.new_zeros(len(of_pool.slot_ids), of_pool.after.shape[1])
        is_new = of_pool.before_index != AS_BEFORE
        before[is_new] = of_pool.before[of_pool.before_index[is_new]]
        if not is_new.all():
            places, _ = state[name].find(of_pool.slot_ids[~is_new])
            before[~is_new] = state[name].now.take(places)
        after = of_pool.after[of_pool.after_index]
        changes[name] = RowChange(of_pool.slot_ids, before, after, of_pool.num_slots)
    return SparseDelta(changes)


def difference(old: State, new: State) -> SparseDelta:
    """Return the delta that leads from one version to another: the rows that differ."""
    changes = {}
    for name in sorted({*old, *new}):
        pools = [state[name] for state in (old, new) if name in state]
        slot_ids = torch.cat([pool.slot_ids for pool in pools]).unique()
        before, after = (_rows(state.get(name), slot_ids, pools) for state in (old, new))
        moved = (before.view(torch.int32) != after.view(torch.int32)).any(dim=1)
        num_slots = max(pool.num_slots for pool in pools)
        if moved.any():
            changes[name] = RowChange(slot_ids[moved], before[moved], after[moved], num_slots)
    return SparseDelta(changes)


def _rows(state: PoolState | None, slot_ids: Tensor, pools: list[PoolState]) -> Tensor:
    """Rows of slots in one version; where that never wrote one, as any other that did found it."""
    rows = pools[0].now.rows.new_zeros(len(slot_ids), pools[0].now.rows.shape[1])
    for pool in pools:
        places, known = pool.find(slot_ids)
        rows[known] = pool.attached.take(places[known])
    if state is not None:
        places, known = state.find(slot_ids)
        rows[known] = state.now.take(places[known])
    return rows


def write(state: State, pools: Mapping[str, Pool], *, on_top: bool = False) -> None:
    """Bring pools as they were attached to a version.

    Args:
        state: The version.
        pools: Pools by name.
        on_top: Write it over whatever the pools hold.

    Raises:
        PoolMismatchError: They are other pools, or their rows are not those the version began with;
            nothing was written.
    """
    for name, of_pool in state.items():
        pool = pools.get(name)
        width = of_pool.now.rows.shape[1]
        if pool is None or not pool.can_hold(of_pool.num_slots, width):
            found = f"{pool.num_slots} x {pool.value_dim}" if pool else "missing"
            raise PoolMismatchError(
                f"the history is of pool {name!r} of {of_pool.num_slots} x {width}, here it is {found}; "
                "it belongs to another memory"
            )
        places = torch.arange(len(of_pool.slot_ids))
        if not on_top and not same_bits(pool.current(of_pool.slot_ids).cpu(), of_pool.attached.take(places)):
            raise PoolMismatchError(
                f"the history begins with other rows of pool {name!r} than this memory was attached with; "
                "it belongs to another memory"
            )
    for name, of_pool in state.items():
        pools[name].write(of_pool.slot_ids, of_pool.now.rows, of_pool.now.index)
