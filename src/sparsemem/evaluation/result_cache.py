"""What an update cannot have changed is not computed again: batches to which the memory says nothing."""

import dataclasses
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparsemem.files import write_atomically
from sparsemem.memory.attach import before_read, memory_layers
from sparsemem.memory.layer import MemoryLayer, Reads

ResultT = TypeVar("ResultT")


@dataclasses.dataclass
class _Batch:
    """A batch that ran while the memory said nothing to any of its tokens.

    Args:
        result: What came out.
        reads: Slots and weights of its tokens, each of shape (tokens, reads), after the block of their layer.
    """

    result: Any
    reads: list[tuple[int, Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, *tensors in self.reads for tensor in tensors)


class ResultCache:
    """Results of batches of one model, of which nothing but rows of its memory changes.

    An answer of the memory is zero, not small, where too few reads of a token find the same row. So a batch
    to which it said nothing, then and now, gives the same result bit for bit: all states are what they
    were, hence all reads, and these are remembered. Nothing of the model has to run to find out.

    Args:
        max_bytes: Room for reads; batches beyond it always run.
    """

    def __init__(self, max_bytes: int = 512 * 1024**2) -> None:
        self.free_bytes = max_bytes
        self.batches: dict[Hashable, _Batch] = {}

    def get(
        self, model: nn.Module, key: Hashable, compute: Callable[[], ResultT], after: Hashable = None
    ) -> ResultT:
        """Return what `compute` returned before, or call it again.

        Args:
            model: The model that `compute` runs.
            key: Everything that `compute` depends on beside the model.
            compute: Runs one batch.
            after: What was watched before it, and went into it.
        """
        is_on_same = after is None or after in self.batches
        if is_on_same and self._says_nothing(model, key):
            return cast(ResultT, self.batches[key].result)
        return self._run(model, key, compute, keep=is_on_same)

    def watch(self, model: nn.Module, key: Hashable, compute: Callable[[], ResultT]) -> ResultT:
        """Run what batches build on, and find out whether the memory says something to it."""
        result = self._run(model, key, compute)
        if key in self.batches:
            self.batches[key].result = None
        return result

    def save(self, path: Path) -> None:
        """Write all of it to a file, for `load`."""
        batches = [(key, batch.result, batch.reads) for key, batch in self.batches.items()]
        write_atomically(path, lambda temporary: torch.save((self.free_bytes, batches), temporary))

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "ResultCache":
        """Read what `save` wrote, for a model on some device."""
        free_bytes, batches = torch.load(path, weights_only=True, map_location=device)
        cache = cls(free_bytes)
        cache.batches = {key: _Batch(result, reads) for key, result, reads in batches}
        return cache

    def _says_nothing(self, model: nn.Module, key: Hashable) -> bool:
        if key not in self.batches:
            return False
        layers = {layer.block_index: layer for layer in memory_layers(model)}
        return not any(_answers(layers[block], *reads) for block, *reads in self.batches[key].reads)

    def _run(
        self, model: nn.Module, key: Hashable, compute: Callable[[], ResultT], keep: bool = True
    ) -> ResultT:
        if key in self.batches:
            self.free_bytes += self.batches.pop(key).num_bytes
        found: list[tuple[int, Tensor, Tensor]] = []

        def record(layer: MemoryLayer, reads: Reads) -> None:
            nonlocal keep
            slot_ids_TR, weights_TR = (t.flatten(0, 1).flatten(1) for t in (reads.slot_ids, reads.weights))
            keep = keep and not _answers(layer, slot_ids_TR, weights_TR)
            if keep:
                fits = layer.pool.num_slots <= torch.iinfo(torch.int32).max
                found.append((layer.block_index, slot_ids_TR.int() if fits else slot_ids_TR, weights_TR))

        with before_read(model, record):
            result = compute()
        batch = _Batch(result, found)
        if keep and batch.num_bytes <= self.free_bytes:
            self.batches[key] = batch
            self.free_bytes -= batch.num_bytes
        return result


def _answers(layer: MemoryLayer, slot_ids_TR: Tensor, weights_TR: Tensor) -> bool:
    return bool(layer.agreement(slot_ids_TR.long(), weights_TR).any())
