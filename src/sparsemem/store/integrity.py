"""Is a history what it says, and what in it does nobody need any more?"""

import dataclasses

from sparsemem.errors import CheckpointError, SparsememError
from sparsemem.memory.checkpoint import check_weights, read_header
from sparsemem.store.commits import RECORD, commit_digest
from sparsemem.store.history import DeltaStore


@dataclasses.dataclass(frozen=True)
class Removed:
    """What `gc` removed."""

    num_commits: int
    num_objects: int
    num_bytes: int


def verify(store: DeltaStore) -> list[str]:
    """Check every byte of a history.

    Returns:
        What is wrong, a line each; nothing if all is well.
    """
    problems = []
    try:
        check_weights(store.folder, read_header(store.folder))
    except SparsememError as error:
        problems.append(str(error))
    try:
        problems += [
            f"{store.database.path}: {row[0]}"
            for row in store.database.rows("PRAGMA integrity_check")
            if row[0] != "ok"
        ]
        records = {row["id"]: dict(row) for row in store.database.rows("SELECT * FROM commits")}
    except CheckpointError as error:
        return [*problems, str(error)]
    objects = {}
    for commit_id, record in records.items():
        content = {name: record[name] for name in RECORD}
        if commit_digest(content) != commit_id:
            problems.append(f"commit {commit_id[:10]} is not what its id says; restore {store.database.path}")
        for parent in (record["parent"], record["second_parent"]):
            if parent is not None and parent not in records:
                problems.append(f"commit {commit_id[:10]} lacks its parent {parent[:10]}; import it")
        objects[record["object"]] = commit_id
    for sha in objects:
        try:
            store.objects.read(sha)
        except CheckpointError as error:
            problems.append(f"commit {objects[sha][:10]}: {error}")
    for name, target in {**store.refs(), "HEAD": store.head()}.items():
        if target is not None and target not in records:
            problems.append(f"{name} names commit {target[:10]}, which is not there; import it")
    return problems


def gc(store: DeltaStore) -> Removed:
    """Remove commits that no branch, tag or checked-out version leads to, and objects without a commit."""
    with store.database.writing() as connection:
        kept: dict[str, None] = {}
        for target in (*store.refs().values(), store.head()):
            kept |= store.ancestors(target)
        known = [row["id"] for row in connection.execute("SELECT id FROM commits")]
        removed = [(commit_id,) for commit_id in known if commit_id not in kept]
        connection.executemany("DELETE FROM commits WHERE id = ?", removed)
    # A new transaction: an object goes only once no commit can bring it back.
    with store.database.writing() as connection:
        needed = {row["object"] for row in connection.execute("SELECT object FROM commits")}
        store.objects.settle(needed)
        unneeded = [sha for sha in store.objects.settled() if sha not in needed]
        num_bytes = sum(store.objects.remove(sha) for sha in unneeded)
    return Removed(len(removed), len(unneeded), num_bytes)
