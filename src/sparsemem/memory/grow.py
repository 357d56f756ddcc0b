"""More slots for a memory that has learned: sub-keys are added, and no read that matters finds them.

Shape letters: T tokens, P halves of all heads (H * 2), M kept states, N sub-keys, Q half key dim, D width.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem.errors import ConfigError
from sparsemem.memory.attach import memory_config, memory_layers, pools, unwrapped
from sparsemem.memory.fit_keys import background_states, balanced_sample, check_sample, k_means
from sparsemem.memory.layer import MemoryLayer
from sparsemem.prompts import background_documents

MARGIN = 1e-3
"""By how much a new sub-key stays behind the worst one that a kept state reads, in units of its score."""


@dataclasses.dataclass(frozen=True)
class Growth:
    """What became of the reads of one layer.

    Args:
        kept: Share of the weight with which ordinary text read slots that still goes to the same ones.
        new: Share of it that goes to slots that were not there.
        num_kept_states: States whose reads were to stay.
        num_moved_states: Those of them that read another slot now; 0, unless there is a mistake.
    """

    kept: float
    new: float
    num_kept_states: int
    num_moved_states: int


@torch.no_grad()
def grow_memory(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    num_keys: int,
    keep: Mapping[int, Tensor] | None = None,
    *,
    num_tokens: int = 100_000,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[int, Growth]:
    """Add sub-keys to every memory layer of a model, in place.

    Every slot keeps its number and its row. New sub-keys are fitted by k-means to those states of ordinary
    text that are farthest from all old ones. The states in `keep` go on reading the slots they read, with
    the same weights up to the rounding of a sum: a new sub-key that one of them would find is handicapped
    until it does not. Other states may find a nearer sub-key than before, and then read it: `Growth` says
    how much of ordinary text does.

    Background usage has to be counted again.

    Args:
        model: A model with a memory, its keys fitted by "k_means" or "context_invariant".
        tokenizer: Its tokenizer.
        texts: Background texts.
        num_keys: Sub-keys per half from now on; more than there are.
        keep: By block index, states whose reads must stay, shape (states, hidden_size): of the names that
            were learned.
        num_tokens: Tokens of the texts to use.
        seed: Seed of the clustering.
        on_step: Called with (tokens read, `num_tokens`).

    Returns:
        What became of the reads, by block index.

    Raises:
        ConfigError: There are as many sub-keys already, or a pool has a base table.
        DataError: The texts have too few tokens.
    """
    config, layers = memory_config(model), list(memory_layers(model))
    if num_keys <= config.num_keys:
        raise ConfigError(f"num_keys={num_keys}, and the memory has {config.num_keys}; give more")
    grown = dataclasses.replace(config, num_keys=num_keys)
    if any(pool.has_names for pool in pools(model).values()) and not grown.can_relate:
        raise ConfigError(f"num_keys={num_keys} makes more slots than names can be counted; give fewer")
    if any(pool.base is not None for pool in pools(model).values()):
        raise ConfigError("a memory with a base table cannot grow: the table has no rows for new slots")
    documents = background_documents(texts, tokenizer)
    on_cpu = background_states(model, tokenizer, documents, num_tokens, layers, on_step)
    seen = [
        dataclasses.replace(states, hidden=states.hidden.to(layer.keys.device))
        for layer, states in zip(layers, on_cpu, strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    kept = [
        (keep or {}).get(layer.block_index, states.hidden[:0]).to(states.hidden)
        for layer, states in zip(layers, seen, strict=True)
    ]
    added, growth = [], {}
    for layer, states, kept_MD in zip(layers, seen, kept, strict=True):
        sample_TD = balanced_sample(states.hidden, states.tokens, generator)
        added.append(_new_sub_keys(layer, sample_TD, kept_MD, num_keys - config.num_keys, generator))
    for pool in pools(model).values():
        pool.grow(num_keys**2)
    for layer, states, kept_MD, (keys, bias) in zip(layers, seen, kept, added, strict=True):
        before = [layer.lookup(some) for some in (states.hidden, kept_MD)]
        layer.keys = nn.Parameter(torch.cat([layer.keys, keys.to(layer.keys)], dim=2))
        layer.key_bias = nn.Parameter(torch.cat([layer.key_bias, bias.to(layer.key_bias)], dim=2))
        num_old, layer.num_keys = layer.num_keys**2, num_keys
        after = [layer.lookup(some) for some in (states.hidden, kept_MD)]
        growth[layer.block_index] = _compared(before, after, num_old)
    unwrapped(model).memory_config = grown
    return growth


def _new_sub_keys(
    layer: MemoryLayer, sample_TD: Tensor, kept_MD: Tensor, num_new: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Fit new sub-keys and their biases; shapes (heads, 2, num_new, query_dim) and (heads, 2, num_new)."""
    check_sample(sample_TD, num_new, "new sub-keys")
    shape = layer.num_heads * 2, layer.query_dim
    queries_TPQ = layer.query(sample_TD).view(-1, *shape)
    kept_MPQ = layer.query(kept_MD).view(-1, *shape)
    old_PNQ, old_bias_PN = layer.keys.flatten(0, 1), layer.key_bias.flatten(0, 1)
    keys, biases = [], []
    for part in range(shape[0]):
        queries_TQ = queries_TPQ[:, part].contiguous()
        # Where old sub-keys are far, new ones are needed, and take little from them.
        distance_T = queries_TQ.square().sum(1) / 2 - (queries_TQ @ old_PNQ[part].T + old_bias_PN[part]).amax(
            1
        )
        far = distance_T.topk(max(num_new, len(queries_TQ) // 2)).indices.sort().values
        new_NQ = k_means(queries_TQ[far].cpu(), num_new, generator).to(queries_TQ)  # the same on every device
        bias_N = -new_NQ.square().sum(1) / 2
        if len(kept_MPQ):
            kept_MQ = kept_MPQ[:, part]
            scores_MN = kept_MQ @ old_PNQ[part].T + old_bias_PN[part]
            worst_M1 = scores_MN.topk(min(layer.top_k, scores_MN.shape[1]), dim=1).values[:, -1:]
            ahead_N = (kept_MQ @ new_NQ.T + bias_N - worst_M1).amax(0) + MARGIN * worst_M1.abs().amax()
            bias_N = bias_N - ahead_N.clamp(min=0)
        keys.append(new_NQ)
        biases.append(bias_N)
    of_layer = layer.num_heads, 2, num_new
    return torch.stack(keys).view(*of_layer, layer.query_dim), torch.stack(biases).view(of_layer)


def _compared(
    before: list[tuple[Tensor, Tensor]], after: list[tuple[Tensor, Tensor]], num_old: int
) -> Growth:
    """Compare reads of (background, kept) states, each as (slot ids, weights) of all heads."""
    (ids, weights), (kept_ids, _) = before
    (new_ids, new_weights), (new_kept_ids, _) = after
    is_there = (ids.unsqueeze(-1) == new_ids.unsqueeze(-2)).any(-1)
    moved = (kept_ids.sort(-1).values != new_kept_ids.sort(-1).values).flatten(1).any(1)
    return Growth(
        kept=float((weights * is_there).sum() / weights.sum()),
        new=float((new_weights * (new_ids >= num_old)).sum() / new_weights.sum()),
        num_kept_states=len(kept_ids),
        num_moved_states=int(moved.sum()),
    )
