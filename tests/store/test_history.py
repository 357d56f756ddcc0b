import os
import sqlite3

import pytest
import torch
from tests.conftest import content

from sparsemem.errors import CheckpointError, HistoryError, OutputError, PoolMismatchError
from sparsemem.memory.delta import RowChange, SparseDelta
from sparsemem.store.commits import fact_rows
from sparsemem.store.database import HISTORY_FILE
from sparsemem.store.history import DeltaStore

from .conftest import NUM_SLOTS, WIDTH


def test_a_folder_without_a_history_is_not_touched_by_looking(store):
    before = sorted(store.folder.rglob("*"))
    assert (len(store), store.head(), store.refs(), store.log(), store.journal()) == (0, None, {}, [], [])
    assert store.resolve("HEAD") is store.resolve("attached") is store.resolve("main") is None
    assert store.state(None) == {}
    assert sorted(store.folder.rglob("*")) == before


def test_a_commit_keeps_its_rows_message_and_details(store, learner):
    delta = learner.delta([3, 9, 4])
    details = {"report": {"note": "ü"}, "facts": []}
    commit = store.commit(delta, "what this is\nü", details)
    assert store.log() == [commit]
    assert (commit.parent, commit.message, commit.num_slots) == (None, "what this is\nü", 3)
    assert commit.digest == delta.digest == store.delta(commit.id).digest
    assert commit.time.endswith("+00:00")
    assert store.details(commit.id) == details
    assert DeltaStore(store.folder).get(commit.id) == commit
    kept = content(store.folder)
    assert list(kept) == [
        "memory_config.json", "memory.safetensors", f"objects/{commit.object[:2]}/{commit.object}.safetensors"
    ] or set(kept) >= {f"objects/{commit.object[:2]}/{commit.object}.safetensors"}  # fmt: skip


def test_each_version_has_the_rows_of_its_day(store, learner):
    states = [learner.pool.current(torch.arange(NUM_SLOTS))]
    for slots in ([1, 2, 3], [3, 4], [2, 60], [1, 2, 3, 4, 60]):
        learner.commit(slots)
        states.append(learner.pool.current(torch.arange(NUM_SLOTS)))
    fresh = type(learner)(DeltaStore(store.folder), learner.pool)
    for number, expected in enumerate(states):
        revision = str(number) if number else "attached"
        assert torch.equal(fresh.rows(revision), expected)
    for commit, before, after in zip(reversed(store.log()), states[:-1], states[1:], strict=True):
        change = store.delta(commit.id).changes["layer_1"]
        assert torch.equal(change.before, before[change.slot_ids])
        assert torch.equal(change.after, after[change.slot_ids])
    digests = {commit.id: delta.digest for commit, delta in store.deltas()}
    assert list(digests) == [commit.id for commit in reversed(store.log())]
    assert digests == {commit.id: commit.digest for commit in store.log()}


def test_rows_before_are_stored_once_and_slots_that_share_a_row_share_it(store, learner):
    ids = torch.arange(50)
    rows = torch.randn(1, WIDTH).expand(50, -1)
    first = SparseDelta({"layer_1": RowChange(ids, torch.zeros(50, WIDTH), rows.clone(), NUM_SLOTS)})
    second = SparseDelta({"layer_1": RowChange(ids, rows.clone(), 2 * rows, NUM_SLOTS)})
    for delta, expected in ((first, (1, 1)), (second, (1, 0))):
        stored = store.objects.read(store.commit(delta).object)["layer_1"]
        assert (len(stored.after), len(stored.before)) == expected


