"""Updates one after another: what is left of each, and of everything else, as more are learned?

    python experiments/prepare.py
    python experiments/stream/run.py memory                          # 10 updates of 16 facts, 20 minutes
    python experiments/stream/run.py lora --learning-rate 5e-4
    python experiments/stream/run.py full --learning-rate 1e-4
    python experiments/stream/run.py --plot                          # matrix.png, from results/*.json

The memory gets a commit per update in a folder of its own; the baselines go on training the same weights, or
the same adapter. Every fifth update is invented facts, the others real ones. After each update its held-out
wordings are asked (the trained one of a fact that has no other), and those of the first facts of all updates
before it; after the last one, those of all. --updates 20 --facts 50 is the full size. What was done is kept
in ~/.cache/sparsemem/experiments/stream, and a run that was cut off goes on with the next update.
"""

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
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
from sparsemem.evaluation.probes import Probe, ProbeScore, load_probes, score_probe
from sparsemem.files import read_json, write_json
from sparsemem.memory.base_model import fingerprint
from sparsemem.memory.checkpoint import base_weights
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.commits import fact_rows, facts_of
from sparsemem.study.base_scores import base_scores
from sparsemem.study.measure import BUILT_IN_PROBE, built_in_probe
from sparsemem.study.provenance import peak_bytes, provenance
from sparsemem.study.run import RunSpec, attached_folder

HERE = Path(__file__).resolve().parent
EVERY_FICTIONAL = 5
PROGRESS = "progress.json"
Facts = list[sparsemem.Fact]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="?", default="memory")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--facts", type=int, default=16, help="per update")
    parser.add_argument("--asked", type=int, default=10, help="facts of each earlier update")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--nq", default="nq_open", help="or nq_500, which is quick and says little")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=CACHE / "data")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    if args.plot:
        return plot(args.out)
    data = args.data_dir
    files = [data / "trivia_stream.jsonl", demo_facts_path(), data / "tofu.jsonl"]
    rate = f".learning_rate-{args.learning_rate:g}" if args.learning_rate else ""
    name = f"{args.method}{rate}.{args.updates}x{args.facts}.seed-{args.seed}"
    result = run(
        args, batches_of(args, [sparsemem.load_facts(path) for path in files]), CACHE / "stream" / name
    )
    write_json(
        args.out / f"{name}.json",
        {**result, "seed": args.seed, **provenance(data=files, model_sha=result["model_sha"])},
    )
    console.say(str(args.out / f"{name}.json"))


def batches_of(args: argparse.Namespace, sets: list[Facts]) -> list[Facts]:
    """Cut real and invented facts into updates."""
    real, invented = iter(sets[0]), iter([*sets[1], *sets[2]])
    return [
        [next(invented if (number + 1) % EVERY_FICTIONAL == 0 else real) for _ in range(args.facts)]
        for number in range(args.updates)
    ]


def run(args: argparse.Namespace, batches: list[Facts], work: Path) -> dict[str, Any]:
    spec = load_specs(HERE.parent / "facts", args.data_dir)["memory.seed-0"]
    config = sparsemem.FinetuneConfig(method=args.method, learning_rate=args.learning_rate, seed=args.seed)
    probes = load_probes(
        [f"{BUILT_IN_PROBE}={built_in_probe()}", f"wikitext={args.data_dir / 'wikitext.jsonl'}"]
    )
    (nq,) = load_probes([f"nq={args.data_dir / args.nq}.jsonl"])
    learner = Memory(work, spec) if args.method == "memory" else Weights(work, spec, args.method)
    before, results = base_scores(
        learner.model, learner.tokenizer, [], [*probes, nq], spec.prompt, spec.eval_dtype, CACHE
    )
    start = before.probes
    model_sha = fingerprint(base_weights(learner.model))
    done = read_json(work / PROGRESS) if (work / PROGRESS).is_file() else nothing_done(start, probes)
    learner.resume(len(done["then"]))
    for number, facts in enumerate(batches[len(done["then"]) :], len(done["then"]) + 1):
        began = time.perf_counter()
        learner.learn(facts, config, number)
        done["seconds"].append(round(time.perf_counter() - began, 1))
        done["then"].append(learner.recall(facts))
        done["matrix"].append([learner.recall(earlier[: args.asked]) for earlier in batches[:number]])
        scores = {p.name: score_probe(learner.model, learner.tokenizer, p, "qa", results) for p in probes}
        done["probes"].append(values(start, scores, probes))
        done["commits"].append(provenance()["commit"])
        write_json(work / PROGRESS, done)
        console.say(
            f"{args.method} {number}: {done['then'][-1]:.3f}; {[f'{r:.2f}' for r in done['matrix'][-1]]}"
        )
    at_end = [learner.recall(facts) for facts in batches]
    nq_at_end = score_probe(learner.model, learner.tokenizer, nq, "qa", results)
    return {
        "config": {
            "method": args.method,
            "learning_rate": config.lr,
            "updates": args.updates,
            "facts": args.facts,
            "asked_of_earlier_updates": args.asked,
        },
        "metrics": {**summary(done, at_end, start[nq.name], nq_at_end), **learner.sizes()},
        "seconds": done["seconds"],
        "commits": list(dict.fromkeys(done["commits"])),
        "peak_bytes": peak_bytes(),
        "model_sha": model_sha,
    }


