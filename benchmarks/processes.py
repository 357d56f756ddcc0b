"""Two processes against one, a thread each, on SmolLM2; and what they exchange in a step.

    python benchmarks/processes.py          # a table, beside the committed one
    python benchmarks/processes.py --json   # with raw seconds and bytes

torchrun starts one process and two in turn. Each teaches the demo's facts, and counts usage; loading is not
timed. On a machine that others use too, two processes fight for a second core that one leaves alone, so
beside the wall time stands the processor time: that of one process over the sum, over steps, of the longer
of two. This is what two free cores would give but for the exchange itself, which waits and does not compute.

Bytes are what a process puts into the sums of a step, measured. "memory_untied" trains a row for each slot,
as in the paper; by default the slots of a fact hold one row. What it puts into gathers, once for each fact,
are the reads that choose its slots.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import parser, publish

from sparsemem import distributed
from sparsemem.cli.demo import demo_facts_path, installed_data
from sparsemem.config import FinetuneConfig
from sparsemem.data import load_facts
from sparsemem.files import write_json, write_jsonl
from sparsemem.memory.checkpoint import load
from sparsemem.slots.usage import USAGE_FILE, count_usage, load_usage
from sparsemem.study.attach import attach_to_folder
from sparsemem.training.finetune import finetune

ROUNDS = 3
TIMED = {"num_facts": 16, "num_documents": 96, "config": {"num_epochs": 2}}
SHORT = {"num_epochs": 1, "facts_per_batch": 2}
EXCHANGES = {
    "memory": {},
    "memory_untied": {"tie_rows": False},
    "lora": {"method": "lora", "penalty": "none"},
    "full": {"method": "full", "penalty": "none"},
}


def work(folder: Path) -> None:
    """Do one job; the main process writes what was measured."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with distributed.processes():
        model, tokenizer = load(folder / "memory")
        usage = load_usage(folder / "memory" / USAGE_FILE)
        facts = load_facts(demo_facts_path())[: job["num_facts"]]
        marks = [time.process_time()]
        result = finetune(
            model, tokenizer, facts, usage, FinetuneConfig(**job["config"]),
            on_step=lambda *_: marks.append(time.process_time()),
        )  # fmt: skip
        traffic = dict(distributed.TRAFFIC)  # before that of this benchmark
        found = {
            "seconds": result.seconds,
            "processor_seconds": _longest(marks),
            "bytes_per_step": traffic.get("sum", 0) / len(result.losses),
            "bytes_gathered": traffic.get("gather", 0),
            "num_slots_per_fact": result.delta.num_slots_trained / len(facts) if result.delta else None,
            "loss": result.losses[-1],
        }
        if job["num_documents"]:
            texts = (folder / "background.txt").read_text(encoding="utf-8").splitlines()
            started, marks = time.perf_counter(), [time.process_time()]
            count_usage(model, tokenizer, texts, num_documents=job["num_documents"], prompt_formats=False)
            found["count_seconds"] = time.perf_counter() - started
            found["count_processor_seconds"] = _longest([*marks, time.process_time()])
        if distributed.is_main():
            write_json(folder / "found.json", found)


def _longest(marks: list[float]) -> float:
    """Sum the processor time of each step in the process where it was longest."""
    own = torch.tensor(marks, dtype=torch.float64).diff().unsqueeze(0)
    return distributed.gathered(own).max(dim=0).values.sum().item()


def launch(folder: Path, num_processes: int, **job: Any) -> dict[str, Any]:
    write_json(folder / "job.json", job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(num_processes), __file__, "--work", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return {"load_average": os.getloadavg()[0], **json.loads((folder / "found.json").read_text("utf-8"))}


def measure(folder: Path) -> dict[str, Any]:
    model, articles = installed_data()
    write_jsonl(folder / "background.jsonl", [{"text": text} for text in articles[:200]])
    lines = "\n".join(" ".join(text.split()) for text in articles[: TIMED["num_documents"]])
    (folder / "background.txt").write_text(lines, encoding="utf-8")
    background = [str(folder / "background.jsonl")]
    attach_to_folder(str(model), background, folder / "memory", num_tokens=20_000, num_documents=200)
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for number, of_number in runs.items():
            of_number.append(launch(folder, number, **TIMED))
    exchanges = {
        name: launch(folder, 2, num_facts=4, num_documents=0, config=SHORT | options)
        for name, options in EXCHANGES.items()
    }
    ratios = {
        f"one_over_two_{name}": _median(runs[1], name) / _median(runs[2], name)
        for name in ("seconds", "processor_seconds", "count_seconds", "count_processor_seconds")
    }
    for other in ("lora", "full"):
        for name in ("memory", "memory_untied"):
            of_other, own = (exchanges[method]["bytes_per_step"] for method in (other, name))
            ratios[f"{other}_over_{name}_bytes_per_step"] = of_other / own
    return {"ratios": ratios, "one": runs[1], "two": runs[2], "exchanges": exchanges}


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.work:
        return work(args.work)
    with tempfile.TemporaryDirectory() as folder:
        publish("processes", measure(Path(folder)), args)


if __name__ == "__main__":
    main()