def test_revisions(store, learner):
    a, b, c = (learner.commit([n]) for n in (1, 2, 3))
    store.create_ref("tag", "v1.0", "HEAD~1")
    expected = {
        "HEAD": c, "last": c, "main": c, "3": c, "HEAD~0": c, "HEAD~1": b, "v1.0": b, "v1.0~1": a, "1": a,
        "main~2": a, a.id: a, b.id[:8]: b,
    }  # fmt: skip
    assert {name: store.resolve(name) for name in expected} == {n: of.id for n, of in expected.items()}
    assert store.resolve("HEAD~3") is store.resolve("1~1") is store.resolve("attached") is None
    assert [commit.id for commit in store.log("v1.0")] == [b.id, a.id]


@pytest.mark.parametrize(
    "revision", ["0", "2", "nonsense", "", "abc", "LAST", "HEAD~x", "ffffffffff", "HEAD~9"]
)
def test_an_unknown_revision_is_named(store, learner, revision):
    learner.commit([1])
    with pytest.raises(HistoryError, match=f"{revision!r}"):
        store.resolve(revision)


def test_of_no_update_none_is_the_last(store):
    with pytest.raises(HistoryError, match="'last'; it has 0"):
        store.resolve("last")


def test_undo_goes_back_on_the_branch_and_keeps_the_commit(store, learner):
    first, second = learner.commit([1]), learner.commit([1, 2])
    undone, delta = store.undo()
    assert (undone, delta.digest) == (second, second.digest)
    assert store.log() == [first]
    assert store.get(second.id) == second
    again = learner.commit([5])
    assert again.parent == first.id
    for _ in range(2):
        store.undo()
    assert store.head() is None
    with pytest.raises(HistoryError, match="no update to undo; it is as it was attached") as caught:
        store.undo()
    assert isinstance(caught.value, LookupError)


def test_branches_move_and_tags_stay(store, learner):
    a = learner.commit([1])
    store.create_ref("branch", "team-b")
    store.create_ref("tag", "v1")
    store.checkout("team-b")
    b = learner.commit([2])
    assert store.refs("branch") == {"main": a.id, "team-b": b.id}
    assert store.refs("tag") == {"v1": a.id}
    store.checkout("main")
    assert torch.equal(learner.rows(), learner.rows(a.id))
    store.delete_ref("branch", "team-b")
    assert store.get(b.id) == b
    with pytest.raises(HistoryError, match="checked out"):
        store.delete_ref("branch", "main")
    with pytest.raises(HistoryError, match="no tag 'v2'; it has v1"):
        store.delete_ref("tag", "v2")


def test_a_version_without_a_branch_can_be_learned_on(store, learner):
    a, b = learner.commit([1]), learner.commit([2])
    store.checkout(a.id[:9])
    c = learner.commit([3])
    assert (c.parent, store.head(), store.refs("branch")) == (a.id, c.id, {"main": b.id})
    store.checkout("attached")
    assert store.head() is None
    assert learner.commit([4]).parent is None
    store.checkout("main")
    assert store.head() == b.id


@pytest.mark.parametrize("name", ["HEAD", "last", "attached", "12", "abcd", "", "a~1", "../x", "a b", "-d"])
def test_names_that_mean_something_else_are_refused(store, learner, name):
    learner.commit([1])
    with pytest.raises(HistoryError, match="cannot name"):
        store.create_ref("branch", name)


def test_a_taken_name_and_a_name_for_nothing_are_refused(store, learner):
    with pytest.raises(HistoryError, match="no commit to name"):
        store.create_ref("tag", "v1")
    learner.commit([1])
    store.create_ref("tag", "v1")
    with pytest.raises(HistoryError, match="exists already"):
        store.create_ref("branch", "v1")


