"""Changes of a version that come from other versions: revert, cherry-pick, merge.

Each is a delta on the version that is checked out. Where its rows are not those the change began with,
two things that were learned want the same slot: that is a conflict, and is named, not guessed away.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from sparsemem.errors import HistoryError
from sparsemem.memory.delta import RowChange, SparseDelta
from sparsemem.store.commits import Commit, FactRow
from sparsemem.store.history import DeltaStore
from sparsemem.store.state import State, difference

Side = Literal["ours", "theirs"]


@dataclasses.dataclass(frozen=True)
class Change:
    """What another version would change here.

    Args:
        delta: The rows that can be changed, from those of the version that is checked out.
        conflicts: The rows that were written here too, in the way they would change.
        commits: The commits here that wrote those slots.
        at_stake: The facts these taught.
        details: `facts` and `forgets` of the commit to come.
        second_parent: The other side of a merge.
    """

    delta: SparseDelta
    conflicts: SparseDelta
    commits: tuple[Commit, ...]
    at_stake: tuple[FactRow, ...]
    details: Mapping[str, Any]
    second_parent: str | None = None

    def settled(self, side: Side | None) -> SparseDelta:
        """Return the delta to commit, with conflicts settled for one side.

        Raises:
            HistoryError: There are conflicts, and no side is given.
        """
        num = self.conflicts.num_slots_trained
        if num and side is None:
            facts = ", ".join(repr(describe(row)) for row in self.at_stake[:5])
            rest = f" and {len(self.at_stake) - 5} more" if len(self.at_stake) > 5 else ""
            writers = ", ".join(commit.title for commit in self.commits[:5])
            raise HistoryError(
                f"{num} slots were written by {writers or 'a later commit'} too; at stake: "
                f"{facts or 'facts that the history does not keep'}{rest}. Choose --ours (leave these "
                "slots as they are), --theirs (change them, and damage those facts) or --relearn (change "
                "them, and teach those facts again)"
            )
        return joined(self.delta, self.conflicts) if side == "theirs" else self.delta


def revert(store: DeltaStore, revision: str) -> Change:
    """What takes one commit back, wherever in the history of the checked-out version it is.

    Exact where no later commit wrote the same slot: those rows are what they would be without it.

    Raises:
        HistoryError: The checked-out version does not contain it.
    """
    commit = _commit(store, revision)
    chain = store.log()
    if commit.id not in {c.id for c in chain}:
        raise HistoryError(f"{commit.title} is not in the history of what is checked out; nothing to revert")
    delta = store.delta(commit.id)
    later = chain[: [c.id for c in chain].index(commit.id)]
    details = store.details(commit.id)
    known = {row["sha"]: row for row in store.facts(store.head())}
    before = {row["sha"]: row for row in store.facts(commit.parent)}
    # What was taught more than once stays known.
    others = {*before, *(row["sha"] for row in _taught(store, later, known))}
    gone = [row["sha"] for row in _taught(store, [commit], known) if row["sha"] not in others]
    returned = [before[sha] for sha in details.get("forgets", ()) if sha in before and sha not in known]
    return _change(store, delta.invert(), later, {"facts": returned, "forgets": gone, "reverts": commit.id})


def cherry_pick(store: DeltaStore, revision: str) -> Change:
    """What one commit of another branch changes here."""
    commit = _commit(store, revision)
    if commit.id in store.ancestors(store.head()):
        raise HistoryError(f"{commit.title} is in what is checked out already; nothing to pick")
    details = {name: store.details(commit.id).get(name, []) for name in ("facts", "forgets")}
    return _change(store, store.delta(commit.id), store.log(), {**details, "picks": commit.id})


def merge(store: DeltaStore, revision: str) -> Change | None:
    """What was learned on another branch since it parted from this one; None if all of it is here."""
    other, head = store.resolve(revision), store.head()
    ours = store.ancestors(head)
    if other is None or other in ours:
        return None
    base = next((commit for commit in store.ancestors(other) if commit in ours), None)
    delta = difference(store.state(base), store.state(other))
    known_here = {row["sha"] for row in store.facts(head)}
    known_base = {row["sha"]: row for row in store.facts(base)}
    known_there = {row["sha"]: row for row in store.facts(other)}
    details = {
        "facts": [row for sha, row in known_there.items() if sha not in known_here and sha not in known_base],
        "forgets": [sha for sha in known_base if sha not in known_there and sha in known_here],
        "merges": other,
    }
    before = store.ancestors(base)
    since = [commit for commit in store.log() if commit.id not in before]
    change = _change(store, delta, since, details)
    # Where both sides wrote a slot, what either taught there is at stake.
    there = [commit for commit in store.log(other) if commit.id not in before]
    taught = _taught(store, _writers(store, there, change.conflicts), known_there)
    at_stake = tuple({row["sha"]: row for row in (*change.at_stake, *taught)}.values())
    return dataclasses.replace(change, second_parent=other, at_stake=at_stake)


def can_fast_forward(store: DeltaStore, revision: str) -> bool:
    """Whether another version is this one and more, so that it can just be taken."""
    head, other = store.head(), store.resolve(revision)
    return other is not None and (head is None or head in store.ancestors(other))


def commit_change(
    store: DeltaStore, change: Change, message: str, action: str, side: Side | None = None
) -> Commit:
    """Commit a change, conflicts settled for one side; raises HistoryError as `Change.settled`."""
    head = store.head()
    delta = change.settled(side)
    return store.commit(
        delta, message, change.details, after=head, second_parent=change.second_parent, action=action
    )


def joined(first: SparseDelta, second: SparseDelta) -> SparseDelta:
    """Put two deltas of different slots together."""
    changes = dict(first.changes)
    for name, change in second.changes.items():
        if name in changes:
            slot_ids, order = torch.cat([changes[name].slot_ids, change.slot_ids]).sort()
            before = torch.cat([changes[name].before, change.before])[order]
            after = torch.cat([changes[name].after, change.after])[order]
            change = RowChange(slot_ids, before, after, change.num_slots)
        changes[name] = change
    return SparseDelta(changes)


def describe(row: FactRow) -> str:
    """Say a fact in a few words."""
    return str(row.get("question") or row.get("statement") or row["sha"])[:80]


def _change(store: DeltaStore, delta: SparseDelta, writers: list[Commit], details: dict[str, Any]) -> Change:
    """Split a delta into what applies to the rows here, and what does not."""
    state = store.state(store.head())
    applies: dict[str, RowChange] = {}
    conflicts: dict[str, RowChange] = {}
    for name, change in delta.changes.items():
        current = _current(state, name, change)
        as_it_was, as_wanted = (
            (current.view(torch.int32) == rows.view(torch.int32)).all(dim=1)
            for rows in (change.before, change.after)
        )
        for mask, found in ((as_it_was & ~as_wanted, applies), (~as_it_was & ~as_wanted, conflicts)):
            if mask.any():
                found[name] = RowChange(
                    change.slot_ids[mask], current[mask], change.after[mask], change.num_slots
                )
    commits = _writers(store, writers, SparseDelta(conflicts))
    alive = {row["sha"]: row for row in store.facts(store.head())}
    return Change(
        SparseDelta(applies), SparseDelta(conflicts), commits, _taught(store, commits, alive), details
    )


def _current(state: State, name: str, change: RowChange) -> torch.Tensor:
    """Rows of the slots of a change in a version; where that never wrote one, as the change found it."""
    if name not in state:
        return change.before
    places, known = state[name].find(change.slot_ids)
    rows = change.before.clone()
    rows[known] = state[name].now.take(places[known])
    return rows


def _writers(store: DeltaStore, commits: Iterable[Commit], conflicts: SparseDelta) -> tuple[Commit, ...]:
    """Which commits wrote a slot of the conflicts."""
    found = []
    for commit in commits if conflicts.changes else ():
        written = store.objects.read(commit.object)
        if any(
            name in written and bool(torch.isin(change.slot_ids, written[name].slot_ids).any())
            for name, change in conflicts.changes.items()
        ):
            found.append(commit)
    return tuple(found)


def _taught(
    store: DeltaStore, commits: Iterable[Commit], alive: Mapping[str, FactRow]
) -> tuple[FactRow, ...]:
    """Facts that commits taught and that were not taken back since."""
    taught = {row["sha"]: row for commit in commits for row in store.details(commit.id).get("facts", ())}
    return tuple(row for sha, row in taught.items() if sha in alive)


def _commit(store: DeltaStore, revision: str) -> Commit:
    found = store.resolve(revision)
    if found is None:
        raise HistoryError(f"{revision!r} is the memory as attached, which is no commit; name one")
    return store.get(found)
