"""Run only what can change: the frozen blocks below the memory are computed once."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparsemem.memory.attach import find_blocks, memory_config, memory_layers
from sparsemem.training.examples import Batch, Example


class PrefixCache:
    """Hidden states below the lowest memory layer, kept per example.

    Below it nothing ever changes, so they are computed once; each further step starts there. The
    blocks are skipped, not removed, so every family's own forward pass goes on preparing masks and
    positions.

    Args:
        model: A model with a memory, whose other weights are frozen.
        max_bytes: Memory budget; examples beyond it are computed anew each time.
    """

    def __init__(self, model: nn.Module, max_bytes: int = 2 * 1024**3) -> None:
        self.blocks = find_blocks(model, memory_config(model).blocks)
        self.num_skipped = min(layer.block_index for layer in memory_layers(model))
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._states: dict[Example, Tensor] = {}
        self._returns_tuple = False

    @contextlib.contextmanager
    def reuse(self, batch: Batch) -> Iterator[None]:
        """Within this context a forward pass of `batch` skips the blocks below the memory.

        Its first pass runs them and remembers what they gave.
        """
        if self.num_skipped == 0:
            yield
        elif all(example in self._states for example in batch.examples):
            with self._skipping(self._padded(batch)):
                yield
        else:
            last = self.blocks[self.num_skipped - 1]
            handle = last.register_forward_hook(lambda _m, _a, output: self._keep(batch, output))
            try:
                yield
            finally:
                handle.remove()

    @contextlib.contextmanager
    def _skipping(self, states: Tensor) -> Iterator[None]:
        skipped = list(self.blocks[: self.num_skipped])
        result = (states,) if self._returns_tuple else states
        for block in skipped:
            # On the instance: attributes that the model reads from its blocks stay there.
            block.forward = lambda *_args, **_kwargs: result
        try:
            yield
        finally:
            for block in skipped:
                del block.forward

    def _keep(self, batch: Batch, output: Any) -> None:
        self._returns_tuple = isinstance(output, tuple)
        states = output[0] if self._returns_tuple else output
        for row, example in enumerate(batch.examples):
            kept = states[row, : len(example.input_ids)].detach().clone()
            size = kept.numel() * kept.element_size()
            if example not in self._states and self.num_bytes + size <= self.max_bytes:
                self._states[example] = kept
                self.num_bytes += size

    def _padded(self, batch: Batch) -> Tensor:
        return nn.utils.rnn.pad_sequence([self._states[e] for e in batch.examples], batch_first=True)