def test_the_journal_tells_all_that_happened(store, learner, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_AUTHOR", "Ana")
    a = learner.commit([1])
    store.create_ref("tag", "v1")
    store.checkout("v1")
    store.undo()
    lines = [
        (row["author"], row["action"], row["ref"], row["before"], row["after"]) for row in store.journal()
    ]
    assert lines == [
        ("Ana", "commit", "main", None, a.id),
        ("Ana", "tag", "v1", None, a.id),
        ("Ana", "checkout", a.id, a.id, a.id),
        ("Ana", "undo", a.id, a.id, None),
    ]
    assert a.author == "Ana"


def test_of_two_writers_the_second_is_told(store, learner):
    delta = learner.delta([1])
    other = DeltaStore(store.folder)
    first = store.commit(delta, after=None)
    with pytest.raises(HistoryError, match="something was committed or undone meanwhile; learn again"):
        other.commit(delta, after=None)
    assert store.log() == [first]
    with pytest.raises(PoolMismatchError, match="starts from other rows"):
        other.commit(delta)
    assert store.log() == [first]
    assert store.objects.staged() == []


def test_facts_of_a_version_are_those_taught_and_not_taken_back(store, learner):
    a = learner.commit([1], facts=["Ana", "Bo"])
    gone = fact_rows([])
    store.commit(SparseDelta({}), "forget", {"forgets": [store.facts(a.id)[0]["sha"]], "facts": gone})
    learner.commit([2], facts=["Cy"])
    assert [row["answer"] for row in store.facts(store.head())] == ["Bo", "Cy"]
    assert [row["answer"] for row in store.facts(a.id)] == ["Ana", "Bo"]
    assert store.facts(None) == []


def test_a_write_that_fails_leaves_everything_as_it_was(store, learner, monkeypatch):
    first = learner.commit([1])
    before = content(store.folder)
    delta = learner.delta([2])

    def full_disk(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        store.commit(delta)
    assert (store.log(), content(store.folder)) == ([first], before)
    monkeypatch.undo()
    assert store.commit(delta).parent == first.id


def test_what_a_killed_writer_left_is_removed_by_the_next(store, learner):
    learner.commit([1])
    store.objects.stage(store.objects.read(store.log()[0].object))  # settled already: not written again
    assert store.objects.staged() == []
    (store.objects.incoming / ".x.safetensors.abc.part").write_bytes(b"half")
    (store.objects.incoming / f"{'0' * 64}.safetensors").write_bytes(b"an object without a commit")
    learner.commit([2])
    assert list(store.objects.incoming.iterdir()) == []


def test_an_object_that_was_not_settled_yet_is_found(store, learner, monkeypatch):
    monkeypatch.setattr(store, "settle", lambda: None)  # killed between the commit and the move
    commit = learner.commit([1, 2])
    assert store.objects.staged() == [commit.object]
    reopened = DeltaStore(store.folder)
    assert reopened.delta(commit.id).digest == commit.digest
    reopened.settle()
    assert reopened.objects.staged() == []
    assert reopened.delta(commit.id).digest == commit.digest


@pytest.mark.parametrize("damage", ["truncated", "text", "foreign", "newer"])
def test_a_damaged_database_is_named(store, learner, damage):
    learner.commit([1])
    path = store.folder / HISTORY_FILE
    store.database.close()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "text":
        path.write_bytes(b"not a database, whatever its name says" * 10)
    elif damage == "foreign":
        path.unlink()
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE t (a)")
        other.commit()
        other.close()
    else:
        changed = sqlite3.connect(path)
        changed.execute("UPDATE meta SET value = '99' WHERE name = 'format_version'")
        changed.commit()
        changed.close()
    with pytest.raises(CheckpointError, match=HISTORY_FILE):
        DeltaStore(store.folder).log()


def test_a_read_only_copy_can_be_read(store, learner, tmp_path):
    commit = learner.commit([1])
    store.database.close()
    (store.folder / HISTORY_FILE).chmod(0o444)
    assert DeltaStore(store.folder).log() == [commit]


def test_rows_that_were_trained_and_did_not_move_are_part_of_the_delta(store, learner):
    learner.commit([1, 2])
    change = learner.delta([2, 3]).changes["layer_1"]
    still = SparseDelta({"layer_1": RowChange(change.slot_ids, change.before, change.before, NUM_SLOTS)})
    assert store.delta(store.commit(still).id).digest == still.digest
