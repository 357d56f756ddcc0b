"""Objects: what one commit changed, each a safetensors file named by the SHA-256 of its bytes.

A file is written to `incoming/` under the lock of the history, and moves to `objects/` once its commit
stands. So whatever lies in `incoming/` without a commit is what a killed process left, and is removed by
the next that writes.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsemem.errors import CheckpointError, OutputError
from sparsemem.files import check_format, write_atomically

FORMAT = "sparsemem-object"
FORMAT_VERSION = 2
"""In the first, slot ids and indices were int64."""
OBJECTS_FOLDER = "objects"
INCOMING_FOLDER = "incoming"
PARTS = ("slot_ids", "after", "after_index", "before", "before_index")
AS_BEFORE = -1
"""`before_index` of a slot whose row before is the one an earlier commit left."""


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Rows of one pool, each distinct row once.

    Args:
        slot_ids: Ascending, shape (slots,), int64.
        after: Rows that slots have since, shape (rows, value_dim), float32.
        after_index: Which of them each slot has, shape (slots,), int64.
        before: Rows of slots that no earlier commit wrote, as they were when the memory was attached.
        before_index: Which of them each slot had, or `AS_BEFORE`.
        num_slots: Slots of the pool.
    """

    slot_ids: Tensor
    after: Tensor
    after_index: Tensor
    before: Tensor
    before_index: Tensor
    num_slots: int

    def is_valid(self) -> bool:
        """Whether all parts fit together; nothing that was read is used before."""
        ids = self.slot_ids
        tables = self.after, self.before
        indices = self.after_index, self.before_index
        return (
            all(t.dtype == torch.int64 and t.shape == ids.shape and t.dim() == 1 for t in (ids, *indices))
            and all(t.dtype == torch.float32 and t.dim() == 2 for t in tables)
            and self.after.shape[1] == self.before.shape[1]
            and bool((ids[1:] > ids[:-1]).all())
            and (not len(ids) or (int(ids[0]) >= 0 and int(ids[-1]) < self.num_slots))
            and _is_within(self.after_index, 0, len(self.after))
            and _is_within(self.before_index, AS_BEFORE, len(self.before))
        )


def _is_within(numbers: Tensor, least: int, end: int) -> bool:
    if not len(numbers):
        return True
    low, high = numbers.aminmax()
    return least <= int(low) and int(high) < end


Stored = Mapping[str, StoredRows]
"""What a commit changed, by pool."""


