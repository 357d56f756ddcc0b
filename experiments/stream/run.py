"""Updates one after another: what is left of each, and of everything else, as more are learned?

    python experiments/prepare.py
    python experiments/stream/run.py memory                          # 10 updates of 16 facts, 25 minutes
    python experiments/stream/run.py lora --learning-rate 1e-3
    python experiments/stream/run.py full --learning-rate 1e-4
    python experiments/stream/run.py --plot                          # matrix.png, from results/*.json

The memory gets a commit per update in a folder of its own; the baselines go on training the same weights, or
the same adapter. Every fifth update is invented facts, the others real ones. After each the held-out wordings
of all facts so far are asked (the trained one of a fact that has no other). --updates 20 --facts 50 is the
full size.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from run import CACHE, load_specs

import sparsemem
from sparsemem import console
from sparsemem.cli.demo import demo_facts_path
from sparsemem.evaluation.evaluate import recall, retention
from sparsemem.evaluation.metrics import mean
from sparsemem.evaluation.probes import load_probes, score_probe
from sparsemem.files import read_json, write_json
from sparsemem.memory.base_model import fingerprint
from sparsemem.memory.checkpoint import base_weights
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.commits import fact_rows
from sparsemem.study.measure import BUILT_IN_PROBE, built_in_probe
from sparsemem.study.provenance import peak_bytes, provenance
from sparsemem.study.run import attached_folder

HERE = Path(__file__).resolve().parent
EVERY_FICTIONAL = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="?", default="memory")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--facts", type=int, default=16, help="per update")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=CACHE / "data")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    if args.plot:
        return plot(args.out)
    data = args.data_dir
    files = [data / "trivia.jsonl", data / "trivia_stream.jsonl", demo_facts_path(), data / "tofu.jsonl"]
    origin = provenance(data=files)
    result = run(args, batches_of(args, [sparsemem.load_facts(path) for path in files]))
    rate = f".learning_rate-{args.learning_rate:g}" if args.learning_rate else ""
    path = args.out / f"{args.method}{rate}.{args.updates}x{args.facts}.seed-{args.seed}.json"
    write_json(path, {**result, "seed": args.seed, **origin, "peak_bytes": peak_bytes()})
    console.say(str(path))


def batches_of(args: argparse.Namespace, sets: list[list[sparsemem.Fact]]) -> list[list[sparsemem.Fact]]:
    """Cut real and invented facts into updates."""
    real, invented = iter([*sets[0], *sets[1]]), iter([*sets[2], *sets[3]])
    return [
        [next(invented if (number + 1) % EVERY_FICTIONAL == 0 else real) for _ in range(args.facts)]
        for number in range(args.updates)
    ]


def run(args: argparse.Namespace, batches: list[list[sparsemem.Fact]]) -> dict[str, Any]:
    spec = load_specs(HERE.parent / "facts", args.data_dir)["memory.seed-0"]
    config = sparsemem.FinetuneConfig(
        method=args.method, learning_rate=args.learning_rate, mixed_precision="bf16", seed=args.seed
    )
    each = load_probes(
        [f"{BUILT_IN_PROBE}={built_in_probe()}", f"wikitext={args.data_dir / 'wikitext.jsonl'}"]
    )
    (nq,) = load_probes([f"nq_500={args.data_dir / 'nq_500.jsonl'}"])
    attached = attached_folder(spec, spec.load_background(), CACHE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(attached, Path(temporary) / "memory")
        usage = load_usage(folder / USAGE_FILE) if args.method == "memory" else None
        if usage:
            model, tokenizer = sparsemem.load(folder)
        else:
            model, tokenizer = sparsemem.load_base_model(spec.model)
        model_sha = fingerprint(base_weights(model))
        store = sparsemem.DeltaStore(folder)
        start = [score_probe(model, tokenizer, probe, "qa") for probe in (*each, nq)]
        probes: list[dict[str, Any]] = [values(each, start, start)]
        matrix, seconds, slots = [], [], []
        for number, facts in enumerate(batches, 1):
            began = time.perf_counter()
            result = sparsemem.finetune(model, tokenizer, facts, usage, config)
            model = result.model
            seconds.append(round(time.perf_counter() - began, 1))
            if result.delta:
                store.commit(result.delta, f"update {number}", {"facts": fact_rows(facts)})
                slots.append(result.delta.num_slots_trained)
            matrix.append([known(model, tokenizer, earlier) for earlier in batches[:number]])
            scores = [score_probe(model, tokenizer, probe, "qa") for probe in each]
            probes.append(values(each, start, scores))
            console.say(
                f"{args.method} update {number}: recall {[round(r, 2) for r in matrix[-1]]} {probes[-1]}"
            )
        at_end = score_probe(model, tokenizer, nq, "qa")
        bytes_of_history = sum(p.stat().st_size for p in folder.rglob("objects/**/*.safetensors"))
    then = mean([row[-1] for row in matrix])
    return {
        "config": {
            "method": args.method,
            "learning_rate": config.lr,
            "updates": args.updates,
            "facts": args.facts,
        },
        "metrics": {
            "recall": matrix,
            "recall_when_learned": then,
            "recall_at_end": mean(matrix[-1]),
            "recall_kept": mean(matrix[-1]) / then,
            "probes": probes,
            "nq_500": {
                "before": start[-1].value,
                "after": at_end.value,
                "retention": retention(start[-1], at_end),
            },
            "slots": slots,
            "history_bytes": bytes_of_history,
        },
        "seconds": seconds,
        "model_sha": model_sha,
    }


@torch.no_grad()
def known(model: Any, tokenizer: Any, facts: list[sparsemem.Fact]) -> float:
    """Mean F1 in held-out wordings, or in the trained one where a fact has no other."""
    scores = recall(model, tokenizer, facts, "qa")
    heldout, seen, found = iter(scores.heldout_scores), iter(scores.seen_scores), []
    for fact in facts:
        trained = [next(seen)] if fact.question else []
        found += [next(heldout) for _ in fact.heldout_questions] or trained
    return mean(found)


def values(probes: Any, before: Any, after: Any) -> dict[str, Any]:
    """Value and retention of each probe."""
    kept = {}
    for probe, old, new in zip(probes, before, after, strict=False):
        kept[probe.name] = {"value": new.value, "retention": retention(old, new) if old.right else None}
    return kept


def plot(folder: Path) -> None:
    from sparsemem.study.figures import recall_matrices

    results = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    matrices = {run["config"]["method"]: run["metrics"]["recall"] for run in results.values()}
    for path in recall_matrices(matrices, HERE / "matrix"):
        console.say(str(path))


if __name__ == "__main__":
    main()
