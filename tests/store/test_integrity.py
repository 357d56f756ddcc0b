import sqlite3

import pytest
from tests.conftest import content

from sparsemem.memory.checkpoint import WEIGHTS_FILE
from sparsemem.store.history import DeltaStore
from sparsemem.store.integrity import gc, verify


@pytest.fixture
def commits(store, learner):
    return [learner.commit([n, n + 1]) for n in (1, 2, 9)]


def test_a_sound_history_has_no_problem(store, commits):
    assert verify(store) == []
    store.undo()
    assert verify(store) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_object_is_named_and_never_served(store, commits, damage, place):
    path = store.objects.path(commits[place].object)
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-3])
    fresh = DeltaStore(store.folder)
    (problem,) = verify(fresh)
    assert path.name in problem
    assert commits[place].id[:10] in problem
    for commit in commits[place:]:
        with pytest.raises(Exception, match=path.name):
            fresh.state(commit.id)
    for commit in commits[:place]:
        assert fresh.state(commit.id)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE commits SET message = 'harmless' WHERE parent IS NULL", "not what its id says"),
        ("UPDATE commits SET details = '{}' WHERE parent IS NULL", "not what its id says"),
        ("DELETE FROM commits WHERE parent IS NULL", "lacks its parent"),
        ("UPDATE refs SET target = 'ff'", "main names commit ff, which is not there"),
    ],
)
def test_an_edited_database_is_found(store, commits, statement, expected):
    store.database.close()
    connection = sqlite3.connect(store.folder / "history.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()
    assert any(expected in problem for problem in verify(DeltaStore(store.folder)))


def test_damaged_weights_are_found(store, commits):
    path = store.folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (problem,) = verify(store)
    assert WEIGHTS_FILE in problem


def test_gc_removes_what_nothing_leads_to(store, learner, commits):
    store.create_ref("tag", "v1", "HEAD~1")
    before = content(store.folder)
    assert (gc(store).num_commits, content(store.folder)) == (0, before)
    for _ in range(2):
        store.undo()
    gone = gc(store)
    assert (gone.num_commits, gone.num_objects) == (1, 1)
    assert gone.num_bytes > 0
    assert content(store.folder).items() < before.items()
    assert [commit.id for commit in store.log("v1")] == [commits[1].id, commits[0].id]
    assert verify(store) == []
    store.delete_ref("tag", "v1")
    store.undo()
    assert gc(store).num_commits == 2
    assert not any(name.startswith("objects") for name in content(store.folder))


def test_gc_keeps_both_parents_of_a_merge(store, learner, commits):
    from sparsemem.store.merge import commit_change, merge

    store.create_ref("branch", "b", "HEAD~1")
    store.checkout("b")
    learner.commit([30])
    store.checkout("main")
    commit_change(store, merge(store, "b"), "", "merge")
    store.delete_ref("branch", "b")
    assert gc(store).num_commits == 0
    assert verify(store) == []
