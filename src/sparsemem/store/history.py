"""The history of a memory: commits of what was learned, branches, and the way back to each of them."""

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sparsemem.errors import HistoryError
from sparsemem.memory.delta import SparseDelta
from sparsemem.store.commits import COLUMNS, Commit, FactRow, author, canonical, commit_digest, insert, now
from sparsemem.store.database import Database
from sparsemem.store.objects import ObjectStore
from sparsemem.store.state import PoolState, as_stored, recorded, replay, stored

ATTACHED = "attached"
"""Revision of the memory as it was attached, before any commit."""


class _Current:
    """Stands for the version that is checked out when a commit is written."""


CURRENT: Final = _Current()


class DeltaStore:
    """The history in a memory folder.

    A revision is "HEAD" or "last" (what is checked out), a branch or tag, the beginning of a commit's id,
    its number in `log` counted from 1, or "attached"; "~2" behind it goes back two commits.

    Args:
        folder: A folder made by `save` or `sparsemem attach`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.database = Database(self.folder)
        self.objects = ObjectStore(self.folder)
        self._cached: tuple[str | None, dict[str, PoolState]] = None, {}

    def __len__(self) -> int:
        return len(self.log())

    def head(self) -> str | None:
        """Id of the version that is checked out; None for the memory as attached."""
        name = self.head_name()
        return self.refs("branch").get(name, None if self._is_branch_name(name) else _or_attached(name))

    def head_name(self) -> str:
        """The branch that is checked out, or the version where that is none."""
        found = self.database.rows("SELECT value FROM meta WHERE name = 'head'")
        return str(found[0]["value"]) if found else "main"

    def refs(self, kind: str = "") -> dict[str, str]:
        """Versions by the names of branches or tags (`kind`), or of both."""
        rows = self.database.rows("SELECT name, kind, target FROM refs ORDER BY name")
        return {row["name"]: row["target"] for row in rows if kind in ("", row["kind"])}

    def get(self, commit_id: str) -> Commit:
        """Return a commit by its whole id; raises HistoryError."""
        found = self.database.rows(f"SELECT {COLUMNS} FROM commits WHERE id = ?", commit_id)
        if not found:
            raise HistoryError(f"{self.folder} has no commit {commit_id!r}; see sparsemem log {self.folder}")
        return Commit(*found[0])

    def details(self, commit_id: str) -> dict[str, Any]:
        """What is kept beside a commit's rows: `facts`, `forgets`, `report`, `config`, `versions`."""
        found = self.database.rows("SELECT details FROM commits WHERE id = ?", commit_id)
        return dict(json.loads(found[0]["details"])) if found else {}

    def log(self, revision: str = "HEAD") -> list[Commit]:
        """List a version and those before it, by first parents, the newest first."""
        return self._chain(self.resolve(revision))

    def resolve(self, revision: str) -> str | None:
        """Find a version.

        Returns:
            Its id; None for the memory as attached.

        Raises:
            HistoryError: There is none of that name, or several.
        """
        name, _, steps = revision.partition("~")
        if steps and not steps.isdigit():
            raise HistoryError(f"revision {revision!r} is not understood; write HEAD~2 for two commits back")
        found = self._resolve_name(name, revision)
        for _ in range(int(steps or 0)):
            if found is None:
                raise HistoryError(f"{revision!r} goes back beyond the memory as attached; take fewer steps")
            found = self.get(found).parent
        return found

    def state(self, commit_id: str | None) -> dict[str, PoolState]:
        """Return all rows a version has written."""
        newer = []
        for commit in self._chain(commit_id):
            if commit.id == self._cached[0]:
                break
            newer.append(commit)
        else:
            self._cached = None, {}
        # Not in threads: they wait for one another more than for the disk.
        read = (self.objects.read(commit.object) for commit in reversed(newer))
        parts = [as_stored(self._cached[1]), *read]
        self._cached = commit_id, replay(parts)
        return self._cached[1]

    def delta(self, commit_id: str) -> SparseDelta:
        """Return what a commit changed, with the rows before."""
        commit = self.get(commit_id)
        return recorded(self.objects.read(commit.object), self.state(commit.parent))

    def deltas(self, revision: str = "HEAD") -> Iterator[tuple[Commit, SparseDelta]]:
        """Yield a version and those before it with what each changed, the oldest first."""
        state: dict[str, PoolState] = {}
        for commit in reversed(self.log(revision)):
            rows = self.objects.read(commit.object)
            yield commit, recorded(rows, state)
            state = replay([as_stored(state), rows])

    def facts(self, commit_id: str | None, *changes: Mapping[str, Any]) -> list[FactRow]:
        """List the facts a version was taught and has not taken back, the oldest first.

        Args:
            commit_id: The version.
            changes: Details of commits that are to come behind it.
        """
        known: dict[str, FactRow] = {}
        past = (self.details(commit.id) for commit in reversed(self._chain(commit_id)))
        for details in (*past, *changes):
            for sha in details.get("forgets", ()):
                known.pop(sha, None)
            known |= {row["sha"]: row for row in details.get("facts", ())}
        return list(known.values())

    def ancestors(self, commit_id: str | None) -> dict[str, None]:
        """List a version and all it was made from, by both parents, the nearest first."""
        found: dict[str, None] = {}
        queue = [commit_id]
        for current in queue:
            if current is not None and current not in found:
                found[current] = None
                commit = self.get(current)
                queue += [commit.parent, commit.second_parent]
        return found

    def commit(
        self,
        delta: SparseDelta,
        message: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        after: str | _Current | None = CURRENT,
        second_parent: str | None = None,
        action: str = "commit",
    ) -> Commit:
        """Add a version behind the one that is checked out, and check it out.

        Args:
            delta: What was learned, from the rows that version has.
            message: What it is.
            details: Plain JSON values to keep: `facts` (rows with a "sha"), `forgets` (shas), `report`, ...
            after: The version the delta was made on, to be sure that it is still checked out.
            second_parent: The other side of a merge.
            action: How it is called in the journal.

        Raises:
            HistoryError: Another version was checked out since.
            PoolMismatchError: The delta starts from other rows.
            OutputError: It could not be written; the history is as it was.
        """
        with self.database.writing() as connection:
            parent = self.head()
            if after is not CURRENT and after != parent:
                raise HistoryError(
                    f"{self.folder} has another version checked out than this was learned on "
                    f"({_name(parent)}, not {_name(after)}): something was committed or undone meanwhile; "
                    "learn again"
                )
            rows = stored(delta, self.state(parent))
            record = {
                "parent": parent,
                "second_parent": second_parent,
                "time": now(),
                "author": author(),
                "message": message,
                "object": self.objects.stage(rows),
                "digest": delta.digest,
                "num_slots": delta.num_slots_trained,
                "details": canonical(details or {}),
            }
            commit_id = commit_digest(record)
            insert(connection, commit_id, record)
            self._move_head(connection, commit_id, action)
        self.settle()
        return self.get(commit_id)

    def undo(self) -> tuple[Commit, SparseDelta]:
        """Check out the version before, on the same branch; the commit itself stays until `gc`.

        Returns:
            What was taken back, and its delta.

        Raises:
            HistoryError: There is nothing to undo.
        """
        head = self.head()
        if head is None:
            raise HistoryError(f"{self.folder} has no update to undo; it is as it was attached")
        commit, delta = self.get(head), self.delta(head)
        with self.database.writing() as connection:
            if self.head() != head:
                raise HistoryError(f"{self.folder} was changed meanwhile; undo again if you still want to")
            self._move_head(connection, commit.parent, "undo")
        return commit, delta

    def checkout(self, revision: str) -> str | None:
        """Make a branch or a version the one that is loaded and learned on; returns its id."""
        target = self.resolve(revision)
        name = revision if revision in self.refs("branch") or revision == "main" else target or ATTACHED
        with self.database.writing() as connection:
            before = self.head()
            connection.execute("UPDATE meta SET value = ? WHERE name = 'head'", (name,))
            self.note(connection, "checkout", name, before, target)
        return target

    def create_ref(self, kind: str, name: str, revision: str = "HEAD") -> str:
        """Name a version by a branch, which moves with its commits, or a tag, which does not.

        Raises:
            HistoryError: The name is taken or cannot be one, or the version is the memory as attached.
        """
        target = self.resolve(revision)
        if not self._is_branch_name(name):
            raise HistoryError(f"{name!r} cannot name a {kind}; use letters, digits, '-', '_', '.' and '/'")
        if target is None:
            raise HistoryError(f"there is no commit to name {name!r} yet; learn something first")
        with self.database.writing() as connection:
            if name in self.refs():
                raise HistoryError(f"{name!r} exists already; choose another name or delete it")
            connection.execute("INSERT INTO refs VALUES (?, ?, ?)", (name, kind, target))
            self.note(connection, kind, name, None, target)
        return target

    def delete_ref(self, kind: str, name: str) -> None:
        """Remove a branch or tag; its commits stay until `gc`."""
        if name not in self.refs(kind):
            raise HistoryError(
                f"{self.folder} has no {kind} {name!r}; it has {', '.join(self.refs(kind)) or 'none'}"
            )
        if kind == "branch" and name == self.head_name():
            raise HistoryError(f"{name!r} is checked out; check out another branch first")
        with self.database.writing() as connection:
            before = self.refs(kind)[name]
            connection.execute("DELETE FROM refs WHERE name = ?", (name,))
            self.note(connection, f"delete {kind}", name, before, None)

    def move_head(self, commit_id: str, action: str) -> None:
        """Let what is checked out be another version, which exists already."""
        with self.database.writing() as connection:
            self._move_head(connection, commit_id, action)

    def journal(self) -> list[dict[str, Any]]:
        """List all that was ever done to branches and tags, the oldest first."""
        return [dict(row) for row in self.database.rows("SELECT * FROM journal ORDER BY number")]

    def _chain(self, commit_id: str | None) -> list[Commit]:
        if commit_id is None:
            return []
        columns = ", ".join(f"commits.{name}" for name in COLUMNS.split(", "))
        found = self.database.rows(
            "WITH RECURSIVE chain (id, place) AS (SELECT ?, 0 UNION ALL "
            "SELECT commits.parent, place + 1 FROM commits JOIN chain USING (id) "
            "WHERE commits.parent IS NOT NULL) "
            f"SELECT {columns} FROM chain JOIN commits USING (id) ORDER BY place",
            commit_id,
        )
        return [Commit(*row) for row in found]

    def _resolve_name(self, name: str, revision: str) -> str | None:
        if name == ATTACHED or (name == "main" and "main" not in self.refs()):
            return None
        if name == "HEAD" or (name == "last" and self.head() is not None):
            return self.head()
        if name in (refs := self.refs()):
            return refs[name]
        chain = self._chain(self.head())
        if name.isdigit() and 1 <= int(name) <= len(chain):
            return chain[-int(name)].id
        matches = []
        if re.fullmatch(r"[0-9a-f]{4,64}", name):
            matches = self.database.rows("SELECT id FROM commits WHERE id LIKE ?", f"{name}%")
        if len(matches) > 1:
            raise HistoryError(f"{len(matches)} commits begin with {name!r}; write more of it")
        if not matches:
            raise HistoryError(
                f"{self.folder} has no update {revision!r}; it has {len(chain)}, numbered from 1 "
                f"(sparsemem log {self.folder})"
            )
        return str(matches[0]["id"])

    @staticmethod
    def _is_branch_name(name: str) -> bool:
        reserved = name in ("HEAD", "last", ATTACHED) or re.fullmatch(r"\d+|[0-9a-f]{4,64}", name)
        return bool(re.fullmatch(r"\w[\w./-]*", name)) and not reserved

    def _move_head(self, connection: sqlite3.Connection, target: str | None, action: str) -> None:
        name, before = self.head_name(), self.head()
        if not self._is_branch_name(name):
            connection.execute("UPDATE meta SET value = ? WHERE name = 'head'", (target or ATTACHED,))
        elif target is None:
            connection.execute("DELETE FROM refs WHERE name = ?", (name,))
        else:
            connection.execute("INSERT OR REPLACE INTO refs VALUES (?, 'branch', ?)", (name, target))
        self.note(connection, action, name, before, target)

    @staticmethod
    def note(
        connection: sqlite3.Connection, action: str, ref: str, before: str | None, after: str | None
    ) -> None:
        """Write a line of the journal."""
        connection.execute(
            "INSERT INTO journal (time, author, action, ref, before, after) VALUES (?, ?, ?, ?, ?, ?)",
            (now(), author(), action, ref, before, after),
        )

    def settle(self) -> None:
        """Give objects of commits their place, and remove what killed processes left."""
        with self.database.writing() as connection:
            staged = self.objects.staged()
            marks = ", ".join("?" * len(staged))
            known = connection.execute(f"SELECT object FROM commits WHERE object IN ({marks})", staged)
            self.objects.settle({row["object"] for row in known})


def _name(commit_id: str | _Current | None) -> str:
    return commit_id[:10] if isinstance(commit_id, str) else ATTACHED


def _or_attached(name: str) -> str | None:
    return None if name == ATTACHED else name
