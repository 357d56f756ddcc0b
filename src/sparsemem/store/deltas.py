"""The updates of a memory folder: add one, take the last one back."""

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsemem.errors import HistoryError
from sparsemem.memory.checkpoint import DELTAS_FOLDER, delta_paths
from sparsemem.memory.delta import SparseDelta

UNDONE_FOLDER = "undone"


@dataclasses.dataclass(frozen=True)
class Update:
    """One committed update.

    Args:
        number: Its place, from 1.
        path: Its file.
        message: What it is.
        time: When it was committed, ISO 8601, UTC.
        digest: Digest of its delta.
        report: The report of the run that made it.
    """

    number: int
    path: Path
    message: str
    time: str
    digest: str
    report: dict[str, Any]


class DeltaStore:
    """The updates in a memory folder, in order.

    Args:
        folder: A folder made by `save` or `sparsemem attach`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __len__(self) -> int:
        return len(delta_paths(self.folder))

    def updates(self) -> list[Update]:
        """List the updates, oldest first."""
        return [_read(path)[0] for path in delta_paths(self.folder)]

    def commit(
        self,
        delta: SparseDelta,
        message: str = "",
        report: Mapping[str, Any] | None = None,
        *,
        after: int | None = None,
    ) -> Update:
        """Add an update: one new file, there as a whole or not at all.

        Args:
            delta: What was learned.
            message: What it is.
            report: The report of the run that made it.
            after: Number of updates the delta was made on top of; by default as many as there are.

        Raises:
            HistoryError: Another update was committed since.
            OutputError: It could not be written.
        """
        number = (len(self) if after is None else after) + 1
        if number > len(self) + 1:
            raise HistoryError(f"update {number - 1} of {self.folder} was undone meanwhile; learn again")
        path = self._path(number)
        header = {
            "message": message,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "report": json.dumps(report or {}),
        }
        staged = path.with_name(f".{path.name}.{os.getpid()}.staged")
        delta.save(staged, header)
        try:
            # A hard link is made only where nothing stands, so of two writers one is told.
            os.link(staged, path)
        except OSError as error:
            if path.exists():
                raise HistoryError(
                    f"update {number} of {self.folder} was committed meanwhile; learn again"
                ) from error
            os.replace(staged, path)  # a file system without hard links (FAT, some network shares)
        finally:
            staged.unlink(missing_ok=True)
        return _read(path)[0]

    def undo(self) -> tuple[Update, SparseDelta]:
        """Take the last update back; its file moves to `deltas/undone`.

        Returns:
            The update, and its delta.

        Raises:
            HistoryError: There is none.
        """
        paths = delta_paths(self.folder)
        if not paths:
            raise HistoryError(f"{self.folder} has no update to undo; it is as it was attached")
        update, delta = _read(paths[-1])
        undone = self.folder / DELTAS_FOLDER / UNDONE_FOLDER
        undone.mkdir(exist_ok=True)
        os.replace(update.path, undone / f"{update.path.stem}-{update.digest[:12]}.safetensors")
        return update, delta

    def since(self, revision: str) -> list[SparseDelta]:
        """List the deltas of an update and of all later ones, newest first.

        Inverted and applied in this order they give the model before that update.

        Args:
            revision: Its number, "last", or the beginning of its digest.

        Raises:
            HistoryError: There is no such update.
        """
        entries = [_read(path) for path in delta_paths(self.folder)]
        for index, (update, _) in enumerate(entries):
            is_last = revision == "last" and index == len(entries) - 1
            if (
                is_last
                or revision == str(update.number)
                or (len(revision) >= 4 and update.digest.startswith(revision))
            ):
                return [delta for _, delta in reversed(entries[index:])]
        raise HistoryError(
            f"{self.folder} has no update {revision!r}; it has {len(entries)}, numbered from 1"
        )

    def _path(self, number: int) -> Path:
        return self.folder / DELTAS_FOLDER / f"{number:06d}.safetensors"


def _read(path: Path) -> tuple[Update, SparseDelta]:
    delta, header = SparseDelta.load(path)
    update = Update(
        number=int(path.stem),
        path=path,
        message=header.get("message", ""),
        time=header.get("time", ""),
        digest=header["digest"],
        report=json.loads(header.get("report", "{}")),
    )
    return update, delta
