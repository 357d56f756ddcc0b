"""Does a step cost more in a larger pool? Two pool sizes, one model, measured in turn (A B A B).

    python benchmarks/step.py            # writes benchmarks/results/step.json and prints it

The step is a whole one: forward, selection, backward, optimizer, for one fact with all its wordings,
on SmolLM2-135M-Instruct with rows of 576 values. Ratios of medians; the absolute times are those of
one shared machine and mean nothing elsewhere.
"""

import copy
import json
import statistics
from pathlib import Path

import sparsemem
from sparsemem.cli.demo import demo_facts_path, installed_data
from sparsemem.memory.base_model import fingerprint
from sparsemem.study.provenance import provenance

POOLS = {65_536: 256, 1_048_576: 1024}
ROUNDS = 7
NUM_FACTS = 4
NUM_TOKENS = 30_000


def main() -> None:
    gguf, articles = installed_data()
    facts = sparsemem.load_facts(demo_facts_path())[:NUM_FACTS]
    base, tokenizer = sparsemem.load_base_model(str(gguf))
    prepared = {}
    for num_slots, num_keys in POOLS.items():
        model = copy.deepcopy(base)
        sparsemem.attach_memory(model, sparsemem.MemoryConfig(num_keys=num_keys))
        sparsemem.fit_keys(model, tokenizer, articles, num_tokens=NUM_TOKENS)
        usage = sparsemem.count_usage(model, tokenizer, articles, num_documents=100)
        prepared[num_slots] = model, usage
        learn_once(model, tokenizer, facts, usage)  # warm-up
    seconds: dict[int, list[float]] = {num_slots: [] for num_slots in POOLS}
    for _ in range(ROUNDS):
        for num_slots, (model, usage) in prepared.items():
            seconds[num_slots].append(learn_once(model, tokenizer, facts, usage))
    small, large = (statistics.median(seconds[num_slots]) for num_slots in POOLS)
    result = {
        "benchmark": "step",
        "question": "a step at 1,048,576 slots against one at 65,536",
        "ratio_of_medians": round(large / small, 3),
        "rounds": ROUNDS,
        "seconds_per_step": {str(n): [s / NUM_FACTS for s in values] for n, values in seconds.items()},
        "seed": 0,
        **provenance(model_sha=fingerprint(base.named_parameters()), data=[demo_facts_path()]),
    }
    path = Path(__file__).parent / "results" / "step.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def learn_once(model, tokenizer, facts, usage) -> float:
    """Learn each fact in one step, take it back, and return the seconds of the loop."""
    config = sparsemem.FinetuneConfig(num_epochs=1)
    result = sparsemem.finetune(model, tokenizer, facts, usage, config)
    result.delta.invert().apply(sparsemem.pools(model))
    return result.seconds


if __name__ == "__main__":
    main()
