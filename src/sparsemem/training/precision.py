"""Mixed precision: autocast, without casting frozen weights anew in every pass."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsemem.memory.attach import memory_layers

SHORT = 128
"""Tokens up to which plain attention is quicker on a CPU, and its scores take little memory."""


class MixedPrecision:
    """Context in which a training step computes in bfloat16 what allows it.

    Autocast keeps its copies of weights only where they need a gradient, and casts all others again in
    each forward pass. Where most weights are frozen that costs more than it saves on short batches,
    so their copies are kept here.

    Args:
        model: The model, with `requires_grad` as it will be trained.
        mode: "no" or "bf16"; warns where the processor can only imitate the latter.
    """

    def __init__(self, model: nn.Module, mode: str) -> None:
        self.mode, self.device = mode, next(model.parameters()).device
        if mode == "bf16" and self.device.type == "cpu" and not computes_in_bf16():
            warnings.warn(
                "mixed_precision='bf16': this CPU has no instructions for bfloat16 and takes several times "
                "as long; use mixed_precision='no'",
                stacklevel=2,
            )
        self.frozen = _frozen_matrices(model) if mode == "bf16" else []
        self.copies = [weight.to(torch.bfloat16) for weight in self.frozen]
        self.head = _frozen_tied_head(model) if mode == "bf16" else None
        if self.head is not None:
            self.head_copy = nn.Parameter(self.head.weight.to(torch.bfloat16), requires_grad=False)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within this context, which has to hold the backward pass too, frozen weights are bfloat16."""
        exact = [weight.data for weight in self.frozen]
        for weight, copy in zip(self.frozen, self.copies, strict=True):
            weight.data = copy
        if self.head is not None:
            tied, self.head.weight = self.head.weight, self.head_copy
        try:
            yield
        finally:
            if self.head is not None:
                self.head.weight = tied
            for weight, data in zip(self.frozen, exact, strict=True):
                weight.data = data

    @contextlib.contextmanager
    def forward(self, num_tokens: int) -> Iterator[None]:
        """Context of a forward pass over sequences of `num_tokens`."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(bf16_autocast(self.device, self.mode))
            if self.device.type == "cpu" and num_tokens <= SHORT:
                # There the fused attention takes longer going back than the matrix products of its block.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def computes_in_bf16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 as quickly as in float32, or more so."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bf16_autocast(device: torch.device, mode: str) -> torch.autocast:
    """Return the context of a forward pass in "bf16"; with "no" it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16")


def _frozen_tied_head(model: Any) -> Any:
    """Return the output head, if its weight is the embedding's and has no gradient.

    It is as large as many blocks. The embedding itself stays as it is: it decides the precision of everything
    after it.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
    return head if is_tied and not head.weight.requires_grad else None


def _frozen_matrices(model: nn.Module) -> list[Tensor]:
    """List the weights of linear layers that have no gradient, but for a memory's and tied ones.

    A memory computes in float32.
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
