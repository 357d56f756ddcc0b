"""Does a memory slow generation down? Base, just attached, after 1,000 facts, and LoRA not merged.

    python benchmarks/generate.py

On SmolLM2-135M, one sequence: a prompt of 256 tokens at once, then 24 tokens one by one. The rows of 1,000
facts are made up: 256 slots of one row each, drawn among those that learning may choose (read by background
text, but by 2 % of the documents at most). The prompt is of that text, so more of its reads find a row than
those of other text would (`reads_that_find_a_row`). LoRA is of rank 32 on all linear layers, as `learn
--method lora` makes it.
"""

import copy
from functools import partial
from typing import Any

import peft
import torch
from timing import in_turn, parser, publish

import sparsemem
from sparsemem.cli.demo import installed_data
from sparsemem.memory.attach import observe_reads
from sparsemem.memory.base_model import fingerprint

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 256, 24, 9
NUM_FACTS, SLOTS_PER_FACT = 1000, 256
MOST_DOCUMENTS = 0.02


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, cache: Any) -> None:
    for _ in range(NEW_TOKENS):
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    cache.crop(-NEW_TOKENS)


def teach(model: Any, usage: sparsemem.Usage) -> None:
    """Write the rows of made-up facts."""
    generator = torch.Generator().manual_seed(0)
    for name, pool in sparsemem.pools(model).items():
        frequency = usage.pools[name].document_frequency
        rare = ((frequency > 0) & (frequency <= MOST_DOCUMENTS * usage.num_documents)).nonzero().squeeze(1)
        slots = rare[torch.randperm(len(rare), generator=generator)[: NUM_FACTS * SLOTS_PER_FACT]]
        rows = torch.randn(NUM_FACTS, pool.value_dim, generator=generator)
        if pool.has_names:
            rows[:, 0] = torch.arange(1, NUM_FACTS + 1)
        pool.write(slots, rows.repeat_interleave(SLOTS_PER_FACT, dim=0)[: len(slots)])


def found(model: Any, ids: torch.Tensor) -> float:
    """Share of a text's reads that find a row."""
    shares = []
    observe_reads(
        model, lambda layer, reads: shares.append(layer.pool.is_written(reads.slot_ids)), input_ids=ids
    )
    return torch.cat(shares).float().mean().item()


def main() -> None:
    args = parser(__doc__).parse_args()
    gguf, articles = installed_data()
    base, tokenizer = sparsemem.load_base_model(str(gguf))
    sha = fingerprint(base.named_parameters())
    attached = sparsemem.attach_memory(copy.deepcopy(base))
    sparsemem.fit_keys(attached, tokenizer, articles, num_tokens=6000)
    usage = sparsemem.count_usage(attached, tokenizer, articles, num_documents=100)
    taught = copy.deepcopy(attached)
    teach(taught, usage)
    adapter = peft.LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = peft.get_peft_model(copy.deepcopy(base), adapter).eval()
    models = {"base": base, "attached": attached, "taught": taught, "lora_unmerged": lora}
    ids = torch.tensor([tokenizer(" ".join(articles[:40]))["input_ids"][:PROMPT_TOKENS]])
    caches = {name: prefill(model, ids).past_key_values for name, model in models.items()}
    runs = {
        "prefill": {name: partial(prefill, model, ids) for name, model in models.items()},
        "decode": {name: partial(decode, model, ids[:, -1:], caches[name]) for name, model in models.items()},
    }
    times = {kind: in_turn(contenders, ROUNDS) for kind, contenders in runs.items()}
    tokens = {"prefill": PROMPT_TOKENS, "decode": NEW_TOKENS}
    result = {
        "ratios": {
            f"{name}_over_base_{kind}_speed": of["base"]["median_seconds"] / of[name]["median_seconds"]
            for kind, of in times.items()
            for name in list(models)[1:]
        },
        "tokens_per_second": {
            kind: {name: tokens[kind] / of[name]["median_seconds"] for name in models}
            for kind, of in times.items()
        },
        "reads_that_find_a_row": found(taught, ids),
        "slots_written": sum(len(pool.written_ids) for pool in sparsemem.pools(taught).values()),
        "times": times,
    }
    publish("generate", result, args, model_sha=sha)


if __name__ == "__main__":
    main()
