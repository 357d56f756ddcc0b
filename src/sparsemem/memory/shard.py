"""A base model too large for one device: spread over processes, with its memory whole in each."""

from typing import Any

import torch

from sparsemem import distributed
from sparsemem.errors import ConfigError
from sparsemem.memory.attach import find_blocks, memory_config, memory_layers
from sparsemem.memory.base_model import usable_device


def shard(model: Any, device: torch.device | str = "auto") -> None:
    """Spread the base model's weights over the processes that a launcher started, in place (FSDP2).

    Each process keeps a part of every weight, and all of the memory: its rows are few. From then on all
    processes have to call the model the same number of times. It can be trained with `finetune` and
    method="memory"; it is not to be saved.

    Args:
        model: A model with a memory, on the CPU; the same in all processes.
        device: Where the parts are put, see `place_of_part`.

    Raises:
        ConfigError: There is one process, or no such device.
        NotAttachedError: The model has no memory.
    """
    place = place_of_part(device)
    blocks = find_blocks(model, memory_config(model).blocks)
    layers = [*memory_layers(model)]
    distributed.spread(model, blocks, [p for layer in layers for p in layer.parameters()], place)
    for layer in layers:
        layer.to(place)


def place_of_part(device: torch.device | str) -> torch.device:
    """Find where this process puts its part of a model.

    Args:
        device: "auto" is the GPU of this process where there is one, as "cuda" is, else the CPU.

    Raises:
        ConfigError: There is one process, no such device, or it is another process's.
    """
    if distributed.world_size() == 1:
        raise ConfigError(
            "fsdp spreads a model over several processes, and this is one; start them with torchrun or "
            "accelerate launch"
        )
    place = usable_device(device)
    if place.type == "cuda" and place.index != torch.cuda.current_device():
        raise ConfigError(f"device={str(device)!r} is the GPU of another process; use device='cuda'")
    return place
