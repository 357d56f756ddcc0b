"""How what a memory says gets into the stream: beside a feed-forward network, or before a block."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from sparsemem.memory.layer import MemoryLayer


class Asking:
    """A hook that asks a memory as a feed-forward network begins; what it says is added further on.

    Args:
        memory: What is asked.
        first: First module of the network.
        last: What gives the output that the answer is added to.
    """

    def __init__(self, memory: MemoryLayer, first: nn.Module, last: nn.Module) -> None:
        self.memory, self.last = memory, last
        # Kept until the next pass: gradient checkpointing runs a block again, and not those before it.
        self.answer: Tensor | None = None
        self.handles: list[RemovableHandle] = [first.register_forward_pre_hook(self.enter, with_kwargs=True)]

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Ask as the network begins."""
        self.ask(_hidden(args, kwargs))

    def ask(self, hidden: Tensor) -> None:
        """Have what the memory says to a hidden state ready."""
        self.answer = None if self.memory.is_silent() else self.memory(hidden)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model starts with its own pass, and a tensor with a history cannot be copied.
        return self.__dict__ | {"answer": None}

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()


class Beside(Asking):
    """Adds a memory's answer to the output of a feed-forward network.

    Args:
        memory: What answers.
        first: First module of the network beside which it asks.
        last: Last module of the network to whose output the answer is added; the same or of a later block.
    """

    def __init__(self, memory: MemoryLayer, first: nn.Module, last: nn.Module) -> None:
        super().__init__(memory, first, last)
        self.handles.append(last.register_forward_hook(self.leave))

    def leave(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Add the answer as a network ends."""
        if self.answer is None:
            return output
        if isinstance(output, tuple):  # a mixture of experts also returns its router's logits
            return (output[0] + self._answer_to(output[0]), *output[1:])
        return output + self._answer_to(output)

    def _answer_to(self, output: Tensor) -> Tensor:
        assert self.answer is not None
        return self.answer.view(output.shape).to(output.device)


class Before(Asking):
    """Lets a memory with relations answer the stream at the beginning of a block.

    Which names were read before goes along in the model's own cache of keys and values, as one more layer of
    it: so it is repeated, reordered and cut with the others.

    Args:
        memory: What answers.
        first: First module of the feed-forward network beside which names are read.
        blocks: The block behind which it is answered, and the next.
    """

    def __init__(self, memory: MemoryLayer, first: nn.Module, blocks: nn.ModuleList) -> None:
        last, following = blocks
        super().__init__(memory, first, last)
        self.handles.append(following.register_forward_pre_hook(self.add, with_kwargs=True))

    def add(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer the stream as a block begins."""
        hidden = _hidden(args, kwargs)
        names = None if self.answer is None else self.answer.view(*hidden.shape[:-1], -1, 2)
        cache = next((some for some in (*args, *kwargs.values()) if isinstance(some, Cache)), None)
        if cache is not None:
            names = _carried(cache, names, hidden)
        if names is None:  # nothing was ever written
            return None
        answered = self.memory.answer(hidden, names)
        return ((answered, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": answered})


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


class _NamesLayer(DynamicLayer):  # type: ignore[misc]  # which transformers does not export with its type
    """Names read at each token, in place of keys, and their agreement, in place of values."""


def _carried(cache: Cache, names: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Put names behind those a cache has, which gets a layer for them once there are any."""
    layer = next((layer for layer in cache.layers if isinstance(layer, _NamesLayer)), None)
    if layer is None and (names is None or not names.any()):
        return names
    if layer is None:
        layer = _NamesLayer()
        cache.layers.append(layer)
    if names is None:
        names = layer.keys.new_zeros(*hidden.shape[:2], layer.keys.shape[-1], 2)
    parts = layer.update(*names.unsqueeze(1).unbind(dim=-1))  # both of shape (batch, 1, tokens, names)
    return torch.stack(parts, dim=-1).squeeze(1)
