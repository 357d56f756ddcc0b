"""On a real model: are versions and reverts exact, to the last bit of the logits of 1,000 prompts?

    python experiments/prepare.py
    python experiments/history/run.py        # half an hour; writes results/exact.json

Four updates of two facts each are learned and committed, and after each the predictions behind 1,000
questions are hashed: those on the facts, in all wordings, and others of NaturalQuestions, most of which no
update reaches. Then every version is loaded anew from its folder, the last update is reverted, and then one
from the middle; what that has to equal is a model on which the other deltas were written and that one never
was.
"""

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from run import CACHE, load_specs

import sparsemem
from sparsemem import console
from sparsemem.encode import pad
from sparsemem.files import write_json
from sparsemem.likelihood import log_probs_at
from sparsemem.memory.base_model import fingerprint
from sparsemem.memory.checkpoint import base_weights
from sparsemem.prompts import qa_question
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.commits import fact_rows
from sparsemem.store.integrity import verify
from sparsemem.store.merge import commit_change, revert
from sparsemem.study.provenance import peak_bytes, provenance
from sparsemem.study.run import attached_folder

NUM_PROMPTS, NUM_UPDATES, FACTS_PER_UPDATE = 1000, 4, 2
HERE = Path(__file__).resolve().parent


def main() -> None:
    data = CACHE / "data"
    spec = load_specs(HERE.parent / "facts", data)["memory.seed-0"]
    facts = sparsemem.load_facts(data / "trivia.jsonl")[: NUM_UPDATES * FACTS_PER_UPDATE]
    questions = sparsemem.load_questions(str(data / "nq_open.jsonl"))[:NUM_PROMPTS]
    origin = provenance(data=[data / "trivia.jsonl", data / "nq_open.jsonl"])
    with tempfile.TemporaryDirectory() as temporary:
        attached = attached_folder(spec, spec.load_background(), CACHE)
        folder = shutil.copytree(attached, Path(temporary) / "memory")
        usage = load_usage(folder / USAGE_FILE)
        model, tokenizer = sparsemem.load(folder)
        taught = [question for fact in facts for question in (*fact.questions, *fact.heldout_questions)]
        asked = [*taught, *(row.question for row in questions)][:NUM_PROMPTS]
        prompts = [tokenizer(qa_question(question))["input_ids"] for question in asked]
        store = sparsemem.DeltaStore(folder)
        then, deltas = learned(store, model, tokenizer, usage, facts, prompts)
        model_sha = fingerprint(base_weights(model))
        now = {revision: digest(sparsemem.load(folder, revision=revision)[0], prompts) for revision in then}
        middle, last = reverts(store, folder, deltas, prompts)
        problems = verify(store)
    result = {
        "config": {
            "prompts": NUM_PROMPTS,
            "updates": NUM_UPDATES,
            "facts": FACTS_PER_UPDATE,
            "method": "memory",
        },
        "metrics": {
            "num_prompts": len(prompts),
            "num_prompts_on_the_facts": len(taught),
            "versions_that_differ": [revision for revision in then if now[revision] != then[revision]],
            "versions_are_different": len(set(then.values())) == len(then),
            "revert_of_last_is_exact": last["found"] == then[str(NUM_UPDATES - 1)],
            "revert_of_middle_is_exact": middle["found"] == middle["expected"],
            "slots_shared_with_later_updates": middle["shared"],
            "problems": problems,
        },
        "seed": 0,
        **origin,
        "model_sha": model_sha,
        "peak_bytes": peak_bytes(),
    }
    write_json(HERE / "results" / "exact.json", result)
    print((HERE / "results" / "exact.json").read_text(encoding="utf-8"))


def learned(
    store: sparsemem.DeltaStore,
    model: Any,
    tokenizer: Any,
    usage: sparsemem.Usage,
    facts: list[sparsemem.Fact],
    prompts: list[list[int]],
) -> tuple[dict[str, str], list[Any]]:
    """Learn and commit all updates; returns the digest of each version, and the deltas."""
    then = {"attached": digest(model, prompts)}
    deltas = []
    config = sparsemem.FinetuneConfig(num_epochs=3)
    for number in range(1, NUM_UPDATES + 1):
        batch = facts[(number - 1) * FACTS_PER_UPDATE : number * FACTS_PER_UPDATE]
        result = sparsemem.finetune(model, tokenizer, batch, usage, config)
        deltas.append(result.delta)
        store.commit(result.delta, f"update {number}", {"facts": fact_rows(batch)})
        then[str(number)] = digest(model, prompts)
        console.say(f"update {number}: {then[str(number)][:12]}")
    return then, deltas


def reverts(
    store: sparsemem.DeltaStore, folder: Path, deltas: list[Any], prompts: list[list[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take back the last update, then go back and take back the second."""
    commit_change(store, revert(store, "HEAD"), "the last", "revert")
    last = {"found": digest(sparsemem.load(folder)[0], prompts)}
    store.undo()
    change = revert(store, "2")
    commit_change(store, change, "the second", "revert", "ours")
    found = digest(sparsemem.load(folder)[0], prompts)
    never, _ = sparsemem.load(folder, revision="attached")
    for delta in (deltas[0], *deltas[2:]):
        for name, pool in sparsemem.pools(never).items():
            pool.write(delta.changes[name].slot_ids, delta.changes[name].after)
    shared = change.conflicts.num_slots_trained
    return {"found": found, "expected": digest(never, prompts), "shared": shared}, last


@torch.no_grad()
def digest(model: Any, prompts: list[list[int]]) -> str:
    """SHA-256 of the log-probabilities of what follows each prompt."""
    found = hashlib.sha256()
    for start in range(0, len(prompts), 50):
        batch = pad(prompts[start : start + 50])
        mask = batch["attention_mask"]
        is_last = torch.arange(mask.shape[1]) == mask.sum(dim=1, keepdim=True) - 1
        found.update(log_probs_at(model, **batch, positions=is_last).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
