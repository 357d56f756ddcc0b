"""How many facts fit? Slots are chosen and read as in training, but no answer is learned.

python experiments/capacity/measure.py              # measure what is missing, then write the README
python experiments/capacity/measure.py --readme     # write the README from the results that are there
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from run import CACHE, load_specs  # noqa: E402 - experiments/run.py, which is a script too

from sparsemem import console  # noqa: E402
from sparsemem.config import FinetuneConfig, MemoryConfig  # noqa: E402
from sparsemem.data import Fact, load_facts, load_texts  # noqa: E402
from sparsemem.files import read_json, write_json  # noqa: E402
from sparsemem.memory.attach import memory_layers, observe_reads  # noqa: E402
from sparsemem.memory.checkpoint import load, read_header  # noqa: E402
from sparsemem.memory.layer import MemoryLayer, Reads  # noqa: E402
from sparsemem.prompts import qa_prompt  # noqa: E402
from sparsemem.slots.capacity import CapacityLaw  # noqa: E402
from sparsemem.slots.usage import USAGE_FILE, load_usage  # noqa: E402
from sparsemem.study.plan import firing_by_pool  # noqa: E402
from sparsemem.study.provenance import peak_bytes, provenance  # noqa: E402
from sparsemem.study.run import attached_folder  # noqa: E402
from sparsemem.study.table import Table, with_block  # noqa: E402
from sparsemem.training.examples import collate_parts  # noqa: E402
from sparsemem.training.finetune import build_examples  # noqa: E402
from sparsemem.training.methods import SparseMemory  # noqa: E402

README = HERE / "README.md"
RUNS = {
    (1024, 256): 3000,
    (1024, 128): 1000,
    (1024, 512): 1000,
    (1024, 64): 1000,
    (512, 256): 1000,
    (256, 256): 1000,
    (256, 64): 3000,
}
"""Facts to learn, by sub-keys per half and slots per fact."""
HELD_BACK = (512, 256)
NUM_FACTS = (10, 30, 100, 300, 1000, 3000)
"""When to look."""
FITTED_UP_TO = 300
"""More facts than this, and the pool that is held back, are predicted and not fitted."""
NUM_ASKED = 100


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure how many facts fit into a memory.")
    parser.add_argument("--readme", action="store_true", help="only write the README")
    args = parser.parse_args(argv)
    return console.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    for (num_keys, top_t), num_facts in ({} if args.readme else RUNS).items():
        path = result_path(num_keys, top_t)
        if not path.exists():
            write_json(path, measure(num_keys, top_t, num_facts))
    results = [read_json(path) for path in sorted((HERE / "results").glob("*.json"))]
    README.write_text(with_answer(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    plot(results)


def result_path(num_keys: int, top_t: int) -> Path:
    return HERE / "results" / f"keys-{num_keys}.top_t-{top_t}.json"


def measure(num_keys: int, top_t: int, num_facts: int) -> dict[str, Any]:
    """Let facts choose their slots one after another, and look from time to time."""
    started = time.perf_counter()
    spec = load_specs(HERE.parent / "facts_stream", CACHE / "data")["memory.seed-0"]
    spec = dataclasses.replace(spec, memory={"num_keys": num_keys})
    origin = provenance(data=spec.files)
    folder = attached_folder(spec, spec.load_background(), CACHE)
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder)
    facts = load_facts(spec.facts)[:num_facts]
    texts = load_texts(str(CACHE / "data" / "heldout_wiki.jsonl"))
    usage, config = load_usage(folder / USAGE_FILE), FinetuneConfig(top_t=top_t)
    by_fact = build_examples(facts, tokenizer, usage, config)
    method = SparseMemory(model, usage, config)
    (layer,) = memory_layers(model)
    slots: list[torch.Tensor] = []
    num_wanted: list[int] = []
    points = []
    with console.progress(f"choose slots, {num_keys} sub-keys, {top_t} slots a fact") as step:
        for number, examples in enumerate(by_fact, 1):
            wordings = tuple(examples)
            # Of some of the wordings, so that slots are chosen before a forward pass: there is none.
            with method.step((wordings,), collate_parts(wordings[:1], 1)):
                assert layer.pool.selection is not None
                assert layer.pool.active is not None
                slots.append(layer.pool.selection.slot_ids)
                layer.pool.active.data.fill_(number)  # a row of its own; what it says does not matter here
            (wanted,) = method.selections[wordings][layer.pool_name].values()
            num_wanted.append(len(wanted))
            step(number, len(by_fact))
            if number in NUM_FACTS:
                layer.pool.deactivate()
                fires = firing_by_pool(model, tokenizer, texts)[layer.pool_name]
                points.append(point(model, tokenizer, facts, slots, num_wanted) | {"fires": fires})
    method.close()
    return {
        "config": {"num_keys": num_keys, "num_slots": num_keys**2, "top_t": top_t, "facts": spec.facts},
        "points": points,
        "seed": 0,
        "seconds": round(time.perf_counter() - started, 1),
        **origin,
        "model_sha": read_header(folder)["base_fingerprint"],
        "peak_bytes": peak_bytes(),
    }


def point(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    slots: Sequence[torch.Tensor],
    num_wanted: Sequence[int],
) -> dict[str, Any]:
    """Describe a memory that so many facts have chosen slots of."""
    (layer,) = memory_layers(model)
    num = len(slots)
    last = slice(num - max(1, num // 10), num)
    asked = range(0, num, max(1, num // NUM_ASKED))
    answers = [own_agreement(model, tokenizer, facts[place], slots[place]) for place in asked]
    return {
        "num_facts": num,
        "fill": len(layer.pool.written_ids) / layer.pool.num_slots,
        "taken": 1 - sum(map(len, slots[last])) / sum(num_wanted[last]),
        "answered": sum(answer > 0.5 for answer in answers) / len(answers),
    }


def own_agreement(model: Any, tokenizer: Any, fact: Fact, slots: torch.Tensor) -> float:
    """How much of its own answer the best token of a fact's question gets, 0 to 1."""
    found: list[float] = []

    def look(layer: MemoryLayer, reads: Reads) -> None:
        slot_ids, weights = reads.slot_ids[0].flatten(1), reads.weights[0].flatten(1)
        agreement = layer.agreement(slot_ids, weights) * torch.isin(slot_ids, slots)
        found.append(float(agreement.max()))

    ids = torch.tensor([tokenizer(qa_prompt(str(fact.question)))["input_ids"]])
    observe_reads(model, look, input_ids=ids, attention_mask=torch.ones_like(ids))
    return found[0]


