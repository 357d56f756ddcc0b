"""How full the memory of a folder is, what it takes, and what to do about it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem import console
from sparsemem.config import FinetuneConfig, LoadConfig
from sparsemem.data import load_texts
from sparsemem.encode import token_batches
from sparsemem.errors import ConfigError, DataError
from sparsemem.files import read_tensors
from sparsemem.memory.attach import memory_layers, observe_reads, pools
from sparsemem.memory.checkpoint import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    WEIGHTS_FILE,
    local_folder,
    read_header,
)
from sparsemem.memory.layer import MemoryLayer, Reads
from sparsemem.slots.capacity import MAX_FIRES, Capacity, measure_capacity, recommend
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.store.history import DeltaStore
from sparsemem.store.load import load
from sparsemem.store.state import difference
from sparsemem.study.explain import taught_updates
from sparsemem.study.reads import Taught, firing_tokens, written_slots

ACTIONS = ("other keys", "another layer", "more slots", "nothing")
"""What is recommended, the most pressing first."""

NUM_TEXTS = 200
"""Texts that are read to measure how much fires."""


def plan_folder(
    folder: str | Path,
    background: Sequence[str] = (),
    *,
    budget: float | None = None,
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Measure how full the memory of a folder is, and recommend one thing.

    Args:
        folder: A memory folder.
        background: Sources of ordinary text, to measure how much of it something learned answers to.
        budget: Share of its tokens whose predictions may change at all; 1 % if not given.
        loading: Device and precision of the model.

    Returns:
        As plain JSON values: `num_updates`; `num_facts`, as far as updates say what they taught; `pools`,
        the capacity of each, with the `room` for more facts; `disk_bytes` and `memory_bytes`, by what takes
        them; `recommendation` and its `reason`.

    Raises:
        ConfigError: The budget is no share, or there is no text to measure it on.
        SparsememError: The folder or the background cannot be read.
    """
    if budget is not None and not 0 < budget <= 1:
        raise ConfigError(f"budget={budget} is no share of the tokens; use more than 0 and at most 1")
    if budget is not None and not background:
        raise ConfigError(f"budget={budget} is a share of ordinary text; give some, to measure it on")
    folder = local_folder(folder)
    header = read_header(folder)
    usage = load_usage(folder / USAGE_FILE)
    updates = taught_updates(folder)
    texts = [text for source in background for text in load_texts(source)]
    with console.progress(f"load {folder}"):
        model, tokenizer = load(folder, **(loading or LoadConfig()).options())
    usage.check(model)
    fires = firing_by_pool(model, tokenizer, texts) if texts else {}
    known = _of_all_pools(DeltaStore(folder), [layer.key_bias for layer in memory_layers(model)])
    capacities = {
        name: measure_capacity(
            usage.pools[name],
            pool.written_ids.cpu(),
            written_slots(updates, name),
            fires=fires.get(name),
            **known,
        )
        for name, pool in pools(model).items()
    }
    return {
        **_planned(folder, header, updates, capacities, MAX_FIRES if budget is None else budget),
        "memory_bytes": memory_bytes(model),
    }


def plan_stored(folder: str | Path) -> dict[str, Any]:
    """Do as `plan_folder`, from the files alone: no model is loaded, and no `memory_bytes` are known."""
    folder = local_folder(folder)
    header = read_header(folder)
    usage = load_usage(folder / USAGE_FILE)
    updates = taught_updates(folder)
    attached, _ = read_tensors(folder / WEIGHTS_FILE, FORMAT, FORMAT_VERSION)
    store = DeltaStore(folder)
    # Not all that were ever written: what a revert took back holds nothing again.
    changed = difference(store.state(None), store.state(store.head())).changes
    biases = [tensor for name, tensor in attached.items() if name.endswith(".key_bias")]
    known = _of_all_pools(store, biases)
    capacities = {}
    for name, of_pool in usage.pools.items():
        written = attached[f"pools.{name}.slot_ids"]
        if name in changed:
            written = torch.cat([written, changed[name].slot_ids]).unique()
        capacities[name] = measure_capacity(of_pool, written, written_slots(updates, name), **known)
    return _planned(folder, header, updates, capacities)


