"""Do chosen slots sit at entity boundaries? Selection on the facts of experiments/facts, nothing is trained.

python experiments/entities/measure.py              # measure, write results/smollm2.json and the README
python experiments/entities/measure.py --readme     # write the README from the result that is there
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from run import CACHE, load_specs  # noqa: E402 - experiments/run.py, which is a script too

from sparsemem import console  # noqa: E402
from sparsemem.files import read_json, write_json  # noqa: E402
from sparsemem.memory.checkpoint import load, read_header  # noqa: E402
from sparsemem.slots.usage import USAGE_FILE, load_usage  # noqa: E402
from sparsemem.study.entities import PLACES, entity_study  # noqa: E402
from sparsemem.study.provenance import peak_bytes, provenance  # noqa: E402
from sparsemem.study.run import attached_folder  # noqa: E402
from sparsemem.study.table import Table, with_block  # noqa: E402

RESULT = HERE / "results" / "smollm2.json"
README = HERE / "README.md"
SHOWN = "500"
"""Slots per fact of the sentence, as in the paper."""
CORE = {
    "size": "read in every wording",
    "rare": "of them rare",
    "at_subject": "read at the subject in every wording",
    "rare_at_subject": "of these rare",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure where chosen slots stand.")
    parser.add_argument("--num-facts", type=int, default=100, metavar="N", help="facts of experiments/facts")
    parser.add_argument("--readme", action="store_true", help="only write the README")
    args = parser.parse_args(argv)
    return console.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    if not args.readme:
        write_json(RESULT, measure(args.num_facts))
    text = README.read_text(encoding="utf-8")
    README.write_text(with_answer(text, read_json(RESULT)), encoding="utf-8")


def measure(num_facts: int) -> dict[str, Any]:
    started = time.perf_counter()
    spec = load_specs(HERE.parent / "facts", CACHE / "data")["memory.seed-0"]
    origin = provenance(data=spec.files)
    folder = attached_folder(spec, spec.load_background(), CACHE)
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder)
    facts = spec.load_facts()[:num_facts]
    with console.progress(f"read {len(facts)} facts") as step:
        values = entity_study(model, tokenizer, load_usage(folder / USAGE_FILE), facts, on_step=step)
    return {
        "config": {"facts": spec.facts, "num_facts": num_facts, "memory": read_header(folder)["memory"]},
        **values,
        "seed": 0,
        "seconds": round(time.perf_counter() - started, 1),
        **origin,
        "model_sha": read_header(folder)["base_fingerprint"],
        "peak_bytes": peak_bytes(),
    }


def with_answer(readme: str, result: dict[str, Any]) -> str:
    """Return the README with its answer and its tables made anew."""
    return with_block(readme, "answer", f"{sentence(result)}\n\n{tables(result)}")


def sentence(result: dict[str, Any]) -> str:
    ranked, lot = (result["selections"][name][SHOWN] for name in ("tf_idf", "random"))
    above, core = ranked["above_chance"], result["core"]
    verdict = "Yes" if above["low"] > 0 and ranked["p"] < 0.05 else "No"
    times = {place: ranked["by_place"][place] / result["token_share"][place] for place in PLACES}
    return (
        f"**{verdict}: of the reads of the {SHOWN} slots that TF-IDF ranks first, "
        f"{percent(ranked['share'])} stand at the fact's subject, where {ranked['token_share']:.1%} of the "
        f"tokens are (p = {ranked['p']:.3f}), and of slots drawn by lot {percent(lot['share'])}; "
        f"the subject's last token has {times['subject, last token']:.1f} times its share of tokens, its "
        f"first {times['subject, first token']:.1f}, the answer {times['answer']:.1f}, the token after the "
        f"subject {times['after subject']:.1f}; and {number(core['size'])} slots are read in every wording "
        f"of a fact (the paper: 100 to 500), {number(core['rare'])} of them rare.**"
    )


def tables(result: dict[str, Any]) -> str:
    selections, core = result["selections"], result["core"]
    rankings = [
        [name, top_t, percent(found["share"]), *rates(found), f"{found['p']:.3f}"]
        for name, by_top_t in selections.items()
        for top_t, found in by_top_t.items()
    ]
    shares = [result["token_share"], *(by_top_t[SHOWN]["by_place"] for by_top_t in selections.values())]
    places = [[place, *(f"{share[place]:.1%}" for share in shares)] for place in PLACES]
    sizes = [
        [label, number(core[key]), f"{core[key]['median']:g}", f"{core[key]['min']} to {core[key]['max']}"]
        for key, label in CORE.items()
    ]
    head = ("ranking", "slots a fact", "reads at the subject", "tokens there", "at shifted subjects", "p")
    return "\n".join(
        (
            table(head, rankings),
            f"Where the reads of {SHOWN} slots a fact stand, all facts together:\n",
            table(("place", "tokens", *selections), places),
            "The core set, slots a fact:\n",
            table(("", "mean (95 % interval)", "median", "range"), sizes),
            f"{result['num_facts']} facts, {result['num_wordings']} wordings, {result['num_tokens']:,} tokens"
            f" with {result['reads_per_token']} reads each at block {result['block']}; intervals over facts;"
            f" {result['seconds']:.0f} s; `results/smollm2.json`, commit {str(result['commit'])[:7]}.\n",
        )
    )


def rates(found: dict[str, Any]) -> list[str]:
    return [f"{found[name]:.1%}" for name in ("token_share", "shifted_share")]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return Table(tuple(columns), tuple(map(tuple, rows))).markdown()


def percent(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"


def number(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.0f} ({interval['low']:.0f} to {interval['high']:.0f})"


if __name__ == "__main__":
    sys.exit(main())
