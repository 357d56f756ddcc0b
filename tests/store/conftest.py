"""A saved tiny memory with a history, and a pool beside it that is written in the same way."""

import pytest
import torch

from sparsemem.data import Fact
from sparsemem.memory.checkpoint import save
from sparsemem.memory.delta import DeltaRecorder
from sparsemem.memory.pool import Pool
from sparsemem.store.commits import fact_rows
from sparsemem.store.history import DeltaStore

NUM_SLOTS, WIDTH = 64, 32


class Learner:
    """Writes random rows to a pool and commits them: stands for training."""

    def __init__(self, store, pool):
        self.store, self.pool, self.seed = store, pool, 0

    def delta(self, slot_ids):
        recorder = DeltaRecorder({"layer_1": self.pool})
        ids = torch.tensor(sorted(slot_ids))
        recorder.record("layer_1", ids)
        self.seed += 1
        self.pool.write(ids, torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(self.seed)))
        return recorder.delta()

    def commit(self, slot_ids, message="", facts=()):
        """Commit new rows on top of what is checked out."""
        self.check_out()
        taught = fact_rows(Fact(question=f"Who is {name}?", answer=name) for name in facts)
        return self.store.commit(self.delta(slot_ids), message, {"facts": taught})

    def check_out(self):
        self.pool.write(torch.arange(NUM_SLOTS), self.rows())

    def rows(self, revision="HEAD"):
        """All rows of a version."""
        rows = torch.zeros(NUM_SLOTS, WIDTH)
        for state in self.store.state(self.store.resolve(revision)).values():
            rows[state.slot_ids] = state.now.take(torch.arange(len(state.slot_ids)))
        return rows


@pytest.fixture
def folder(attached, tmp_path):
    save(attached, tmp_path / "memory", base_model="nowhere")
    return tmp_path / "memory"


@pytest.fixture
def store(folder):
    return DeltaStore(folder)


@pytest.fixture
def learner(store):
    return Learner(store, Pool(NUM_SLOTS, WIDTH))
