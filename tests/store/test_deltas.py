import errno
import os

import pytest
import torch

import sparsemem.files
from sparsemem.errors import CheckpointError, HistoryError, OutputError
from sparsemem.memory.delta import RowChange, SparseDelta
from sparsemem.memory.pool import Pool
from sparsemem.store.deltas import DeltaStore


def make_delta(number):
    """The change of one row from `number` to `number + 1`, so that deltas form a chain."""
    before, after = torch.full((1, 4), float(number)), torch.full((1, 4), float(number + 1))
    return SparseDelta({"p": RowChange(torch.tensor([3]), before, after, 16)})


@pytest.fixture
def store(tmp_path):
    return DeltaStore(tmp_path)


def files(store):
    return sorted(str(p.relative_to(store.folder)) for p in store.folder.rglob("*") if p.is_file())


def test_each_commit_is_one_numbered_file(store):
    assert (len(store), store.updates()) == (0, [])
    for number in range(3):
        update = store.commit(make_delta(number), f"message {number}", {"seconds": number})
        assert update.number == number + 1
        assert update.path == store.folder / "deltas" / f"{number + 1:06d}.safetensors"
    assert files(store) == [f"deltas/00000{number}.safetensors" for number in (1, 2, 3)]
    assert len(store) == 3


def test_a_commit_keeps_its_message_time_digest_and_report(store):
    report = {"facts": {"num": 2}, "note": "ü"}
    committed = store.commit(make_delta(0), "what this is\nü", report)
    assert store.updates() == [committed]
    assert (committed.message, committed.report) == ("what this is\nü", report)
    assert committed.digest == make_delta(0).digest
    assert committed.time.endswith("+00:00")


def test_undo_takes_the_last_one_back_and_keeps_its_file(store):
    for number in range(2):
        store.commit(make_delta(number))
    content = (store.folder / "deltas/000002.safetensors").read_bytes()
    update, delta = store.undo()
    assert update.number == 2
    assert delta.digest == make_delta(1).digest
    assert [u.number for u in store.updates()] == [1]
    (undone,) = (store.folder / "deltas/undone").iterdir()
    assert undone.read_bytes() == content
    assert store.commit(make_delta(1)).number == 2


def test_an_update_can_be_undone_again_after_being_learned_again(store):
    for _ in range(2):
        store.commit(make_delta(0))
        store.undo()
    assert len(store) == 0
    with pytest.raises(HistoryError, match="no update to undo"):
        store.undo()


def test_undo_with_none_is_an_error(store):
    with pytest.raises(HistoryError, match="no update to undo; it is as it was attached") as caught:
        store.undo()
    assert isinstance(caught.value, LookupError)
    assert files(store) == []


@pytest.mark.parametrize(
    ("revision", "expected"),
    [("1", [2, 1, 0]), ("2", [2, 1]), ("3", [2]), ("last", [2])],
)
def test_since_lists_an_update_and_the_later_ones_newest_first(store, revision, expected):
    for number in range(3):
        store.commit(make_delta(number))
    found = [delta.digest for delta in store.since(revision)]
    assert found == [make_delta(number).digest for number in expected]
    by_digest = store.since(make_delta(expected[-1]).digest[:12])
    assert [delta.digest for delta in by_digest] == found


def test_since_inverted_gives_the_rows_before_that_update(store):
    pool = Pool(16, 4)
    for number in range(3):
        store.commit(make_delta(number))
        make_delta(number).apply({"p": pool})
    for delta in store.since("2"):
        delta.invert().apply({"p": pool})
    assert torch.equal(pool.current(torch.tensor([3])), torch.ones(1, 4))


@pytest.mark.parametrize("revision", ["0", "4", "-1", "nonsense", "", "abc", "LAST"])
def test_an_unknown_revision_is_named(store, revision):
    for number in range(3):
        store.commit(make_delta(number))
    with pytest.raises(HistoryError, match=f"no update '{revision}'; it has 3"):
        store.since(revision)


def test_of_no_update_none_is_the_last(store):
    with pytest.raises(HistoryError, match="'last'; it has 0"):
        store.since("last")


def test_a_commit_on_top_of_fewer_updates_than_there_are_is_refused(store):
    store.commit(make_delta(0))
    before = files(store)
    with pytest.raises(HistoryError, match=r"update 1 .* was committed meanwhile; learn again"):
        store.commit(make_delta(0), after=0)
    assert files(store) == before
    assert store.commit(make_delta(1), after=1).number == 2


def test_a_commit_on_top_of_an_update_that_was_undone_meanwhile_is_refused(store):
    for number in range(2):
        store.commit(make_delta(number))
    store.undo()
    before = files(store)
    with pytest.raises(HistoryError, match="learn again"):
        store.commit(make_delta(2), after=2)
    assert files(store) == before


def test_a_failing_write_leaves_no_file(store, monkeypatch):
    store.commit(make_delta(0))
    before = files(store)

    def full_disk(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sparsemem.files, "save_file", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        store.commit(make_delta(1))
    assert files(store) == before
    assert len(store) == 1


def test_a_failing_link_is_an_output_error_or_none(store, monkeypatch):
    """Some file systems (FAT, some network shares) have no hard links."""

    def no_links(*_args, **_kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    try:
        store.commit(make_delta(0))
    except OutputError:
        assert files(store) == []
    else:
        assert files(store) == ["deltas/000001.safetensors"]


def test_what_is_no_update_is_not_listed(store):
    store.commit(make_delta(0))
    for name in (".000002.safetensors.1.staged", "notes.txt", "2.safetensors", "000002.part"):
        (store.folder / "deltas" / name).touch()
    assert [update.number for update in store.updates()] == [1]


@pytest.mark.parametrize("kept", [0, 7, 100, -3])
def test_a_truncated_update_is_named_and_cannot_be_undone(store, kept):
    path = store.commit(make_delta(0)).path
    path.write_bytes(path.read_bytes()[:kept])
    before = files(store)
    for action in (store.undo, store.updates, lambda: store.since("last")):
        with pytest.raises(CheckpointError, match=r"000001\.safetensors is damaged"):
            action()
    assert files(store) == before


def test_a_flipped_byte_is_found(store):
    path = store.commit(make_delta(0)).path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="digest"):
        store.undo()
