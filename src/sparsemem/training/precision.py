"""Mixed precision: autocast, without casting frozen weights anew in every pass."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsemem.memory.attach import memory_layers


class MixedPrecision:
    """Context in which a training step computes in bfloat16 what allows it.

    Autocast keeps its copies of weights only where they need a gradient, and casts all others again in
    each forward pass. Where most weights are frozen that costs more than it saves on short batches,
    so their copies are kept here.

    Args:
        model: The model, with `requires_grad` as it will be trained.
        mode: "no" or "bf16".
    """

    def __init__(self, model: nn.Module, mode: str) -> None:
        self.mode, self.device = mode, next(model.parameters()).device
        self.frozen = _frozen_matrices(model) if mode == "bf16" else []
        self.copies = [weight.to(torch.bfloat16) for weight in self.frozen]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within this context, which has to hold the backward pass too, frozen weights are bfloat16."""
        exact = [weight.data for weight in self.frozen]
        for weight, copy in zip(self.frozen, self.copies, strict=True):
            weight.data = copy
        try:
            yield
        finally:
            for weight, data in zip(self.frozen, exact, strict=True):
                weight.data = data

    def forward(self) -> torch.autocast:
        """Context of a forward pass."""
        return bf16_autocast(self.device, self.mode)


def bf16_autocast(device: torch.device, mode: str) -> torch.autocast:
    """Return the context of a forward pass in "bf16"; with "no" it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16")


def _frozen_matrices(model: nn.Module) -> list[Tensor]:
    """List the weights of linear layers that have no gradient, but for a memory's and tied ones.

    A memory computes in float32; and an embedding that shares its weight with the output head decides
    the precision of everything after it.
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    exact = {id(embedding), *(id(p) for layer in memory_layers(model) for p in layer.parameters())}
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [
        module.weight
        for module in linear
        if not module.weight.requires_grad
        and module.weight.dtype == torch.float32
        and id(module.weight) not in exact
    ]
