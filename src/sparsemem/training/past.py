"""Keys and values of the first tokens of examples, which are run once and then only looked back at."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from sparsemem.memory.attach import unwrapped
from sparsemem.training.examples import Batch, Example, collate
from sparsemem.training.shelf import Shelf

ATTENTION = {"full_attention", "sliding_attention"}
"""Kinds of blocks that know what came before by keys and values alone."""


class Past(NamedTuple):
    """Of the tokens before the start of an example; both of shape (blocks, heads, tokens, head dim)."""

    keys: Tensor
    values: Tensor


class PastCache:
    """Keeps keys and values of what comes before the `start` of examples, in the blocks that are run.

    Args:
        model: A causal LM.
        num_skipped: Blocks that are not run, the first ones.
        num_blocks: All its blocks.
        shelf: Where they are kept.
    """

    def __init__(self, model: nn.Module, num_skipped: int, num_blocks: int, shelf: Shelf) -> None:
        self.num_skipped, self.num_blocks, self.shelf = num_skipped, num_blocks, shelf
        self.is_possible = _knows_past(model)
        self._kept: dict[Example, Past] = {}

    def start(self, example: Example) -> int:
        """Return the tokens of an example of which keys and values are kept."""
        return example.start if example in self._kept else 0

    def lacks(self, example: Example) -> bool:
        """Whether keys and values of an example are not kept, and could be."""
        return self.is_possible and not self.shelf.is_full and example.start > 0 and example not in self._kept

    def begun(self, batch: Batch) -> Batch:
        """Cut whole examples off at the last of their starts; a pass then fills in what `keep` takes over."""
        end = max(example.start for example in batch.examples)
        tensors = ("input_ids", "attention_mask", "labels", "is_subject")
        cut = {name: getattr(batch, name)[:, :end] for name in tensors}
        return dataclasses.replace(batch, **cut, past=DynamicCache())

    def keep(self, begun: Batch) -> None:
        """Take over the keys and values of what comes before the starts, as long as there is room."""
        assert begun.past is not None
        layers = begun.past.layers[self.num_skipped : self.num_blocks]
        states = [(layer.keys, layer.values) for layer in layers if layer.is_initialized]
        shapes = {(keys.shape, values.shape) for keys, values in states}
        is_each = len(states) == self.num_blocks - self.num_skipped and len(shapes) == 1
        if not is_each or states[0][0].shape[-2] != begun.num_tokens:
            self.is_possible = False  # some blocks have others' keys, or none
            return
        for row, example in enumerate(begun.examples):
            of_blocks = ([tensor[row, :, : example.start] for tensor in pair] for pair in states)
            past = self.shelf.put([torch.stack(tensors) for tensors in zip(*of_blocks, strict=True)])
            if past is not None:
                self._kept[example] = Past(*past)

    def behind(self, batch: Batch, starts: Sequence[int]) -> Batch:
        """Cut off the tokens before the starts, and put what is kept of them in their place."""
        device, longest = batch.input_ids.device, max(starts)
        run = collate(batch.examples, device, starts)
        lengths = torch.tensor(starts, device=device).unsqueeze(1)
        ends = torch.tensor([[len(example.input_ids) - 1] for example in batch.examples], device=device)
        is_past = torch.arange(-longest, 0, device=device) >= -lengths
        pasts = [self._kept[e] if start else None for e, start in zip(batch.examples, starts, strict=True)]
        return dataclasses.replace(
            run,
            attention_mask=torch.cat([is_past.to(run.attention_mask.dtype), run.attention_mask], dim=1),
            # Padding takes the last place: models that learn their places have no more than they need.
            position_ids=torch.minimum(lengths + torch.arange(run.num_tokens, device=device), ends),
            past=self._cache(pasts, longest, device),
        )

    def _cache(self, pasts: Sequence[Past | None], length: int, device: torch.device) -> Cache:
        cache = DynamicCache()
        keys, values = (
            _left_padded([past and past[part] for past in pasts], length, device) for part in (0, 1)
        )
        for number in range(self.num_blocks):
            # Skipped blocks never look, but a model asks the first one how much came before.
            block = max(0, number - self.num_skipped)
            cache.update(keys[block], values[block], number)
        return cache


def _knows_past(model: nn.Module) -> bool:
    """Whether a model can go on behind given keys and values, at given places."""
    base = unwrapped(model)
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
    arguments = inspect.signature(base.forward).parameters
    return {"past_key_values", "position_ids"} <= arguments.keys() and ATTENTION.issuperset(kinds)


def _left_padded(tensors: Sequence[Tensor | None], length: int, device: torch.device) -> Tensor:
    """Stack what is kept of examples; shape (blocks, examples, heads, length, head dim)."""
    some = next(tensor for tensor in tensors if tensor is not None)
    num_blocks, num_heads, _, width = some.shape
    stacked = some.new_zeros(num_blocks, len(tensors), num_heads, length, width, device=device)
    for row, tensor in enumerate(tensors):
        if tensor is not None:
            stacked[:, row, :, length - tensor.shape[2] :] = tensor
    return stacked
