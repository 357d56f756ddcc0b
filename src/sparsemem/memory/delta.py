"""A delta: the rows an update changed, before and after. Knows only slot ids and rows."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsemem.errors import CheckpointError, PoolMismatchError
from sparsemem.files import read_tensors, write_tensors
from sparsemem.memory.pool import Pool
from sparsemem.memory.rows import distinct, same_bits

FORMAT = "sparsemem-delta"
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class RowChange:
    """Rows of one pool.

    Both are kept whole, not their difference: (a + d) - d != a for one in eight bf16 values, and
    undo must be exact.

    Args:
        slot_ids: Distinct, ascending, shape (slots,), int64.
        before: Rows before the update, shape (slots, value_dim), float32.
        after: Rows after it, same shape.
        num_slots: Slots of the pool they belong to.
    """

    slot_ids: Tensor
    before: Tensor
    after: Tensor
    num_slots: int


@dataclasses.dataclass(frozen=True)
class SparseDelta:
    """What one update learned, as changes by pool name."""

    changes: dict[str, RowChange]

    @property
    def num_slots_trained(self) -> int:
        """Slots changed, all pools together."""
        return sum(len(change.slot_ids) for change in self.changes.values())

    @property
    def num_values(self) -> int:
        """Numbers changed, all pools together; a row that many slots hold counts once."""
        return sum(distinct(change.after)[0].numel() for change in self.changes.values())

    @property
    def digest(self) -> str:
        """SHA-256 of pool names, slot ids and rows."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        digest.update(repr(sorted((n, c.num_slots) for n, c in self.changes.items())).encode())
        return digest.hexdigest()

    def apply(self, pools: Mapping[str, Pool]) -> None:
        """Write the rows after the update.

        Raises:
            PoolMismatchError: A pool is missing, too small or of another width, or its rows are not the ones
                this delta starts from; nothing was written.
        """
        for name, change in self.changes.items():
            pool = pools.get(name)
            if pool is None or not pool.can_hold(change.num_slots, change.after.shape[1]):
                found = f"{pool.num_slots} x {pool.value_dim}" if pool else "missing"
                raise PoolMismatchError(
                    f"delta {self.digest[:12]} is for pool {name!r} of {change.num_slots} x "
                    f"{change.after.shape[1]}, here it is {found}; apply it to the model it was made on"
                )
            if not same_bits(pool.current(change.slot_ids).cpu(), change.before):
                raise PoolMismatchError(
                    f"delta {self.digest[:12]} starts from other rows of pool {name!r} than the model "
                    "has now; apply updates in their order, and undo them in reverse"
                )
        for name, change in self.changes.items():
            pools[name].write(change.slot_ids, change.after)

    def invert(self) -> "SparseDelta":
        """Return the delta that takes this one back."""
        return SparseDelta(
            {
                name: dataclasses.replace(change, before=change.after, after=change.before)
                for name, change in self.changes.items()
            }
        )

    def compose(self, later: "SparseDelta") -> "SparseDelta":
        """Return the one delta that does this one and then `later`.

        Raises:
            PoolMismatchError: `later` does not start from the rows this one leaves.
        """
        changes = dict(self.changes)
        for name, change in later.changes.items():
            changes[name] = _compose(changes[name], change) if name in changes else change
        return SparseDelta(changes)

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file, atomically.

        Raises:
            OutputError: It could not be written; nothing is left behind.
        """
        sizes = {f"num_slots.{name}": str(change.num_slots) for name, change in self.changes.items()}
        header = {"digest": self.digest, **sizes, **(metadata or {})}
        write_tensors(Path(path), self._stored(), FORMAT, FORMAT_VERSION, header)

    @classmethod
    def load(cls, path: str | Path) -> tuple["SparseDelta", dict[str, str]]:
        """Read a delta and the metadata saved with it.

        Raises:
            MissingFileError: There is no such file.
            CheckpointError: It is damaged, foreign, of a newer format or not what its digest says.
        """
        path = Path(path)
        tensors, header = read_tensors(path, FORMAT, FORMAT_VERSION)
        version = int(header["format_version"])
        names = sorted({key.partition(".")[2] for key in tensors})
        try:
            changes = {
                name: RowChange(
                    slot_ids=tensors[f"slot_ids.{name}"],
                    before=_rows(tensors, "before", name, version),
                    after=_rows(tensors, "after", name, version),
                    num_slots=int(header[f"num_slots.{name}"]),
                )
                for name in names
            }
        except (KeyError, ValueError) as error:
            raise _damaged(path, f"it has no valid {error}") from error
        delta = cls(changes)
        delta._check_shapes(path)
        if header.get("digest") != delta.digest:
            raise _damaged(path, "its content is not what its digest says")
        return delta, header

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": getattr(change, part)
            for name, change in self.changes.items()
            for part in ("slot_ids", "before", "after")
        }

    def _stored(self) -> dict[str, Tensor]:
        """Return what is written to a file: each row once, and which of them each slot holds."""
        stored = {}
        for name, change in self.changes.items():
            stored[f"slot_ids.{name}"] = change.slot_ids
            stored[f"before.{name}"], stored[f"before_index.{name}"] = distinct(change.before)
            stored[f"after.{name}"], stored[f"after_index.{name}"] = distinct(change.after)
        return stored

    def _check_shapes(self, path: Path) -> None:
        for name, change in self.changes.items():
            ids = change.slot_ids
            if not (
                ids.dtype == torch.int64
                and ids.dim() == 1
                and change.before.dtype == change.after.dtype == torch.float32
                and change.before.dim() == 2
                and change.before.shape == change.after.shape
                and len(change.before) == len(ids)
                and bool((ids[1:] > ids[:-1]).all())
                and (len(ids) == 0 or 0 <= int(ids[0]) <= int(ids[-1]) < change.num_slots)
            ):
                raise _damaged(path, f"slot ids and rows of pool {name!r} do not fit together")


class DeltaRecorder:
    """Remembers each row as it was before its first change, to make a delta of all of them."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self.pools = pools
        self._before: dict[str, dict[int, Tensor]] = {name: {} for name in pools}

    def record(self, name: str, slot_ids: Tensor) -> None:
        """Remember the rows of `slot_ids` unless they are remembered already."""
        known = self._before[name]
        new = torch.tensor([i for i in slot_ids.tolist() if i not in known], dtype=torch.int64)
        known.update(zip(new.tolist(), self.pools[name].current(new).cpu(), strict=True))

    def delta(self) -> SparseDelta:
        """Return the change of every recorded row up to now."""
        changes = {}
        for name, before in self._before.items():
            if before:
                ids = torch.tensor(sorted(before), dtype=torch.int64)
                rows = torch.stack([before[i] for i in ids.tolist()])
                pool = self.pools[name]
                changes[name] = RowChange(ids, rows, pool.current(ids).cpu(), pool.num_slots)
        return SparseDelta(changes)


