"""A folder's memory with more slots, in a new folder: what was learned and its history go along."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsemem import console
from sparsemem.config import FinetuneConfig, LoadConfig
from sparsemem.data import Fact, load_texts
from sparsemem.files import check_new, new_folder
from sparsemem.memory import checkpoint
from sparsemem.memory.attach import memory_config, memory_layers, observe_reads
from sparsemem.memory.grow import grow_memory
from sparsemem.memory.layer import MemoryLayer, Reads
from sparsemem.slots.usage import USAGE_FILE, Usage, count_usage, load_usage, save_usage
from sparsemem.store.archive import copy_history
from sparsemem.store.commits import facts_of
from sparsemem.store.history import DeltaStore
from sparsemem.training.examples import Batch, collate_passes
from sparsemem.training.finetune import build_examples
from sparsemem.training.reading import facts_to_learn


def grow_folder(
    folder: str | Path,
    background: Sequence[str],
    out: str | Path,
    num_keys: int,
    *,
    num_tokens: int = 100_000,
    num_documents: int = 1000,
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Make a folder with more slots from one that may have learned already.

    The names in the facts that the history keeps go on reading what they read; see `grow_memory`. Slots keep
    their numbers, so the history is the same to the byte, and each of its versions can be checked out.

    Args:
        folder: A memory folder; it stays as it is.
        background: Sources of ordinary text: files or Hub data sets.
        out: The folder to make.
        num_keys: Sub-keys per half from now on; the memory will have num_keys**2 slots.
        num_tokens: Tokens to fit new sub-keys on.
        num_documents: Documents to count usage over.
        loading: Device and precision of the model.

    Returns:
        As plain JSON values: `folder`, `num_slots_before`, `num_slots`, `num_facts` whose reads were kept,
        and by block under `layers` what became of the reads (`Growth`).

    Raises:
        SparsememError: Something given is not usable; nothing was written.
    """
    folder, out = checkpoint.local_folder(folder), Path(out)
    check_new(out)
    header = checkpoint.read_header(folder)
    store, usage = DeltaStore(folder), load_usage(folder / USAGE_FILE)
    texts = [text for source in background for text in load_texts(source)]
    facts = [*dict.fromkeys(fact for version in _versions(store) for fact in facts_of(store.facts(version)))]
    with console.progress(f"load {folder}"):
        model, tokenizer = checkpoint.load(folder, **(loading or LoadConfig()).options())
    usage.check(model)
    num_before = memory_config(model).num_slots
    with console.progress("fit new keys") as step:
        keep = _name_states(model, tokenizer, usage, facts) if facts else {}
        growth = grow_memory(model, tokenizer, texts, num_keys, keep, num_tokens=num_tokens, on_step=step)
    with console.progress("count background usage") as step:
        counted = count_usage(model, tokenizer, texts, num_documents=num_documents, on_step=step)
    with new_folder(out) as made:
        checkpoint.save(model, made, header["base_model"])
        save_usage(counted, made / USAGE_FILE)
        copy_history(store, made)
    return {
        "folder": str(out),
        "num_slots_before": num_before,
        "num_slots": memory_config(model).num_slots,
        "num_facts": len(facts),
        "layers": {str(index): dataclasses.asdict(of_layer) for index, of_layer in growth.items()},
    }


def _versions(store: DeltaStore) -> list[str | None]:
    """What is checked out, and all branches and tags."""
    return [store.head(), *store.refs().values()]


def _name_states(model: Any, tokenizer: Any, usage: Usage, facts: Sequence[Fact]) -> dict[int, Tensor]:
    """Collect what each memory layer sees at the names of facts, in the wordings they are taught in."""
    config = FinetuneConfig()
    learned = facts_to_learn(facts, config)
    by_fact = build_examples(learned, tokenizer, usage, config)
    examples = [example for of_fact in by_fact for example in of_fact if any(example.is_subject)]
    seen: dict[int, list[Tensor]] = {layer.block_index: [] for layer in memory_layers(model)}
    device = next(model.parameters()).device
    for part in collate_passes(examples, device):

        def keep(layer: MemoryLayer, reads: Reads, part: Batch = part) -> None:
            hidden = reads.hidden.view(*part.is_subject.shape, -1)
            seen[layer.block_index].append(hidden[part.is_subject].float())

        observe_reads(model, keep, input_ids=part.input_ids, attention_mask=part.attention_mask)
    return {index: torch.cat(states) for index, states in seen.items() if states}
