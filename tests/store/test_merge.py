import pytest
import torch

from sparsemem.errors import HistoryError
from sparsemem.memory.delta import SparseDelta
from sparsemem.store.merge import can_fast_forward, cherry_pick, commit_change, merge, revert

from .conftest import NUM_SLOTS


def answers(rows):
    return [row["answer"] for row in rows]


def test_a_commit_from_the_middle_is_taken_back_as_if_it_never_was(store, learner):
    learner.commit([1, 2], facts=["Ana"])
    middle = learner.commit([5, 6], facts=["Bo"])
    learner.commit([8, 9], facts=["Cy"])
    expected = learner.rows().clone()
    expected[[5, 6]] = 0
    change = revert(store, "2")
    assert (change.conflicts.num_slots_trained, change.at_stake, change.commits) == (0, (), ())
    commit = commit_change(store, change, "revert", "revert")
    assert torch.equal(learner.rows(), expected)
    assert answers(store.facts(commit.id)) == ["Ana", "Cy"]
    assert store.details(commit.id)["reverts"] == middle.id
    # and a revert can be reverted
    commit_change(store, revert(store, "HEAD"), "again", "revert")
    assert torch.equal(learner.rows(), learner.rows("3"))
    assert sorted(answers(store.facts(store.head()))) == ["Ana", "Bo", "Cy"]


def test_reverting_names_the_facts_whose_slots_were_written_since(store, learner):
    learner.commit([1, 2, 3], facts=["Ana"])
    learner.commit([3, 4], "later", facts=["Bo"])
    learner.commit([9], "elsewhere", facts=["Cy"])
    before, change = learner.rows(), revert(store, "1")
    assert change.conflicts.num_slots_trained == 1
    assert [commit.message for commit in change.commits] == ["later"]
    assert answers(change.at_stake) == ["Bo"]
    with pytest.raises(
        HistoryError, match=r"1 slots were written by .*\(later\) too; at stake: 'Who is Bo\?'"
    ):
        commit_change(store, change, "", "revert")
    assert torch.equal(learner.rows(), before)
    commit_change(store, change, "", "revert", "ours")
    expected = before.clone()
    expected[[1, 2]] = 0
    assert torch.equal(learner.rows(), expected)
    store.undo()
    commit_change(store, change, "", "revert", "theirs")
    expected[3] = 0
    assert torch.equal(learner.rows(), expected)


@pytest.mark.parametrize("number", ["1", "2"])
def test_what_was_taught_twice_stays_known_when_once_is_taken_back(store, learner, number):
    learner.commit([1, 2], facts=["Ana"])
    learner.commit([5, 6], facts=["Ana"])
    commit = commit_change(store, revert(store, number), "", "revert")
    assert answers(store.facts(commit.id)) == ["Ana"]


def test_only_what_is_in_the_history_can_be_reverted(store, learner):
    learner.commit([1])
    store.create_ref("branch", "b")
    store.checkout("b")
    other = learner.commit([2])
    store.checkout("main")
    with pytest.raises(HistoryError, match="not in the history of what is checked out"):
        revert(store, other.id)
    with pytest.raises(HistoryError, match="is no commit"):
        revert(store, "attached")


@pytest.fixture
def branches(store, learner):
    """Two branches on one commit: `main` with [1, 2] and [10], `b` with [1, 2] and [20]."""
    learner.commit([1, 2], facts=["Ana"])
    store.create_ref("branch", "b")
    learner.commit([10], "ours", facts=["Bo"])
    store.checkout("b")
    learner.commit([20], "theirs", facts=["Cy"])
    return learner


def test_a_merge_has_what_both_sides_learned(store, branches):
    store.checkout("main")
    expected = branches.rows("b") + branches.rows("main") - branches.rows("main~1")
    change = merge(store, "b")
    commit = commit_change(store, change, "merge b", "merge")
    assert torch.equal(branches.rows(), expected)
    assert (commit.parent, commit.second_parent) == (store.resolve("HEAD~1"), store.resolve("b"))
    assert answers(store.facts(commit.id)) == ["Ana", "Bo", "Cy"]
    assert merge(store, "b") is None
    # what comes later on the other side is merged from there on
    store.checkout("b")
    branches.commit([21], facts=["Di"])
    store.checkout("main")
    later = merge(store, "b")
    assert later.delta.changes["layer_1"].slot_ids.tolist() == [21]
    assert answers(later.details["facts"]) == ["Di"]


def test_slots_written_on_both_sides_are_a_conflict(store, branches):
    branches.commit([10, 11], "theirs too", facts=["Ed"])
    theirs = branches.rows()
    store.checkout("main")
    ours, change = branches.rows(), merge(store, "b")
    assert change.conflicts.changes["layer_1"].slot_ids.tolist() == [10]
    assert sorted(answers(change.at_stake)) == ["Bo", "Ed"]
    with pytest.raises(HistoryError, match="--relearn"):
        commit_change(store, change, "", "merge")
    for side, slot_10 in (("ours", ours[10]), ("theirs", theirs[10])):
        commit_change(store, change, "", "merge", side)
        assert torch.equal(branches.rows()[10], slot_10)
        assert torch.equal(branches.rows()[[11, 20]], theirs[[11, 20]])
        store.undo()


def test_both_sides_may_have_made_the_same_change(store, branches):
    store.checkout("main")
    change = cherry_pick(store, "b")
    picked = commit_change(store, change, "pick", "cherry-pick")
    assert answers(store.facts(picked.id)) == ["Ana", "Bo", "Cy"]
    merged = merge(store, "b")
    assert (merged.delta.changes, merged.conflicts.changes) == ({}, {})
    assert merged.details["facts"] == []


def test_a_pick_takes_one_commit_and_not_those_before_it(store, branches):
    branches.commit([30, 31], "wanted", facts=["Ed"])
    wanted = branches.rows()
    store.checkout("main")
    expected = branches.rows()
    commit_change(store, cherry_pick(store, "b"), "pick", "cherry-pick")
    expected[[30, 31]] = wanted[[30, 31]]
    assert torch.equal(branches.rows(), expected)
    assert answers(store.facts(store.head())) == ["Ana", "Bo", "Ed"]
    with pytest.raises(HistoryError, match="in what is checked out already"):
        cherry_pick(store, "1")


def test_a_branch_that_only_went_on_is_taken_as_it_is(store, learner):
    learner.commit([1])
    store.create_ref("branch", "b")
    store.checkout("b")
    learner.commit([2])
    store.checkout("main")
    assert can_fast_forward(store, "b")
    learner.commit([3])
    assert not can_fast_forward(store, "b")
    assert not can_fast_forward(store, "attached")


def test_a_revert_of_nothing_changes_no_row(store, learner):
    learner.commit([1], facts=["Ana"])
    empty = store.commit(SparseDelta({}), "nothing")
    before = learner.rows()
    commit_change(store, revert(store, empty.id), "", "revert")
    assert torch.equal(learner.rows(), before)
    assert learner.rows().shape == (NUM_SLOTS, 32)