def _rows(tensors: Mapping[str, Tensor], part: str, name: str, version: int) -> Tensor:
    """Read the row of each slot; in format 1 each was written out."""
    rows = tensors[f"{part}.{name}"]
    if version == 1:
        return rows
    index = tensors[f"{part}_index.{name}"]
    if index.dtype != torch.int64 or index.dim() != 1 or not ((index >= 0) & (index < len(rows))).all():
        raise ValueError(f"{part}_index of pool {name!r}")
    return rows[index]


def _compose(first: RowChange, second: RowChange) -> RowChange:
    if first.after.shape[1] != second.after.shape[1]:
        raise PoolMismatchError(
            f"deltas of pools of {first.num_slots} x {first.after.shape[1]} and {second.num_slots} x "
            f"{second.after.shape[1]} do not compose; both must be of one model"
        )
    ids = torch.cat([first.slot_ids, second.slot_ids]).unique()
    at_first = torch.searchsorted(ids, first.slot_ids)
    at_second = torch.searchsorted(ids, second.slot_ids)
    in_both = torch.isin(second.slot_ids, first.slot_ids)
    before = first.before.new_zeros(len(ids), first.before.shape[1])
    before[at_second], before[at_first] = second.before, first.before
    after = before.clone()
    after[at_first] = first.after
    if not same_bits(after[at_second[in_both]], second.before[in_both]):
        raise PoolMismatchError("the later delta does not start from what the earlier one leaves")
    after[at_second] = second.after
    return RowChange(ids, before, after, max(first.num_slots, second.num_slots))


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a valid delta: {reason}; restore it from a copy")
