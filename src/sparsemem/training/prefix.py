"""Run only what can change: the frozen blocks below the memory, and what it reads, are computed once."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparsemem.memory.attach import find_blocks, memory_config, memory_layers
from sparsemem.training.examples import Batch, Example

Reads = tuple[Tensor, ...]
"""Slot ids and weights, as `MemoryLayer.lookup` returns them."""


class PrefixCache:
    """Hidden states below the lowest memory layer and the reads of that layer, kept per example.

    Below it nothing ever changes, nor do its queries and keys, so both are computed once; each further
    step starts there. The blocks are skipped, not removed, so every family's own forward pass goes on
    preparing masks and positions.

    Args:
        model: A model with a memory, whose other weights are frozen.
        max_bytes: Memory budget; examples beyond it are computed anew each time.
    """

    def __init__(self, model: nn.Module, max_bytes: int = 2 * 1024**3) -> None:
        self.layer = min(memory_layers(model), key=lambda layer: layer.block_index)
        blocks = find_blocks(model, memory_config(model).blocks)
        self.skipped = list(blocks[: self.layer.block_index])
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._states: dict[Example, Reads] = {}
        self._reads: dict[Example, Reads] = {}
        self._returns_tuple = False

    @contextlib.contextmanager
    def reuse(self, batch: Batch) -> Iterator[None]:
        """Within this context a forward pass of `batch` computes nothing that an earlier one did.

        Its first pass remembers what it gave.
        """
        with contextlib.ExitStack() as stack:
            if self.skipped:
                states = _padded(self._states, batch)
                stack.enter_context(self._skipping(*states) if states else self._keeping_states(batch))
            reads = _padded(self._reads, batch)
            stack.enter_context(self._lookup(reads, batch))
            yield

    @contextlib.contextmanager
    def _skipping(self, states: Tensor) -> Iterator[None]:
        result = (states,) if self._returns_tuple else states
        for block in self.skipped:
            # On the instance: attributes that the model reads from its blocks stay there.
            block.forward = lambda *_args, **_kwargs: result
        try:
            yield
        finally:
            for block in self.skipped:
                del block.forward

    @contextlib.contextmanager
    def _keeping_states(self, batch: Batch) -> Iterator[None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            self._keep(self._states, batch, output[0] if self._returns_tuple else output)

        handle = self.skipped[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _lookup(self, known: Reads | None, batch: Batch) -> Iterator[None]:
        find = self.layer.lookup

        def lookup(hidden: Tensor) -> Any:
            # Some families flatten sequences before the network that the memory sits beside.
            if known:
                return tuple(tensor.view(*hidden.shape[:-1], *tensor.shape[2:]) for tensor in known)
            reads = find(hidden)
            shape = *batch.input_ids.shape, *reads[0].shape[-2:]
            self._keep(self._reads, batch, *(tensor.view(shape) for tensor in reads))
            return reads

        self.layer.lookup = lookup  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.layer.lookup

    def _keep(self, kept: dict[Example, Reads], batch: Batch, *tensors: Tensor) -> None:
        for row, example in enumerate(batch.examples):
            own = tuple(t[row, : len(example.input_ids)].detach().clone() for t in tensors)
            size = sum(t.nbytes for t in own)
            if example not in kept and self.num_bytes + size <= self.max_bytes:
                kept[example] = own
                self.num_bytes += size


def _padded(kept: dict[Example, Reads], batch: Batch) -> Reads | None:
    """Put together what is kept of the examples of a batch; None where one of them is missing."""
    if not all(example in kept for example in batch.examples):
        return None
    by_example = (kept[example] for example in batch.examples)
    return tuple(nn.utils.rnn.pad_sequence(list(t), batch_first=True) for t in zip(*by_example, strict=True))
