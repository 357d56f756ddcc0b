"""The record of a commit, and what names it: its content."""

import dataclasses
import datetime
import getpass
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

from sparsemem.data import Fact, parse_fact

COLUMNS = "id, parent, second_parent, time, author, message, object, digest, num_slots"
RECORD = (*COLUMNS.split(", ")[1:], "details")
"""What names a commit: the columns behind its id."""

FactRow = dict[str, Any]
"""A fact as it stands in a file of facts; only its "sha" where the text is kept out of the history."""


@dataclasses.dataclass(frozen=True)
class Commit:
    """One version: a change of some rows of its parent.

    Args:
        id: SHA-256 of everything below and the details.
        parent: The version it was made on; None if that is the memory as attached.
        second_parent: The other side of a merge.
        time: ISO 8601, UTC.
        author: Who made it.
        message: What it is.
        object: SHA-256 of the file with its rows.
        digest: Digest of the `SparseDelta` from the parent.
        num_slots: Slots it changed.
    """

    id: str
    parent: str | None
    second_parent: str | None
    time: str
    author: str
    message: str
    object: str
    digest: str
    num_slots: int

    @property
    def title(self) -> str:
        """Its short name and message, for people."""
        return f"{self.id[:10]} ({self.message})" if self.message else self.id[:10]


def commit_digest(record: Mapping[str, Any]) -> str:
    """Id of a commit: SHA-256 of its record, details included as the text they are stored as."""
    return hashlib.sha256(canonical(record).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON that is the same text for the same value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def insert(connection: sqlite3.Connection, commit_id: str, record: Mapping[str, Any]) -> None:
    """Add a commit to the table, unless it is there."""
    values = [commit_id, *(record[name] for name in RECORD)]
    connection.execute(
        f"INSERT OR IGNORE INTO commits (id, {', '.join(RECORD)}) VALUES ({', '.join('?' * len(values))})",
        values,
    )


def fact_rows(facts: Iterable[Any], *, hashed: bool = False) -> list[FactRow]:
    """Turn facts into what a commit keeps of them.

    Args:
        facts: Facts, as `sparsemem.Fact`.
        hashed: Keep only a hash of each, so that nobody can read them in the history.
    """
    rows: list[FactRow] = []
    for fact in facts:
        values = {k: v for k, v in dataclasses.asdict(fact).items() if v and k != "id"}
        sha = hashlib.sha256(canonical(values).encode()).hexdigest()[:16]
        rows.append({"sha": sha} if hashed else {"sha": sha, **values})
    return rows


def fact_text(row: FactRow) -> FactRow:
    """What a row says of its fact; nothing where it keeps only the hash."""
    return {name: value for name, value in row.items() if name != "sha"}


def facts_of(rows: Iterable[FactRow]) -> list[Fact]:
    """Read the facts that rows keep; those of which there is only the hash are left out."""
    return [parse_fact(text, row["sha"]) for row in rows if (text := fact_text(row))]


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def author() -> str:
    """Who works here: $SPARSEMEM_AUTHOR, or the name of the user."""
    try:
        return os.environ.get("SPARSEMEM_AUTHOR") or getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return "unknown"
