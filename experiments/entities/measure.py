"""Do chosen slots sit at entity boundaries? Selection on the facts of experiments/facts, nothing is trained.

python experiments/entities/measure.py              # measure, write results/smollm2.json and the README
python experiments/entities/measure.py --readme     # write the README from the result that is there

Entities are the facts' subjects, and the names that compromise finds, a tagger for Node.js, which is
installed from npm into ~/.cache/sparsemem/experiments; --no-tagger does without.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from run import CACHE, load_specs  # noqa: E402 - experiments/run.py, which is a script too

import sparsemem  # noqa: E402
from sparsemem import console  # noqa: E402
from sparsemem.errors import MissingDependencyError  # noqa: E402
from sparsemem.files import read_json, write_json  # noqa: E402
from sparsemem.memory.checkpoint import load, read_header  # noqa: E402
from sparsemem.slots.usage import USAGE_FILE, Usage, load_usage  # noqa: E402
from sparsemem.study.entities import (  # noqa: E402
    PLACES,
    Tagger,
    entity_study,
    read_wordings,
    trained_slots,
    weights_on,
    wordings_with_subject,
)
from sparsemem.study.figures import slot_heatmap  # noqa: E402
from sparsemem.study.provenance import peak_bytes, provenance  # noqa: E402
from sparsemem.study.run import RunSpec, attached_folder  # noqa: E402
from sparsemem.study.table import Table, with_block  # noqa: E402

RESULT = HERE / "results" / "smollm2.json"
README = HERE / "README.md"
TAGGER = "compromise@14.17.0"
NUM_FACTS = 100
OTHER_BLOCKS = (10, 16, 24)
"""Blocks beside the product's own, which have a memory attached for this alone: some minutes each."""
HEATMAP_WORDINGS = 4
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
    parser.add_argument("--num-facts", type=int, default=NUM_FACTS, metavar="N", help="of experiments/facts")
    parser.add_argument("--blocks", type=int, nargs="*", default=OTHER_BLOCKS, metavar="B", help="others too")
    parser.add_argument("--no-tagger", action="store_true", help="only the facts' own subjects")
    parser.add_argument("--readme", action="store_true", help="only write the README")
    args = parser.parse_args(argv)
    return console.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    if not args.readme:
        write_json(RESULT, measure(args))
    text = README.read_text(encoding="utf-8")
    README.write_text(with_answer(text, read_json(RESULT)), encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    spec = load_specs(HERE.parent / "facts", CACHE / "data")["memory.seed-0"]
    origin = provenance(data=spec.files)
    find_names = None if args.no_tagger else tagger()
    own, *others = (study(spec, block, args.num_facts, find_names) for block in (None, *args.blocks))
    header, values = own
    return {
        "config": {
            "facts": spec.facts,
            "num_facts": args.num_facts,
            "memory": header["memory"],
            "tagger": TAGGER if find_names else None,
        },
        **values,
        "other_blocks": {str(of_block["block"]): of_block["selections"] for _, of_block in others},
        "seed": 0,
        "seconds": round(time.perf_counter() - started, 1),
        **origin,
        "model_sha": header["base_fingerprint"],
        "peak_bytes": peak_bytes(),
    }


def study(
    spec: RunSpec, block: int | None, num_facts: int, find_names: Tagger | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Study a memory at a block, or where the product puts it; of that one a picture is drawn too."""
    if block is not None:
        spec = dataclasses.replace(spec, memory={**spec.memory, "layers": [block]})
    folder = attached_folder(spec, spec.load_background(), CACHE)
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder)
    facts, usage = spec.load_facts()[:num_facts], load_usage(folder / USAGE_FILE)
    if block is None:
        draw(model, tokenizer, usage, facts[0])
    with console.progress(f"read {len(facts)} facts") as step:
        values = entity_study(model, tokenizer, usage, facts, tagger=find_names, on_step=step)
    return read_header(folder), values


def draw(model: Any, tokenizer: Any, usage: Usage, fact: sparsemem.Fact) -> None:
    """Draw which tokens of a fact read the slots that the product would train."""
    (pool_usage,) = usage.pools.values()
    read = read_wordings(model, tokenizer, fact)
    chosen = trained_slots(read, pool_usage, sparsemem.FinetuneConfig().top_t)
    shown = [*zip(wordings_with_subject(fact), read, strict=True)][-HEATMAP_WORDINGS:]
    weights = torch.cat([weights_on(wording, chosen) for _, wording in shown])
    order = (weights > 0).sum(dim=0).argsort(descending=True, stable=True)
    tokens = [[tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]] for text, _ in shown]
    for path in slot_heatmap(tokens, weights[:, order].tolist(), HERE / "heatmap"):
        console.say(str(path))


def tagger() -> Tagger:
    """Install compromise, and return what finds names with it.

    Raises:
        MissingDependencyError: There is no Node.js, or npm could not install it.
    """
    folder = CACHE / "tagger"
    try:
        if not (folder / "node_modules" / "compromise").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            install = ["npm", "install", "--prefix", str(folder), "--no-save", TAGGER]
            subprocess.run(install, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingDependencyError(
            f"the tagger needs Node.js and npm ({error}); install them, or pass --no-tagger"
        ) from error

    def find_names(texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        script = (HERE / "tag.js").read_text(encoding="utf-8")
        done = subprocess.run(
            ["node", "-e", script],
            cwd=folder,
            input=json.dumps([*texts]),
            text=True,
            capture_output=True,
            check=True,
        )
        return [[(start, stop) for start, stop in spans] for spans in json.loads(done.stdout)]

    return find_names


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
        f"of a fact (the paper: 100 to 500), {number(core['rare'])} of them rare.**{of_names(ranked)}"
    )


def of_names(found: dict[str, Any]) -> str:
    """Say the same of the names that the tagger found; nothing, where there was none."""
    if (names := found.get("names")) is None:
        return ""
    return (
        f" Of names as a tagger finds them, not only the fact's subject, the same is so: "
        f"{percent(names['share'])} of the reads stand there, where {names['token_share']:.1%} of the tokens "
        f"are (p = {names['p']:.3f})."
    )


def tables(result: dict[str, Any]) -> str:
    selections, core = result["selections"], result["core"]
    rankings = [
        [name, top_t, *alignment(found)]
        for name, by_top_t in selections.items()
        for top_t, found in by_top_t.items()
    ]
    blocks = [
        [block, name, *alignment(of_block[name][SHOWN])]
        for block, of_block in {str(result["block"]): selections, **result["other_blocks"]}.items()
        for name in selections
    ]
    shares = [result["token_share"], *(by_top_t[SHOWN]["by_place"] for by_top_t in selections.values())]
    places = [[place, *(f"{share[place]:.1%}" for share in shares)] for place in PLACES]
    sizes = [
        [label, number(core[key]), f"{core[key]['median']:g}", f"{core[key]['min']} to {core[key]['max']}"]
        for key, label in CORE.items()
    ]
    head = ["reads at the subject", "tokens there", "at shifted subjects", "p"]
    head += ["reads at names", "tokens there", "p"] if result["config"]["tagger"] else []
    return "\n".join(
        (
            table(["ranking", "slots a fact", *head], rankings),
            f"Memories at other blocks, {SHOWN} slots a fact:\n",
            table(["block", "ranking", *head], blocks),
            f"Where the reads of {SHOWN} slots a fact stand, all facts together:\n",
            table(("place", "tokens", *selections), places),
            "The core set, slots a fact:\n",
            table(("", "mean (95 % interval)", "median", "range"), sizes),
            f"{result['num_facts']} facts, {result['num_wordings']} wordings, {result['num_tokens']:,} tokens"
            f" with {result['reads_per_token']} reads each at block {result['block']}; intervals over facts;"
            f" {result['seconds']:.0f} s; `results/smollm2.json`, commit {str(result['commit'])[:7]}.\n",
        )
    )


def alignment(found: dict[str, Any]) -> list[str]:
    cells = [percent(found["share"]), f"{found['token_share']:.1%}", f"{found['shifted_share']:.1%}"]
    cells.append(f"{found['p']:.3f}")
    if names := found.get("names"):
        cells += [percent(names["share"]), f"{names['token_share']:.1%}", f"{names['p']:.3f}"]
    return cells


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return Table(tuple(columns), tuple(map(tuple, rows))).markdown()


def percent(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"


def number(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.0f} ({interval['low']:.0f} to {interval['high']:.0f})"


if __name__ == "__main__":
    sys.exit(main())