def to_bytes(stored: Stored) -> bytes:
    """Write an object; the same content gives the same bytes."""
    tensors = {
        f"{part}.{name}": _narrowed(getattr(rows, part), rows.num_slots)
        for name, rows in sorted(stored.items())
        for part in PARTS
    }
    sizes = {f"num_slots.{name}": str(rows.num_slots) for name, rows in sorted(stored.items())}
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), **sizes}
    written: bytes = save(tensors, header)
    # The library writes metadata in any order; its own text says the same in one, and is no longer.
    size = int.from_bytes(written[:8], "little")
    text = json.dumps(json.loads(written[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    return written[:8] + text.ljust(size) + written[8 + size :]


def parse_object(content: bytes, sha: str, where: Path | str) -> dict[str, StoredRows]:
    """Read an object from its bytes.

    Args:
        content: The whole file.
        sha: Its SHA-256.
        where: What to call it in errors.

    Raises:
        CheckpointError: It is damaged, foreign, of a newer format, or not what its name says.
    """
    if hashlib.sha256(content).hexdigest() != sha:
        raise CheckpointError(f"{where} is damaged: its content has another SHA-256; restore it from a copy")
    try:
        tensors = load(content)
        header = _header(content)
        check_format(where, header, FORMAT, FORMAT_VERSION)
        names = sorted({key.partition(".")[2] for key in tensors})
        stored = {
            name: StoredRows(
                **{part: _widened(tensors.pop(f"{part}.{name}")) for part in PARTS},
                num_slots=int(header[f"num_slots.{name}"]),
            )
            for name in names
        }
    except CheckpointError:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{where} is not a valid object ({error}); restore it from a copy") from error
    if tensors or not all(rows.is_valid() for rows in stored.values()):
        raise CheckpointError(f"{where}: slot ids and rows do not fit together; restore it from a copy")
    return stored


def _narrowed(tensor: Tensor, num_slots: int) -> Tensor:
    """Copy a tensor for a file: beside short rows, 64 bits for each slot would be a good part of it."""
    fits = tensor.dtype == torch.int64 and num_slots <= torch.iinfo(torch.int32).max
    return tensor.int() if fits else tensor.contiguous().clone()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _header(content: bytes) -> dict[str, str]:
    """Metadata of a safetensors file that was read whole; the library gives them only of a path."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__") or {}


class ObjectStore:
    """The object files of a folder.

    Args:
        folder: A memory folder.
    """

    def __init__(self, folder: Path) -> None:
        self.objects, self.incoming = folder / OBJECTS_FOLDER, folder / INCOMING_FOLDER

    def stage(self, stored: Stored) -> str:
        """Write an object to `incoming/`, unless it is here already; returns its SHA-256.

        Raises:
            OutputError: It could not be written.
        """
        return self.stage_bytes(to_bytes(stored))

    def stage_bytes(self, content: bytes) -> str:
        """As `stage`, of an object that was written elsewhere."""
        sha = hashlib.sha256(content).hexdigest()
        if not self.path(sha).is_file():
            target = self.incoming / f"{sha}.safetensors"
            write_atomically(target, lambda temporary: temporary.write_bytes(content))
        return sha

    def settle(self, known: Collection[str]) -> None:
        """Move objects of commits out of `incoming/`, and remove what else is there.

        Args:
            known: The objects among them that a commit has.
        """
        try:
            for path in list(self.incoming.glob("*")) + list(self.incoming.glob(".*.part")):
                if path.stem in known:
                    target = Path(self._settled(path.stem))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"could not tidy {self.incoming}: {error.strerror}; check rights") from error

    def staged(self) -> list[str]:
        """List the objects in `incoming/`."""
        return [path.stem for path in self.incoming.glob("*.safetensors")]

    def path(self, sha: str) -> Path:
        """Where an object is, or would be."""
        incoming = self.incoming / f"{sha}.safetensors"
        settled = Path(self._settled(sha))
        # The place it comes from first: it may move between two looks, and only in one direction.
        return incoming if incoming.is_file() and not settled.is_file() else settled

    def read(self, sha: str) -> dict[str, StoredRows]:
        """Read an object.

        Raises:
            CheckpointError: It is missing, or as `parse_object` says.
        """
        return self._checked(sha)[1]

    def content(self, sha: str) -> bytes:
        """Read the bytes of an object, of which nothing damaged gets out; raises as `read`."""
        return self._checked(sha)[0]

    def _checked(self, sha: str) -> tuple[bytes, dict[str, StoredRows]]:
        # Paths as text: of 10,000 objects, making `Path`s would take as long as their SHA-256.
        settled = self._settled(sha)
        incoming = f"{self.incoming}{os.sep}{sha}.safetensors"
        # It may move between two looks, and only in one direction.
        for path in (settled, incoming, settled):
            try:
                with open(path, "rb") as file:  # noqa: PTH123 - as above
                    content = file.read()
            except FileNotFoundError:
                continue
            return content, parse_object(content, sha, path)
        raise CheckpointError(f"{settled} is missing; restore it from a copy, or import it from an export")

    def settled(self) -> Iterator[str]:
        """Yield the objects in `objects/`."""
        yield from (path.stem for path in self.objects.glob("*/*.safetensors"))

    def remove(self, sha: str) -> int:
        """Remove an object; returns its bytes."""
        path = self.path(sha)
        num_bytes = path.stat().st_size
        path.unlink()
        return num_bytes

    def _settled(self, sha: str) -> str:
        return f"{self.objects}{os.sep}{sha[:2]}{os.sep}{sha}.safetensors"
