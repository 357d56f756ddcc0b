"""Run only what can change: blocks below the memory, its reads, and tokens before a name run once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem import distributed
from sparsemem.likelihood import log_probs_at
from sparsemem.memory.attach import find_blocks, memory_config, memory_layers, observe_reads
from sparsemem.training.examples import Batch, Example, collate_parts, whole
from sparsemem.training.past import PastCache
from sparsemem.training.shelf import Shelf

Reads = tuple[Tensor, ...]
"""Slot ids and weights, as `MemoryLayer.lookup` returns them."""
Forward = Callable[[int], contextlib.AbstractContextManager[None]]
"""Context of a forward pass over sequences of so many tokens."""


def _as_it_is(_num_tokens: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class PrefixCache:
    """What of a forward pass stays the same while a memory is trained, kept per example.

    Below the block to which the answer of the only memory layer is added nothing ever changes, nor do its
    queries and keys: hidden states and reads are computed once, and each further step starts there. Where
    there are several memory layers, it starts at the lowest. The blocks are skipped, not removed, so every
    family's own forward pass goes on preparing masks and positions.

    A token that the only memory layer has no answer to is as it was in all blocks, if those before it are.
    So `resume` runs an example from its `start` on, behind the keys and values of what comes before, as long
    as the memory is silent there: in short facts that is half of the tokens.

    Args:
        model: A model with a memory, whose other weights are frozen.
        max_bytes: Memory budget; what is beyond it is kept on disk. With 0 all is computed anew.
    """

    def __init__(self, model: nn.Module, max_bytes: int = 2 * 1024**3) -> None:
        self.model = model
        layers = [*memory_layers(model)]
        self.layer = min(layers, key=lambda layer: layer.block_index)
        blocks = find_blocks(model, memory_config(model).blocks)
        self.skipped = list(blocks[: self.layer.output_index if len(layers) == 1 else self.layer.block_index])
        # Whether the memory is asked in a block that is skipped.
        self.reads_are_skipped = len(self.skipped) > self.layer.block_index
        self.shelf = Shelf(max_bytes)
        self.past = PastCache(model, len(self.skipped), len(blocks), self.shelf)
        # Above a second memory layer a token may change that the first has no answer to.
        self.past.is_possible &= len(layers) == 1
        self._tries_past = self.past.is_possible  # the same in every process, whatever one of them meets
        self._states: dict[Example, Reads] = {}
        self._reads: dict[Example, Reads] = {}
        self._returns_tuple = False

    def num_run(self, example: Example) -> int:
        """Tokens of an example that `resume` runs, where the memory is silent before them."""
        return whole(example) - (example.start if self.past.is_possible else 0)

    @contextlib.contextmanager
    def resume(self, batch: Batch, forward: Forward = _as_it_is) -> Iterator[Batch]:
        """Run what this yields in place of `batch`: its tokens that can change, behind those that cannot.

        Args:
            batch: Whole examples.
            forward: Context of the passes that run what is not kept yet, given their number of tokens.
        """
        run = batch
        if self._tries_past:
            with torch.no_grad():
                self._keep_reads(batch, forward)
                silent = self._silent(batch)
                self._keep_starts(batch, silent, forward)
            starts = self._starts(batch, silent)
            run = self.past.behind(batch, starts) if any(starts) else batch
        with self.reuse(run):
            yield run

    def _keep_reads(self, batch: Batch, forward: Forward) -> None:
        """Run examples not seen before through all that never changes."""
        device = batch.input_ids.device
        new = [] if self.shelf.is_full else [e for e in batch.examples if not self._is_read(e)]
        through = self.skipped[-1] if self.reads_are_skipped else None
        for part, _ in distributed.in_step(self.model, collate_parts(new, 1, device), lambda: batch):
            inputs = {"input_ids": part.input_ids, "attention_mask": part.attention_mask}
            with forward(part.num_tokens), self.reuse(part):
                observe_reads(self.model, lambda *_: None, through, **inputs)

    def _keep_starts(self, batch: Batch, silent: Sequence[bool], forward: Forward) -> None:
        """Run what comes before the start of examples, where that is not kept yet and stays as it is."""
        device = batch.input_ids.device
        new = [
            example
            for example, is_silent in zip(batch.examples, silent, strict=True)
            if is_silent and self._is_read(example) and self.past.lacks(example)
        ]
        parts = collate_parts(new, 1, device, lambda example: example.start)
        for part, counts in distributed.in_step(self.model, parts, lambda: batch):
            begun = self.past.begun(part) if counts else part
            nowhere = torch.zeros_like(begun.input_ids, dtype=torch.bool)
            with forward(begun.num_tokens), self.reuse(begun):
                log_probs_at(self.model, begun.input_ids, begun.attention_mask, nowhere, **begun.others)
            if counts:
                self.past.keep(begun)

    @contextlib.contextmanager
    def reuse(self, batch: Batch) -> Iterator[None]:
        """Within this context a forward pass of `batch` computes nothing twice that never changes.

        Its first pass remembers what it gave.
        """
        reads = _padded(self._reads, batch)
        with contextlib.ExitStack() as stack:
            if self.skipped:
                states = _padded(self._states, batch)
                if states and (reads or not self.reads_are_skipped):
                    stack.enter_context(self._skipping(*states))
                else:
                    stack.enter_context(self._keeping_states(batch))
            stack.enter_context(self._lookup(reads, batch))
            yield

    def _is_read(self, example: Example) -> bool:
        """Whether nothing of an example up to the reads has to run any more."""
        return example in self._reads and (example in self._states or not self.skipped)

    def _starts(self, batch: Batch, silent: Sequence[bool]) -> list[int]:
        """Tell from where on each example has to run."""
        if not all(map(self._is_read, batch.examples)):
            return [0] * len(batch.examples)
        of_examples = zip(batch.examples, silent, strict=True)
        return [self.past.start(example) if is_silent else 0 for example, is_silent in of_examples]

    def _silent(self, batch: Batch) -> list[bool]:
        """Tell of which examples the memory answers no token before the start."""
        if self.layer.pool.is_empty():
            return [True] * len(batch.examples)
        known = [example for example in batch.examples if example in self._reads]
        device = batch.input_ids.device
        before = [[tensor[: e.start].to(device) for tensor in self._reads[e]] for e in known]
        if not before:
            return [False] * len(batch.examples)
        slot_ids, weights = (torch.cat(tensors).flatten(1) for tensors in zip(*before, strict=True))
        speaks = self.layer.agreement(slot_ids, weights).any(dim=1).split([e.start for e in known])
        silent = {example: not of_one.any() for example, of_one in zip(known, speaks, strict=True)}
        return [silent.get(example, False) for example in batch.examples]

    @contextlib.contextmanager
    def _skipping(self, states: Tensor) -> Iterator[None]:
        result = (states,) if self._returns_tuple else states

        def ask(*_args: Any, **_kwargs: Any) -> Any:
            self.layer.beside.ask(states)  # its reads are known, whatever the states
            return result

        for block in self.skipped:
            # On the instance: attributes that the model reads from its blocks stay there.
            block.forward = lambda *_args, **_kwargs: result
        if self.reads_are_skipped:
            self.skipped[self.layer.block_index].forward = ask
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
            if not example.is_trained or example in kept:  # what is only listened to runs once
                continue
            if own := self.shelf.put([t[row, : len(example.input_ids)] for t in tensors]):
                kept[example] = own


def _padded(kept: dict[Example, Reads], batch: Batch) -> Reads | None:
    """Put together what is kept of the examples of a batch; None where one of them is missing."""
    if not all(example in kept for example in batch.examples):
        return None
    by_example = (
        [tensor[start:][: batch.num_tokens].to(batch.input_ids.device) for tensor in kept[example]]
        for example, start in zip(batch.examples, batch.starts, strict=True)
    )
    return tuple(nn.utils.rnn.pad_sequence(list(t), batch_first=True) for t in zip(*by_example, strict=True))
