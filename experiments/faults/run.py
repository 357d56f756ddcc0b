"""Kill a process that commits, merges, undoes and collects, again and again: is anything ever lost?

    python experiments/faults/run.py            # 200 kills, a minute; writes results/kills.json

A forked child works on a history and tells of each change once it is reported as done; the parent kills it
(SIGKILL) after a random time, then opens the history: every byte must check out, all that was reported must
be there, and what was not reported either stands as a whole or has left no trace.
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from sparsemem.errors import HistoryError
from sparsemem.files import file_sha256, write_json
from sparsemem.memory.checkpoint import CONFIG_FILE, FORMAT, FORMAT_VERSION, WEIGHTS_FILE
from sparsemem.memory.delta import RowChange, SparseDelta
from sparsemem.store.history import DeltaStore
from sparsemem.store.integrity import gc, verify
from sparsemem.store.merge import commit_change, merge
from sparsemem.store.state import difference
from sparsemem.study.provenance import provenance

NUM_SLOTS, WIDTH, ROWS = 4096, 16, 200
LONGEST_SECONDS = 0.25


def make_folder(folder: Path) -> None:
    """Make as much of a memory folder as a history needs."""
    folder.mkdir(parents=True)
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "base_model": "", "base_fingerprint": ""}
    sha = file_sha256(folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, {**header, "weights_sha256": sha, "memory": {}})


def random_delta(store: DeltaStore, rng: random.Random) -> SparseDelta:
    """New rows for some slots of the version that is checked out."""
    slot_ids = torch.tensor(sorted(rng.sample(range(NUM_SLOTS), ROWS)))
    before = torch.zeros(ROWS, WIDTH)
    for state in store.state(store.head()).values():
        places, known = state.find(slot_ids)
        before[known] = state.now.take(places[known])
    after = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    return SparseDelta({"p": RowChange(slot_ids, before, after, NUM_SLOTS)})


def work(folder: Path, told: int, seed: int) -> None:
    """Change the history until killed; of each commit a line is written to `told` when it is done."""
    rng = random.Random(seed)
    store = DeltaStore(folder)
    while True:
        action = rng.random()
        if action < 0.6 or store.head() is None:
            commit = store.commit(random_delta(store, rng), "commit", {"facts": [{"sha": str(rng.random())}]})
        elif action < 0.75:
            commit = work_on_a_branch(store, rng)
        elif action < 0.9:
            gc(store)
            continue
        else:
            store.checkout("main")
            continue
        os.write(told, commit.id.encode() + b"\n")


def work_on_a_branch(store: DeltaStore, rng: random.Random):
    """Learn on a branch and merge it."""
    store.checkout("main")
    name = f"branch-{rng.randrange(10**9)}x"
    store.create_ref("branch", name)
    store.checkout(name)
    store.commit(random_delta(store, rng), "on a branch")
    store.checkout("main")
    store.commit(random_delta(store, rng), "on main")
    change = merge(store, name)
    assert change is not None
    return commit_change(store, change, "merge", "merge", "theirs")


def kill_once(folder: Path, seed: int) -> list[str]:
    """Let a child work and kill it; returns the commits it reported."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            work(folder, writer, seed)
        finally:
            os._exit(1)  # it never ends by itself
    os.close(writer)
    time.sleep(random.Random(seed).random() * LONGEST_SECONDS)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child failed before it was killed"
    with os.fdopen(reader) as told:
        return [line.strip() for line in told if line.endswith("\n")]


def check(folder: Path, reported: list[str]) -> dict[str, int]:
    """Open the history as the next process would; raises AssertionError if anything is lost or left."""
    store = DeltaStore(folder)
    assert verify(store) == []
    head = store.head()
    known: dict[str, None] = {}
    for target in (head, *store.refs().values()):
        known |= store.ancestors(target)
    # Nothing that was reported is ever taken back here.
    assert set(reported) <= set(known)
    for commit in store.log()[:3]:
        assert store.delta(commit.id).digest == commit.digest
    # The next writer removes whatever the killed one left.
    empty = store.commit(difference(store.state(head), store.state(head)), "after the kill")
    assert list(store.objects.incoming.iterdir()) == []
    gc(store)
    objects = {row["object"] for row in store.database.rows("SELECT object FROM commits")}
    assert set(store.objects.settled()) == objects
    store.undo()
    assert store.head() == head != empty.id
    store.database.close()
    return {"commits": len(known), "objects": len(objects)}


def race(folder: Path, num_commits: int) -> int:
    """Two processes commit at once, each until it has done so `num_commits` times; returns the refusals."""
    reader, writer = os.pipe()
    children = []
    for seed in (1, 2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(writer, race_alone(DeltaStore(folder), num_commits, random.Random(seed)))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    os.close(writer)
    assert [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    with os.fdopen(reader, "rb") as told:
        return told.read().count(b"r")


def race_alone(store: DeltaStore, num_commits: int, rng: random.Random) -> bytes:
    refused = b"d"
    done = 0
    while done < num_commits:
        head = store.head()
        delta = random_delta(store, rng)
        try:
            store.commit(delta, f"{done}", after=head)
            done += 1
        except HistoryError:
            refused += b"r"
    return refused


def main() -> None:
    torch.set_num_threads(1)
    num_kills = 200
    origin = provenance()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "killed"
        make_folder(folder)
        num_reported = 0
        for seed in range(num_kills):
            reported = kill_once(folder, seed)
            num_reported += len(reported)
            after = check(folder, reported)
        other = Path(temporary) / "raced"
        make_folder(other)
        num_refused = race(other, 40)
        store = DeltaStore(other)
        assert verify(store) == []
        assert len(store) == 80
    result = {"kills": num_kills, "reported_commits": num_reported, "lost": 0, "problems": 0, "after": after}
    raced = {"writers": 2, "commits": 80, "refused_and_retried": num_refused}
    path = Path(__file__).parent / "results" / "kills.json"
    write_json(path, {"killed": result, "raced": raced, "seed": 0, **origin})
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
