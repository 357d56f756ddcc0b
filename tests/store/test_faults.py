"""The script of experiments/faults with a few kills; the long run's result is committed there."""

import importlib.util
import sqlite3
import threading
from pathlib import Path

import pytest

from sparsemem.errors import OutputError
from sparsemem.store.history import DeltaStore
from sparsemem.store.integrity import verify

SCRIPT = Path(__file__).parents[2] / "experiments" / "faults" / "run.py"


@pytest.fixture
def faults():
    spec = importlib.util.spec_from_file_location("faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(faults, tmp_path):
    faults.make_folder(tmp_path / "m")
    return tmp_path / "m"


def test_a_killed_process_loses_nothing_it_reported_and_leaves_nothing_it_did_not(faults, folder):
    num_reported = 0
    for seed in range(8):
        reported = faults.kill_once(folder, seed)
        num_reported += len(reported)
        faults.check(folder, reported)
    assert num_reported > 0


def test_two_writers_at_once_make_one_line_of_commits(faults, folder):
    faults.race(folder, 6)
    store = DeltaStore(folder)
    assert len(store) == 12
    assert verify(store) == []


def test_a_history_that_another_process_is_making_is_waited_for(folder):
    other = sqlite3.connect(folder / "history.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    done = threading.Timer(0.2, other.execute, ["COMMIT"])
    done.start()
    store = DeltaStore(folder)
    with store.database.writing():
        assert not done.is_alive()
    done.join()
    other.close()


def test_the_check_would_find_a_lost_commit(faults, folder):
    store = DeltaStore(folder)
    store.commit(faults.random_delta(store, __import__("random").Random(0)))
    with pytest.raises(AssertionError):
        faults.check(folder, ["0" * 64])


def test_a_database_that_cannot_grow_leaves_the_history_as_it_was(faults, folder):
    import random

    store = DeltaStore(folder)
    first = store.commit(faults.random_delta(store, random.Random(0)))
    with store.database.writing() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutputError, match="full"):
        store.commit(faults.random_delta(store, random.Random(1)), "x" * 100_000)
    connection.execute(f"PRAGMA max_page_count = {2**30}")
    assert store.log() == [first]
    assert verify(store) == []
    second = store.commit(faults.random_delta(store, random.Random(1)))
    assert second.parent == first.id
    assert store.objects.staged() == []


def test_a_lock_that_is_never_given_up_is_told(faults, folder, monkeypatch):
    monkeypatch.setattr("sparsemem.store.database.LOCK_SECONDS", 0.1)
    import random

    store = DeltaStore(folder)
    store.commit(faults.random_delta(store, random.Random(0)))
    other = sqlite3.connect(folder / "history.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutputError, match="locked"):
        store.commit(faults.random_delta(store, random.Random(1)))
    other.execute("ROLLBACK")
    other.close()
    assert len(store) == 1
