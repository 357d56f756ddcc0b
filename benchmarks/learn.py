"""Seconds until facts are known in wordings never trained on: memory, LoRA and full finetuning.

    python benchmarks/learn.py         # about half an hour on 2 cores; a table, beside the committed one
    python benchmarks/learn.py --json

Each method trains the same facts with the same batches, wordings and loss in float32, at the learning rate
that was best for it in experiments/facts, one epoch in turn with the others, in a process of its own.
"memory_held" also holds what the model says to other questions about the subjects, as `sparsemem learn` does,
which costs it texts that the others do not see. After each epoch the held-out questions are asked, off the
clock; a method is done when their F1 reaches the target. A memory is given as many epochs as it needs by
experiments/facts, since with the last its rows become the mean of what they were; it may be done before.
The facts are the first 100 of experiments/facts where experiments/prepare.py was run, else the 32 of demo.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import parser, peak_bytes, publish, restart_peak

import sparsemem
from sparsemem.cli.demo import demo_facts_path, installed_data
from sparsemem.evaluation.evaluate import recall
from sparsemem.memory.base_model import fingerprint
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.study.attach import attach_to_folder

PREPARED = Path("~/.cache/sparsemem/experiments/data/trivia.jsonl").expanduser()
CONTENDERS: dict[str, dict[str, Any]] = {
    "memory": {"num_epochs": 8, "penalty": "none"},
    "memory_held": {"num_epochs": 8},
    "lora": {"num_epochs": 32, "learning_rate": 1e-3},
    "full": {"num_epochs": 32, "learning_rate": 1e-4},
}
TARGET = 0.8
NUM_FACTS = 100
NUM_BACKGROUND = 2000


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--target", type=float, default=TARGET, help=f"held-out F1 (default: {TARGET})")
    options.add_argument("--num-facts", type=int, default=NUM_FACTS, help=f"default: {NUM_FACTS}")
    options.add_argument("--worker", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        return work(args, *args.worker)
    gguf, articles = installed_data()
    base, _ = sparsemem.load_base_model(str(gguf))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "memory"
        background = Path(temporary) / "background.jsonl"
        rows = (json.dumps({"text": article}) + "\n" for article in articles[:NUM_BACKGROUND])
        background.write_text("".join(rows), encoding="utf-8")
        started = time.perf_counter()
        attach_to_folder(str(gguf), [str(background)], folder)
        attach_seconds = time.perf_counter() - started
        epochs = in_turn(args, folder)
    reached = {method: seconds_to(args.target, of) for method, of in epochs.items()}
    of_processor = {m: seconds_to(args.target, of, "processor_seconds") for m, of in epochs.items()}
    own, held = reached["memory"], reached["memory_held"]
    with_attach = None if own is None else own + attach_seconds
    ratios = {
        "lora_over_memory_seconds": over(reached["lora"], own),
        "full_over_memory_seconds": over(reached["full"], own),
        "lora_over_memory_held_seconds": over(reached["lora"], held),
        "full_over_memory_held_seconds": over(reached["full"], held),
        "lora_over_memory_and_attach_seconds": over(reached["lora"], with_attach),
        "full_over_memory_and_attach_seconds": over(reached["full"], with_attach),
        "lora_over_memory_processor_seconds": over(of_processor["lora"], of_processor["memory"]),
        "full_over_memory_processor_seconds": over(of_processor["full"], of_processor["memory"]),
        "memory_over_lora_peak_bytes": over(peak(epochs["memory"]), peak(epochs["lora"])),
        "memory_over_full_peak_bytes": over(peak(epochs["memory"]), peak(epochs["full"])),
    }
    result = {
        "ratios": ratios,
        "target_heldout_f1": args.target,
        "num_facts": len(facts_of(args)),
        "options": CONTENDERS,
        "seconds": reached,
        "processor_seconds": of_processor,
        "epochs_needed": {method: len(of) for method, of in epochs.items()},
        "attach_seconds": attach_seconds,
        "epochs": epochs,
    }
    publish("learn", result, args, model_sha=fingerprint(base.named_parameters()), data=[facts_path()])


def in_turn(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Let the methods train an epoch in turn until each has reached the target or its last epoch."""
    command = [sys.executable, __file__, "--target", str(args.target), "--num-facts", str(args.num_facts)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {
        method: subprocess.Popen([*command, "--worker", method, str(folder)], **pipes)
        for method in CONTENDERS
    }
    epochs: dict[str, list[dict[str, Any]]] = {method: [] for method in workers}
    running = dict(workers)
    for worker in workers.values():
        worker.stdout.readline()  # ready
    while running:
        for method, worker in list(running.items()):
            worker.stdin.write("go\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"the run of {method} failed, see above")
            epochs[method].append(json.loads(line))
            done = epochs[method][-1]
            print(f"{method:11} epoch {len(epochs[method]):2}: {json.dumps(done)}", file=sys.stderr)
            last = len(epochs[method]) == CONTENDERS[method]["num_epochs"]
            if last or done["heldout_f1"] >= args.target:
                worker.stdin.close()
                worker.wait()
                del running[method]
    return epochs


def work(args: argparse.Namespace, contender: str, folder: str) -> None:
    """Train one contender, an epoch for each line on stdin."""
    method, usage = contender.partition("_")[0], None
    if method == "memory":
        model, tokenizer = sparsemem.load(folder)
        usage = load_usage(Path(folder) / USAGE_FILE)
    else:
        model, tokenizer = sparsemem.load_base_model(str(installed_data()[0]))
    facts = facts_of(args)
    config = sparsemem.FinetuneConfig(method=method, **CONTENDERS[contender])
    print("ready", flush=True)
    sys.stdin.readline()
    restart_peak()
    started, processor = time.perf_counter(), time.process_time()

    def ask(trained: Any) -> None:
        nonlocal started, processor
        done = {
            "seconds": round(time.perf_counter() - started, 2),
            "processor_seconds": round(time.process_time() - processor, 2),
            "peak_bytes": peak_bytes(),
            "heldout_f1": recall(trained, tokenizer, facts, "qa").heldout_f1,
        }
        print(json.dumps(done), flush=True)
        if not sys.stdin.readline():
            sys.exit()
        restart_peak()
        started, processor = time.perf_counter(), time.process_time()

    sparsemem.finetune(model, tokenizer, facts, usage, config, evaluate=ask)


def facts_path() -> str:
    return str(PREPARED) if PREPARED.is_file() else demo_facts_path()


def facts_of(args: argparse.Namespace) -> list[sparsemem.Fact]:
    return sparsemem.load_facts(facts_path())[: args.num_facts]


def seconds_to(target: float, epochs: list[dict[str, Any]], kind: str = "seconds") -> float | None:
    """Seconds of training up to the target; None if it was not reached."""
    if epochs[-1]["heldout_f1"] < target:
        return None
    return round(sum(epoch[kind] for epoch in epochs), 2)


def peak(epochs: list[dict[str, Any]]) -> int | None:
    return max((epoch["peak_bytes"] for epoch in epochs if epoch["peak_bytes"]), default=None)


def over(other: float | None, own: float | None) -> float | None:
    return None if other is None or own is None else round(other / own, 3)


if __name__ == "__main__":
    main()
