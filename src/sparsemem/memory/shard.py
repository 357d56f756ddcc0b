"""A base model too large for one device: spread over processes, with its memory whole in each."""

from typing import Any

import torch

from sparsemem import distributed
from sparsemem.memory.attach import find_blocks, memory_config, memory_layers
from sparsemem.memory.base_model import usable_device


def shard(model: Any, device: torch.device | str = "auto") -> None:
    """Spread the base model's weights over the processes that a launcher started, in place (FSDP2).

    Each process keeps a part of every weight, and of the memory all: its rows are few. From then on all
    processes have to call the model the same number of times. It can be trained with `finetune` and
    method="memory"; it is not to be saved.

    Args:
        model: A model with a memory, on the CPU; the same in all processes.
        device: Where the parts are put; "auto" is this process's GPU where there is one, else the CPU.

    Raises:
        ConfigError: There is one process, or no such device.
        NotAttachedError: The model has no memory.
    """
    place = usable_device(device)
    blocks = find_blocks(model, memory_config(model).blocks)
    layers = [*memory_layers(model)]
    distributed.spread(model, blocks, [p for layer in layers for p in layer.parameters()], place)
    for layer in layers:
        layer.to(place)
