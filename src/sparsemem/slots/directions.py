"""Directions of a row that ordinary text tells apart: the axes in which a memory is trained.

Shape letters: T tokens, V value dim.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem.encode import length_batches
from sparsemem.likelihood import IGNORE, label_log_probs
from sparsemem.memory.attach import before_read, memory_layers, pools
from sparsemem.memory.layer import MemoryLayer

NUM_DOCUMENTS, MAX_LENGTH = 64, 64
"""How many documents are used, and how many tokens of each."""
STEP = 43.0
"""Nats by which a token of ordinary text comes out likelier, at most and in the mean, where a row is read
that is as long as each direction: those of SmolLM2-135M, for which the default learning rate was chosen."""
TOKENS_PER_PASS = 256
"""Each needs logits over the whole vocabulary, and their gradient."""


def fisher_directions(
    model: Any, documents: Sequence[list[int]], on_step: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """Find the eigenvectors of the Fisher information of what a memory adds.

    That is the mean outer product of the gradients by which the next tokens of ordinary text depend on a
    row, if it were read at a token. Adam scales every coordinate by itself, so how many steps it needs
    depends on the coordinates. In these the gradients of ordinary text are uncorrelated. Vyas et al. 2024
    (arXiv:2409.11321) take the gradients of the training itself, of which a few facts have too few.

    Their length is such that one learning rate suits every model: a step of Adam, which goes as far in each
    of them, changes predictions by no more than so much. How large hidden states are does not say how far a
    model is to be moved: of Gemma 3 270M nearly all of it is one number of 640.

    Args:
        model: A model with a memory; nothing of it is changed.
        documents: Token ids of background texts; `MAX_LENGTH` of each of the first `NUM_DOCUMENTS` are used.
        on_step: Called with how many were run.

    Returns:
        By pool name, orthogonal columns of one length, float32, square: as wide as what a row adds.
    """
    device = next(model.parameters()).device
    layers = {layer.pool_name: layer for layer in memory_layers(model)}
    moments = {name: torch.zeros(layer.width, layer.width) for name, layer in layers.items()}
    sequences = [document[:MAX_LENGTH] for document in documents[:NUM_DOCUMENTS]]
    num_run = num_tokens = 0
    for places, batch in length_batches(sequences, max_tokens=TOKENS_PER_PASS, device=device):
        mask = batch["attention_mask"].bool()
        labels = batch["input_ids"].where(mask, IGNORE)
        with _added(model) as added, torch.enable_grad():
            total = label_log_probs(model, batch["input_ids"], batch["attention_mask"], labels).sum()
        names, leaves = zip(*added, strict=True)
        # Of these alone: no weight of the model gets a gradient.
        for name, grad in zip(names, torch.autograd.grad(total, leaves), strict=True):
            # The first position is an outlier in every model (an attention sink).
            grad_TV = grad.view(*mask.shape, -1)[:, 1:][mask[:, 1:]]
            moments[name] += (grad_TV.T @ grad_TV).cpu()
        num_tokens += int(mask[:, 1:].sum())
        num_run += len(places)
        if on_step:
            on_step(num_run)
    return {name: _axes(moment / max(1, num_tokens), layers[name]) for name, moment in moments.items()}


def _axes(moment_VV: Tensor, layer: MemoryLayer) -> Tensor:
    """Return the eigenvectors of a second moment of gradients, as long as a step along them may be."""
    squares_V, axes_VV = torch.linalg.eigh(moment_VV.double())
    size = squares_V.clamp(min=0).sqrt().sum().item()
    if layer.relation is not None:  # the gradients are by what is added, which is as much larger than a row
        size *= layer.value_scale.item()
    length = STEP / size if size else 1.0
    scaled: Tensor = (length * axes_VV).float()
    return scaled


@contextlib.contextmanager
def _added(model: Any) -> Iterator[list[tuple[str, Tensor]]]:
    """Within this context zeros that have a gradient are added to all a memory says; yields them by pool."""
    added: list[tuple[str, Tensor]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(before_read(model, lambda *_: None))  # a layer with an observer is never skipped
        said: dict[str, tuple[nn.Module, str]] = {name: (pool, "read") for name, pool in pools(model).items()}
        said |= {layer.pool_name: (layer, "answer") for layer in memory_layers(model) if layer.relation}
        for name, (module, method) in said.items():
            find = getattr(module, method)

            def say(*args: Tensor, name: str = name, find: Any = find) -> Tensor:
                found: Tensor = find(*args).detach()
                added.append((name, torch.zeros_like(found, requires_grad=True)))
                return found + added[-1][1]

            setattr(module, method, say)
            stack.callback(delattr, module, method)
        yield added