def _of_all_pools(store: DeltaStore, key_biases: Sequence[Tensor]) -> dict[str, Any]:
    """Arguments of `measure_capacity` that are the same for every pool of a folder."""
    configs = (store.details(commit.id).get("config") for commit in store.log())
    last: Mapping[str, Any] = next((config for config in configs if config), {})
    return {
        "num_facts": len(store.facts(store.head())),
        "slots_per_fact": last.get("top_t", FinetuneConfig().top_t),
        "has_fitted_keys": any(bool(bias.any()) for bias in key_biases),  # random ones have none
    }


def _planned(
    folder: Path,
    header: Mapping[str, Any],
    updates: Sequence[Taught],
    capacities: dict[str, Capacity],
    budget: float = MAX_FIRES,
) -> dict[str, Any]:
    action, reason = most_pressing(capacities, budget)
    return {
        "num_updates": len(updates),
        "num_facts": sum(len(update.facts) for update in updates),
        "pools": {
            name: {
                **dataclasses.asdict(capacity),
                "fill": capacity.fill,
                "taken": capacity.taken,
                "room": capacity.room(budget),
            }
            for name, capacity in capacities.items()
        },
        "disk_bytes": disk_bytes(folder, list(header.get("bases", {}).values())),
        "recommendation": action,
        "reason": reason,
    }


def most_pressing(capacities: dict[str, Capacity], budget: float = MAX_FIRES) -> tuple[str, str]:
    """Recommend what the pool that needs it most needs."""
    advice = {name: recommend(capacity, budget) for name, capacity in capacities.items()}
    name = min(advice, key=lambda name: ACTIONS.index(advice[name][0]))
    action, reason = advice[name]
    return action, f"{name}: {reason}" if len(advice) > 1 else reason


def firing_by_pool(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """Measure to what share of the tokens of some texts something learned answers.

    Args:
        model: A model with a memory.
        tokenizer: Its tokenizer.
        texts: Ordinary texts; the first `NUM_TEXTS` are read, up to 256 tokens of each.

    Returns:
        By pool; in the layer that fires most, where several share one.
    """
    fired: dict[MemoryLayer, int] = dict.fromkeys(memory_layers(model), 0)
    num_tokens = 0
    device = next(model.parameters()).device
    for batch in token_batches(tokenizer, texts[:NUM_TEXTS], device=device):
        mask = batch["attention_mask"].bool()
        num_tokens += int(mask.sum())

        def count(layer: MemoryLayer, reads: Reads, mask: Tensor = mask) -> None:
            fired[layer] += int((firing_tokens(layer, reads) & mask).sum())

        observe_reads(model, count, **batch)
    if not num_tokens:
        raise DataError("the background has no text; give some documents")
    shares: dict[str, float] = {}
    for layer, num in fired.items():
        shares[layer.pool_name] = max(shares.get(layer.pool_name, 0.0), num / num_tokens)
    return shares


def disk_bytes(folder: Path, bases: list[str]) -> dict[str, int]:
    """Add up the files of a folder: the memory as attached, its base tables, usage, and the history."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }
    attached = sum(sizes.pop(name, 0) for name in (CONFIG_FILE, WEIGHTS_FILE))
    base = sum(sizes.pop(name, 0) for name in bases)
    usage = sizes.pop(USAGE_FILE, 0)
    return {"memory": attached, "base": base, "usage": usage, "history": sum(sizes.values())}


def memory_bytes(model: nn.Module) -> dict[str, int]:
    """Add up what a loaded memory takes: queries and keys, the map of the slots, and the written rows."""
    found = pools(model).values()
    layers = list(memory_layers(model))
    return {
        "keys": sum(p.nbytes for layer in layers for p in layer.parameters()),
        "map": sum(pool.slot_to_row.nbytes for pool in found),
        "rows": sum(pool.rows.nbytes + pool.holders.nbytes for pool in found),
    }
