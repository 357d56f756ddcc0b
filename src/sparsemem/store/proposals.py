"""Facts that wait for a person: proposed, refused by a rule, rejected. Each is kept with its reason."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sparsemem.errors import HistoryError
from sparsemem.store.commits import FactRow, author, canonical, now
from sparsemem.store.history import DeltaStore

PENDING, REFUSED, REJECTED, APPROVED = "pending", "refused", "rejected", "approved"


def put(
    store: DeltaStore, rows: Iterable[FactRow], status: str, *, source: str = "", reason: str = ""
) -> int:
    """Keep facts for review, or as refused; one that is kept already gets the new status.

    Returns:
        How many.
    """
    values = [(row["sha"], canonical(row), source, now(), author(), status, reason) for row in rows]
    with store.database.writing() as connection:
        connection.executemany("INSERT OR REPLACE INTO proposals VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        for sha, *_ in values:
            store.note(connection, status, sha, None, None)
    return len(values)


def listed(store: DeltaStore, *statuses: str) -> list[dict[str, Any]]:
    """List facts of some statuses, or of all, the oldest first, as plain JSON values."""
    found = store.database.rows("SELECT * FROM proposals ORDER BY time, sha")
    rows = [{**dict(row), "fact": json.loads(row["fact"])} for row in found]
    return [row for row in rows if not statuses or row["status"] in statuses]


def waiting(store: DeltaStore, names: Sequence[str]) -> list[FactRow]:
    """Find facts that wait for a decision, refused ones too.

    Args:
        store: The history.
        names: Beginnings of their shas; "all" for everything pending.

    Raises:
        HistoryError: One is not there.
    """
    kept = listed(store, PENDING, REFUSED)
    chosen: dict[str, FactRow] = {}
    for name in names:
        matches = [
            row
            for row in kept
            if (row["status"] == PENDING if name == "all" else row["sha"].startswith(name))
        ]
        if not matches and name != "all":
            raise HistoryError(f"no fact {name!r} waits for review; see sparsemem review {store.folder}")
        chosen |= {row["sha"]: row["fact"] for row in matches}
    return list(chosen.values())


def decide(store: DeltaStore, rows: Iterable[FactRow], status: str) -> None:
    """Note what was decided about facts: `APPROVED` or `REJECTED`."""
    with store.database.writing() as connection:
        for row in rows:
            connection.execute("UPDATE proposals SET status = ? WHERE sha = ?", (status, row["sha"]))
            store.note(connection, status, row["sha"], None, None)
