"""The SQLite file of a history: commits, refs and the journal, in transactions that stand or never were."""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsemem.errors import CheckpointError, OutputError

HISTORY_FILE = "history.sqlite"
FORMAT = "sparsemem-history"
FORMAT_VERSION = 1
LOCK_SECONDS = 60.0
"""How long a writer waits for another."""

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE commits (
    id TEXT PRIMARY KEY, parent TEXT, second_parent TEXT, time TEXT NOT NULL, author TEXT NOT NULL,
    message TEXT NOT NULL, object TEXT NOT NULL, digest TEXT NOT NULL, num_slots INTEGER NOT NULL,
    details TEXT NOT NULL
) STRICT;
CREATE TABLE refs (name TEXT PRIMARY KEY, kind TEXT NOT NULL, target TEXT NOT NULL) STRICT;
CREATE TABLE proposals (
    sha TEXT PRIMARY KEY, fact TEXT NOT NULL, source TEXT NOT NULL, time TEXT NOT NULL, author TEXT NOT NULL,
    status TEXT NOT NULL, reason TEXT NOT NULL
) STRICT;
CREATE TABLE journal (
    number INTEGER PRIMARY KEY, time TEXT NOT NULL, author TEXT NOT NULL, action TEXT NOT NULL,
    ref TEXT NOT NULL, before TEXT, after TEXT
) STRICT;
"""


class Database:
    """Opens `history.sqlite` when it is needed; a folder without one has no history yet.

    Args:
        folder: A memory folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / HISTORY_FILE
        self._connection: sqlite3.Connection | None = None

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Run a query; of a folder without a history it finds nothing.

        Raises:
            CheckpointError: The file is damaged, foreign or of a newer format.
        """
        if self._connection is None and not self.path.is_file():
            return []
        with self._errors():
            return self._open().execute(query, values).fetchall()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Hold the lock of writers; what is done inside stands as a whole, or not at all.

        Raises:
            CheckpointError: The file is damaged, foreign or of a newer format.
            OutputError: It could not be written.
        """
        with self._errors():
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
        try:
            with self._errors():
                yield connection
                connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def copy(self, folder: Path) -> None:
        """Write a copy, as it stands at one moment, to another folder; nothing if there is no history yet.

        Raises:
            CheckpointError: The file is damaged, foreign or of a newer format.
            OutputError: The copy could not be written.
        """
        if self.path.is_file():
            with self._errors(), contextlib.closing(sqlite3.connect(folder / HISTORY_FILE)) as target:
                self._open().backup(target)

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            if not self.path.parent.is_dir():
                raise OutputError(f"{self.path.parent} is no folder; make it with: sparsemem attach")
            connection = self._connect()
            try:
                connection.row_factory = sqlite3.Row
                if _is_empty(connection):
                    self._create(connection)
                self._check(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        if os.access(self.path.parent, os.W_OK) and (not self.path.exists() or os.access(self.path, os.W_OK)):
            connection = sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None)
            _keep_a_log(connection)
            connection.execute("PRAGMA synchronous = FULL")  # a commit that was reported survives a power cut
            return connection
        # A read-only copy, such as a snapshot from the Hub: nobody writes it, and WAL needs to.
        return sqlite3.connect(f"{self.path.resolve().as_uri()}?immutable=1", uri=True, isolation_level=None)

    def _create(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        if _is_empty(connection):  # else another process was faster
            for statement in filter(str.strip, SCHEMA.split(";")):
                connection.execute(statement)
            values = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "head": "main"}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
        connection.execute("COMMIT")

    def _check(self, connection: sqlite3.Connection) -> None:
        meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
        if meta.get("format") != FORMAT:
            raise CheckpointError(f"{self.path} is not a {FORMAT} file (format: {meta.get('format')!r})")
        version = meta.get("format_version", "")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path} has format version {version}, this sparsemem reads up to {FORMAT_VERSION}; "
                "upgrade sparsemem"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                raise self._damaged(error) from error
            raise OutputError(
                f"could not write {self.path}: {error}; free space, or wait for another process"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or foreign ({error}); restore it from a copy")


def _is_empty(connection: sqlite3.Connection) -> bool:
    (number,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(number == 0)


def _keep_a_log(connection: sqlite3.Connection) -> None:
    """Set journal_mode to WAL, for which SQLite itself does not wait while another process makes the file."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