def fit(results: Sequence[dict[str, Any]]) -> CapacityLaw:
    """Fit log F of the law by least squares, with F as each measurement gives it by itself."""
    rows, targets = [], []
    for result in results:
        config = result["config"]
        for at in result["points"]:
            if not is_held_back(config, at["num_facts"]) and 0 < at["taken"] < 1:
                scale = at["num_facts"] / -math.log(1 - at["taken"])
                rows.append([1.0, math.log(config["num_slots"]), math.log(config["top_t"])])
                targets.append([math.log(scale)])
    solution = torch.linalg.lstsq(torch.tensor(rows).double(), torch.tensor(targets).double()).solution
    return CapacityLaw(*solution.flatten().tolist())


def predicted(law: CapacityLaw, config: dict[str, Any], num_facts: float) -> float:
    return law.taken(num_facts, config["num_slots"], config["top_t"])


def is_held_back(config: dict[str, Any], num_facts: int) -> bool:
    return (config["num_keys"], config["top_t"]) == HELD_BACK or num_facts > FITTED_UP_TO


def plot(results: Sequence[dict[str, Any]]) -> None:
    """Draw the law, and what was measured: filled where it was fitted to, hollow where it was not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    law, steps = fit(results), [10 * 1.2**number for number in range(33)]
    for number, result in enumerate(results):
        config, color = result["config"], f"C{number}"
        label = f"{config['num_slots']:,} slots, {config['top_t']} a fact"
        axes.plot(steps, [100 * predicted(law, config, num) for num in steps], color=color, label=label)
        for at in result["points"]:
            face = "white" if is_held_back(config, at["num_facts"]) else color
            axes.plot(at["num_facts"], 100 * at["taken"], "o", color=color, markerfacecolor=face)
    axes.set(
        xscale="log", xlabel="facts", ylabel="% of a new fact's slots taken", xlim=(9, 3500), ylim=(0, 100)
    )
    axes.set_title("Lines: the law. Filled: fitted to. Hollow: held back.", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(HERE / "law.png", dpi=120)


def with_answer(readme: str, results: Sequence[dict[str, Any]]) -> str:
    """Return the README with its answer and its table made anew."""
    law = fit(results)
    rows, errors = [], []
    for result in sorted(results, key=lambda r: (r["config"]["num_keys"], r["config"]["top_t"])):
        config = result["config"]
        for at in result["points"]:
            expected = predicted(law, config, at["num_facts"])
            is_new = is_held_back(config, at["num_facts"])
            if is_new:
                errors.append(abs(expected - at["taken"]))
            rows.append(
                (
                    f"{config['num_slots']:,}", str(config["top_t"]), f"{at['num_facts']:,}",
                    f"{at['fill']:.1%}", f"{at['taken']:.1%}",
                    f"{expected:.1%}{' (held back)' if is_new else ''}",
                    f"{at['answered']:.0%}", f"{at['fires']:.2%}",
                )
            )  # fmt: skip
    of_default = MemoryConfig().num_slots, FinetuneConfig().top_t
    sentence = (
        f"**Of the slots that a new fact would choose, N facts have taken 1 - exp(-N / F), with F = "
        f"{math.exp(law.a):.3g} slots^{law.b:.2f} / (slots per fact)^{-law.c:.2f}. Held-back "
        f"measurements are off by {sum(errors) / len(errors):.1%} in the mean and {max(errors):.1%} at most. "
        f"With the defaults F is {law.scale(*of_default):,.0f}: a tenth of a new fact's slots is taken after "
        f"{law.num_facts(0.1, *of_default):,.0f} facts, half of them after "
        f"{law.num_facts(0.5, *of_default):,.0f}.**"
    )
    columns = (
        "slots", "per fact", "facts", "written", "taken", "law", "questions that get their answer",
        "tokens of other text that fire",
    )  # fmt: skip
    return with_block(readme, "answer", f"{sentence}\n\n{Table(columns, tuple(rows)).markdown()}")


if __name__ == "__main__":
    sys.exit(main())
