"""Does a history stay quick as it grows? 10,000 commits of 500 rows: log, checkout, commit, size.

    python benchmarks/history.py --json

The commits are made as `DeltaStore.commit` makes them, without its check of the rows before, which would read
the whole history each time. Rows are 64 wide, as 576 would be 11 GB. Slots are drawn so that
nearly all writes of later commits meet a slot that was written before.
"""

import os
import tempfile
import time
from pathlib import Path

import torch
from timing import parser, publish

from sparsemem.memory.delta import RowChange, SparseDelta
from sparsemem.memory.pool import Pool
from sparsemem.store.commits import canonical, commit_digest, insert, now
from sparsemem.store.history import DeltaStore
from sparsemem.store.objects import StoredRows
from sparsemem.store.state import write

NUM_SLOTS, WIDTH, ROWS = 2**22, 64, 500


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--commits", type=int, default=10_000)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = DeltaStore(folder)
        fill(store, args.commits)
        store.database.close()
        times = {}
        fresh = DeltaStore(folder)
        times["log"] = seconds(fresh.log)
        for name, revision in (("checkout_last", "HEAD"), ("checkout_middle", f"HEAD~{args.commits // 2}")):
            fresh = DeltaStore(folder)
            pool = Pool(NUM_SLOTS, WIDTH)
            times[name] = seconds(lambda f=fresh, r=revision, p=pool: write(f.state(f.resolve(r)), {"p": p}))
        fresh.state(fresh.head())
        change = RowChange(torch.arange(ROWS), torch.zeros(ROWS, WIDTH), torch.ones(ROWS, WIDTH), NUM_SLOTS)
        places, known = fresh.state(fresh.head())["p"].find(change.slot_ids)
        change.before[known] = fresh.state(fresh.head())["p"].now.take(places[known])
        times["commit"] = seconds(lambda: fresh.commit(SparseDelta({"p": change})))
        num_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    rows_bytes = 4 * WIDTH * ROWS * args.commits
    slots_bytes = (4 + 4 + 4) * ROWS * args.commits
    result = {
        "ratios": {
            "size_over_distinct_rows": num_bytes / rows_bytes,
            "size_over_rows_and_slot_ids": num_bytes / (rows_bytes + slots_bytes),
            "seconds_log": times["log"],
            "seconds_checkout_last": times["checkout_last"],
            "seconds_checkout_middle": times["checkout_middle"],
            "seconds_commit": times["commit"],
        },
        "commits": args.commits,
        "rows_per_commit": ROWS,
        "width": WIDTH,
        "bytes": num_bytes,
    }
    publish("history", result, args)


def seconds(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def fill(store: DeltaStore, num_commits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    written = torch.zeros(NUM_SLOTS, dtype=torch.bool)
    fsync, os.fsync = os.fsync, lambda _handle: None  # no power cut is to be survived here
    parent = None
    store.database.rows("SELECT 1")
    with store.database.writing() as connection:
        for number in range(num_commits):
            slot_ids = torch.randperm(NUM_SLOTS // 8, generator=generator)[:ROWS].mul(8).sort().values
            after = torch.randn(ROWS, WIDTH, generator=generator)
            is_new = ~written[slot_ids]
            written[slot_ids] = True
            before_index = torch.where(is_new, 0, -1)
            rows = StoredRows(
                slot_ids, after, torch.arange(ROWS), torch.zeros(1, WIDTH), before_index, NUM_SLOTS
            )
            record = {
                "parent": parent, "second_parent": None, "time": now(), "author": "benchmark",
                "message": f"update {number}", "object": store.objects.stage({"p": rows}),
                "digest": "", "num_slots": ROWS, "details": canonical({"facts": [{"sha": str(number)}]}),
            }  # fmt: skip
            parent = commit_digest(record)
            insert(connection, parent, record)
        connection.execute("INSERT OR REPLACE INTO refs VALUES ('main', 'branch', ?)", (parent,))
    os.fsync = fsync
    store.settle()


if __name__ == "__main__":
    main()
