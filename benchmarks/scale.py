"""Does the cost of learning follow what is learned? Up to 10,000 facts, and up to 16,777,216 slots.

    python benchmarks/scale.py

Facts are made up: 256 slots of one row each, no slot of two facts. Rows are 64 wide, as 10,000 facts of 576
would be 6 GB. "learn_new" is one update of slots that were never written (activate, read, go back, step,
write), "learn_again" one of slots that were; "read" and both read 256 tokens with 16 heads of 8 reads. One
read in sixteen finds a row that is there and, while learning, one in sixteen a row that is trained. "lookup"
finds such reads. "commit" makes the object of one update of all the facts. Facts grow in a pool of 4,194,304
slots, the pool grows around 100 facts.
"""

from typing import Any

import torch
from timing import in_turn, parser, publish
from torch import Tensor

from sparsemem.memory.delta import RowChange, SparseDelta
from sparsemem.memory.layer import MemoryLayer, init_memory
from sparsemem.memory.pool import Pool
from sparsemem.store.objects import to_bytes
from sparsemem.store.state import stored
from sparsemem.training.optim import SlotOptimizer

FACTS, KEYS_WHILE_FACTS_GROW = (10, 100, 1000, 10_000), 2048
NUM_KEYS, FACTS_WHILE_KEYS_GROW = (256, 512, 1024, 2048, 4096), 100
WIDTH, SLOTS_PER_FACT, NUM_TOKENS, NUM_HEADS, TOP_K = 64, 256, 256, 16, 8
FEW_ROUNDS, ROUNDS = 3, 15


class Learned:
    """A memory that holds some facts."""

    def __init__(self, num_keys: int, num_facts: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.num_facts = num_facts
        self.pool = Pool(num_keys**2, WIDTH)
        self.layer = MemoryLayer(
            WIDTH, self.pool, num_keys=num_keys, num_heads=NUM_HEADS, top_k=TOP_K, query_dim=16
        )
        init_memory(self.layer, self.generator)
        self.hidden, self.gradient = torch.randn(2, NUM_TOKENS, WIDTH, generator=self.generator)
        shuffled = torch.randperm(self.pool.num_slots, generator=self.generator)
        self.written, rest = shuffled.split(
            [num_facts * SLOTS_PER_FACT, len(shuffled) - num_facts * SLOTS_PER_FACT]
        )
        self.fresh = iter(rest.split(SLOTS_PER_FACT))
        rows = torch.randn(num_facts, WIDTH, generator=self.generator)
        self.pool.write(self.written, rows.repeat_interleave(SLOTS_PER_FACT, dim=0))
        self.unwritten = rest.flip(0)[: len(rest) // 2]
        self.weights = torch.full((NUM_TOKENS, NUM_HEADS * TOP_K), 1 / TOP_K)
        self.slot_ids = self.reads_of(self.unwritten)
        self.slot_ids[:, ::16] = self.reads_of(self.written)[:, ::16]
        self.optimizer = SlotOptimizer({"pool": self.pool}, lr=0.1)

    def reads_of(self, slot_ids: Tensor) -> Tensor:
        shape = NUM_TOKENS, NUM_HEADS * TOP_K
        return slot_ids[torch.randint(len(slot_ids), shape, generator=self.generator)]

    @torch.no_grad()
    def lookup(self) -> None:
        self.layer.lookup(self.hidden)

    @torch.no_grad()
    def read(self) -> None:
        self.pool.read(self.slot_ids, self.weights)

    def learn(self, slot_ids: Tensor) -> None:
        reads = self.slot_ids.clone()
        reads[:, 1::16] = slot_ids.view(-1, 1)[:NUM_TOKENS]
        self.pool.activate(slot_ids)
        self.pool.read(reads, self.weights).backward(self.gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pool.deactivate()

    def learn_new(self) -> None:
        self.learn(next(self.fresh))

    def learn_again(self) -> None:
        self.learn(self.written[:SLOTS_PER_FACT])

    def commit(self) -> int:
        after = self.pool.current(self.written)
        change = RowChange(self.written, torch.zeros_like(after), after, self.pool.num_slots)
        return len(to_bytes(stored(SparseDelta({"pool": change}), {})))


def measure(memories: dict[int, Learned], names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Time each of some methods, all memories in turn."""
    return {name: in_turn({at: getattr(m, name) for at, m in memories.items()}, rounds) for name in names}


def growth(times: dict[str, Any], small: int, large: int) -> dict[str, float]:
    return {name: of[large]["median_seconds"] / of[small]["median_seconds"] for name, of in times.items()}


def main() -> None:
    args = parser(__doc__).parse_args()
    steps = ("learn_new", "learn_again", "read")
    by_facts = {num: Learned(KEYS_WHILE_FACTS_GROW, num) for num in FACTS}
    num_bytes = {num: memory.commit() for num, memory in by_facts.items()}  # before learning unties rows
    facts = measure(by_facts, steps, ROUNDS)
    commits = measure({num: m for num, m in by_facts.items() if num < FACTS[-1]}, ("commit",), FEW_ROUNDS)
    rows_bytes = {num: memory.pool.rows.nbytes for num, memory in by_facts.items()}
    del by_facts
    by_keys = {num: Learned(num, FACTS_WHILE_KEYS_GROW) for num in NUM_KEYS}
    keys = measure(by_keys, (*steps, "lookup"), ROUNDS)
    ratios = {
        **{
            f"{name}_10000_facts_over_10": ratio for name, ratio in growth(facts, FACTS[0], FACTS[-1]).items()
        },
        **{
            f"{name}_16m_slots_over_65k": ratio
            for name, ratio in growth(keys, NUM_KEYS[0], NUM_KEYS[-1]).items()
        },
        "commit_bytes_per_fact_10000_facts_over_10": num_bytes[10_000] / num_bytes[10] / 1000,
        "commit_seconds_per_fact_1000_facts_over_10": growth(commits, 10, 1000)["commit"] / 100,
    }
    result = {
        "ratios": ratios,
        "facts": facts,
        "slots": {num**2: {name: of[num] for name, of in keys.items()} for num in NUM_KEYS},
        "commit_bytes": num_bytes,
        "commits": commits,
        "rows_bytes": rows_bytes,
    }
    publish("scale", result, args)


if __name__ == "__main__":
    main()