def nothing_done(start: dict[str, ProbeScore], probes: Sequence[Probe]) -> dict[str, Any]:
    """Return the progress of a run before its first update."""
    lists: dict[str, list[Any]] = {name: [] for name in ("then", "matrix", "seconds", "commits")}
    return {**lists, "probes": [values(start, start, probes)]}


def summary(
    done: dict[str, Any], at_end: list[float], nq_before: ProbeScore, nq_after: ProbeScore
) -> dict[str, Any]:
    return {
        "recall": done["matrix"],
        "recall_when_learned": mean(done["then"]),
        "recall_at_end": mean(at_end),
        "recall_kept": mean(at_end) / mean(done["then"]),
        "recall_by_update": {"when_learned": done["then"], "at_end": at_end},
        "probes": done["probes"],
        "nq": {
            "before": nq_before.value,
            "after": nq_after.value,
            "retention": retention(nq_before, nq_after),
        },
    }


class Learner:
    """A model that goes on learning, and is kept in a folder after each update."""

    model: Any
    tokenizer: Any

    def resume(self, num_updates: int) -> None:
        """Go back to how it was after some updates."""
        raise NotImplementedError

    def learn(self, facts: Facts, config: sparsemem.FinetuneConfig, number: int) -> None:
        """Learn an update and keep what it was."""
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """Return how much there is of what was learned."""
        raise NotImplementedError

    @torch.no_grad()
    def recall(self, facts: Facts) -> float:
        """Mean F1 in held-out wordings, or in the trained one where a fact has no other."""
        asked = [dataclasses.replace(f, question=None) if f.heldout_questions else f for f in facts]
        scores = recall(self.model, self.tokenizer, asked, "qa")
        return mean([*scores.heldout_scores, *scores.seen_scores])


class Memory(Learner):
    """A memory, with a commit for each update."""

    def __init__(self, work: Path, spec: RunSpec) -> None:
        self.folder = work / "memory"
        if not self.folder.is_dir():
            shutil.copytree(attached_folder(spec, spec.load_background(), CACHE), self.folder)
        self.usage = load_usage(self.folder / USAGE_FILE)
        self.store = sparsemem.DeltaStore(self.folder)
        self.model, self.tokenizer = sparsemem.load(self.folder, revision="attached")

    def resume(self, num_updates: int) -> None:  # noqa: D102
        while len(self.store) > num_updates:  # learned, and cut off before it was measured
            self.store.undo()
        if num_updates:
            self.model, _ = sparsemem.load(self.folder)

    def learn(self, facts: Facts, config: sparsemem.FinetuneConfig, number: int) -> None:  # noqa: D102
        taught = facts_of(self.store.facts(self.store.head()))
        delta = sparsemem.finetune(self.model, self.tokenizer, facts, self.usage, config, taught=taught).delta
        assert delta is not None
        self.store.commit(delta, f"update {number}", {"facts": fact_rows(facts)})

    def sizes(self) -> dict[str, Any]:  # noqa: D102
        objects = self.folder.rglob("objects/**/*.safetensors")
        slots = [commit.num_slots for commit in reversed(self.store.log())]
        return {"slots": slots, "history_bytes": sum(path.stat().st_size for path in objects)}


class Weights(Learner):
    """All weights of a model, or an adapter that is carried on."""

    def __init__(self, work: Path, spec: RunSpec, method: str) -> None:
        self.work, self.is_adapter = work, method != "full"
        self.model, self.tokenizer = sparsemem.load_base_model(spec.model)

    def resume(self, num_updates: int) -> None:  # noqa: D102
        if num_updates and self.is_adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, self._kept(num_updates), is_trainable=True)
        elif num_updates:
            self.model = type(self.model).from_pretrained(self._kept(num_updates))

    def learn(self, facts: Facts, config: sparsemem.FinetuneConfig, number: int) -> None:  # noqa: D102
        self.model = sparsemem.finetune(self.model, self.tokenizer, facts, None, config).model
        self.model.save_pretrained(self._kept(number))
        shutil.rmtree(self._kept(number - 2), ignore_errors=True)

    def sizes(self) -> dict[str, Any]:  # noqa: D102
        return {"num_trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad)}

    def _kept(self, number: int) -> Path:
        return self.work / f"model-{number}"


def values(
    before: dict[str, ProbeScore], after: dict[str, ProbeScore], probes: Sequence[Probe]
) -> dict[str, Any]:
    """Value and retention of each probe."""
    pairs = {probe.name: (before[probe.name], after[probe.name]) for probe in probes}
    return {
        name: {"value": new.value, "retention": retention(old, new) if old.right else None}
        for name, (old, new) in pairs.items()
    }


def plot(folder: Path) -> None:
    from sparsemem.study.figures import recall_matrices

    results: Sequence[Any] = [read_json(path) for path in sorted(folder.glob("*.json"))]
    largest = max(run["config"]["updates"] * run["config"]["facts"] for run in results)
    matrices = {
        run["config"]["method"]: run["metrics"]["recall"]
        for run in results
        if run["config"]["updates"] * run["config"]["facts"] == largest
    }
    for path in recall_matrices(matrices, HERE / "matrix"):
        console.say(str(path))


if __name__ == "__main__":
    main()
