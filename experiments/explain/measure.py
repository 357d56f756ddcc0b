"""Does explain tell text about what was learned from other text? 24 facts in three updates.

python experiments/explain/measure.py       # teach, measure, write results/smollm2.json and the README
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from run import CACHE, load_specs  # noqa: E402 - experiments/run.py, which is a script too

from sparsemem import console  # noqa: E402
from sparsemem.data import load_questions, load_texts  # noqa: E402
from sparsemem.evaluation.metrics import mean  # noqa: E402
from sparsemem.files import read_json, write_json  # noqa: E402
from sparsemem.memory.checkpoint import read_header  # noqa: E402
from sparsemem.slots.usage import USAGE_FILE, load_usage  # noqa: E402
from sparsemem.store.load import load  # noqa: E402
from sparsemem.study.explain import explain, taught_updates  # noqa: E402
from sparsemem.study.learn import learn  # noqa: E402
from sparsemem.study.provenance import peak_bytes, provenance  # noqa: E402
from sparsemem.study.run import attached_folder  # noqa: E402
from sparsemem.study.table import Table, with_block  # noqa: E402

RESULT = HERE / "results" / "smollm2.json"
README = HERE / "README.md"
NUM_UPDATES, FACTS_PER_UPDATE = 3, 8
NUM_TEXTS = 76
"""Of each kind; as many as there are facts of experiments/facts that are not taught."""


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description="Measure where explain says that something fires.").parse_args(argv)
    return console.exit_code(run)


def run() -> None:
    write_json(RESULT, measure())
    README.write_text(with_answer(README.read_text(encoding="utf-8"), read_json(RESULT)), encoding="utf-8")


def measure() -> dict[str, Any]:
    started = time.perf_counter()
    spec = load_specs(HERE.parent / "facts", CACHE / "data")["memory.seed-0"]
    origin = provenance(data=spec.files)
    facts, data = spec.load_facts(), CACHE / "data"
    taught = facts[: NUM_UPDATES * FACTS_PER_UPDATE]
    texts = {
        "held-out questions about what was taught": [q for fact in taught for q in fact.heldout_questions],
        "questions about facts that were not": [fact.question for fact in facts[len(taught) :]],
        "NaturalQuestions": [row.question for row in load_questions(data / "nq_500.jsonl")],
        "Wikipedia": load_texts(data / "heldout_wiki.jsonl"),
    }
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "memory"
        shutil.copytree(attached_folder(spec, spec.load_background(), CACHE), folder)
        for start in range(0, len(taught), FACTS_PER_UPDATE):
            learn(folder, taught[start : start + FACTS_PER_UPDATE], probes=[], config=spec.finetune_config)
        model, tokenizer = load(folder)
        parts = model, tokenizer, load_usage(folder / USAGE_FILE), taught_updates(folder)
        values = {name: rates([explain(*parts, text) for text in of_kind[:NUM_TEXTS]])
                  for name, of_kind in texts.items()}  # fmt: skip
        header = read_header(folder)
    return {
        "config": spec.described(),
        "num_taught": len(taught),
        "num_updates": NUM_UPDATES,
        "kinds": values,
        "seed": spec.finetune_config.seed,
        "seconds": round(time.perf_counter() - started, 1),
        **origin,
        "model_sha": header["base_fingerprint"],
        "peak_bytes": peak_bytes(),
    }


def rates(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    tokens = [token for result in results for token in result["tokens"]]
    return {
        "num_texts": len(results),
        "num_tokens": len(tokens),
        "texts_that_fire": mean([float(result["fires"]) for result in results]),
        "tokens_that_fire": mean([float(token["fires"]) for token in tokens]),
        "kl_all": mean([result["kl_all"] for result in results]),
        "kl_all_max": max(result["kl_all"] for result in results),
        "kl_all_max_where_nothing_fires": max(
            (result["kl_all"] for result in results if not result["fires"]), default=0.0
        ),
        "num_passes_max": max(result["num_passes"] for result in results),
    }


def with_answer(readme: str, result: dict[str, Any]) -> str:
    """Return the README with its answer made anew."""
    rows = tuple(
        (
            name,
            str(kind["num_texts"]),
            f"{kind['texts_that_fire']:.1%}",
            f"{kind['tokens_that_fire']:.2%}",
            f"{kind['kl_all']:.2g}",
            f"{kind['kl_all_max_where_nothing_fires']:.2g}",
        )
        for name, kind in result["kinds"].items()
    )
    head = ("texts", "number", "texts that fire", "tokens that fire", "what was learned moves, nats")
    about, *others = result["kinds"].values()
    elsewhere = " / ".join(f"{kind['texts_that_fire']:.1%}" for kind in others)
    quiet = max(kind["kl_all_max_where_nothing_fires"] for kind in others)
    return with_block(
        readme,
        "answer",
        f"**After {result['num_taught']} facts in {result['num_updates']} updates something fires in "
        f"{about['texts_that_fire']:.0%} of the held-out questions about them, and in {elsewhere} of the "
        f"other texts; where nothing does, what was learned moved the next token by {quiet:.2g} nats at "
        "most.**\n\n"
        + Table((*head, "at most where nothing fires"), rows).markdown()
        + f"\n`results/smollm2.json`, commit {str(result['commit'])[:7]}, {result['seconds']:.0f} s.\n",
    )


if __name__ == "__main__":
    sys.exit(main())
