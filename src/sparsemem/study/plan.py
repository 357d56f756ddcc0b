"""How full the memory of a folder is, what it takes, and what to do about it."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from sparsemem import console
from sparsemem.memory.attach import memory_config, memory_layers, pools
from sparsemem.memory.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load, local_folder, read_header
from sparsemem.slots.capacity import Capacity, measure_capacity, recommend, room
from sparsemem.slots.usage import USAGE_FILE, load_usage
from sparsemem.study.explain import taught_updates
from sparsemem.study.reads import written_slots

ACTIONS = ("other keys", "more slots", "nothing")
"""What is recommended, the most pressing first."""


def plan_folder(folder: str | Path) -> dict[str, Any]:
    """Measure how full the memory of a folder is, and recommend one thing.

    Args:
        folder: A memory folder.

    Returns:
        As plain JSON values: `num_updates`; `num_facts`, as far as updates say what they taught; `pools`,
        the capacity of each; `facts_left`, an extrapolation; `disk_bytes` and `memory_bytes`, by what takes
        them; `recommendation` and its `reason`.

    Raises:
        SparsememError: The folder cannot be read.
    """
    folder = local_folder(folder)
    header = read_header(folder)
    usage = load_usage(folder / USAGE_FILE)
    updates = taught_updates(folder)
    with console.progress(f"load {folder}"):
        model, _ = load(folder)
    usage.check(model)
    quorum = memory_config(model).quorum
    capacities = {
        name: measure_capacity(
            usage.pools[name], pool.row_slot_ids.cpu(), written_slots(updates, name), quorum
        )
        for name, pool in pools(model).items()
    }
    num_facts = sum(len(update.facts) for update in updates)
    action, reason = most_pressing(capacities)
    return {
        "num_updates": len(updates),
        "num_facts": num_facts,
        "pools": {
            name: {**dataclasses.asdict(capacity), "fill": capacity.fill}
            for name, capacity in capacities.items()
        },
        "facts_left": facts_left(capacities, num_facts, quorum),
        "disk_bytes": disk_bytes(folder, list(header.get("bases", {}).values())),
        "memory_bytes": memory_bytes(model),
        "recommendation": action,
        "reason": reason,
    }


def most_pressing(capacities: dict[str, Capacity]) -> tuple[str, str]:
    """Recommend what the pool that needs it most needs."""
    advice = {name: recommend(capacity) for name, capacity in capacities.items()}
    name = min(advice, key=lambda name: ACTIONS.index(advice[name][0]))
    action, reason = advice[name]
    return action, f"{name}: {reason}" if len(advice) > 1 else reason


def facts_left(capacities: dict[str, Capacity], num_facts: int, quorum: float) -> int | None:
    """Extrapolate how many more facts of the kind learned so far fit, until accidents reach their limit."""
    rooms = [times for capacity in capacities.values() if (times := room(capacity, quorum)) is not None]
    return max(0, round(num_facts * (min(rooms) - 1))) if rooms and num_facts else None


def disk_bytes(folder: Path, bases: list[str]) -> dict[str, int]:
    """Add up the files of a folder: the memory as it was attached, its base tables, usage, and updates."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }
    attached = sum(sizes.pop(name, 0) for name in (CONFIG_FILE, WEIGHTS_FILE))
    base = sum(sizes.pop(name, 0) for name in bases)
    usage = sizes.pop(USAGE_FILE, 0)
    return {"memory": attached, "base": base, "usage": usage, "updates": sum(sizes.values())}


def memory_bytes(model: nn.Module) -> dict[str, int]:
    """Add up what a loaded memory takes: queries and keys, the map of the slots, and the written rows."""
    found = pools(model).values()
    layers = list(memory_layers(model))
    return {
        "keys": sum(p.nbytes for layer in layers for p in layer.parameters()),
        "map": sum(pool.slot_to_row.nbytes for pool in found),
        "rows": sum(pool.rows.nbytes + pool.row_slot_ids.nbytes for pool in found),
    }
