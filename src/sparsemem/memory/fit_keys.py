"""Fit queries and keys to the hidden states of ordinary text.

Shape letters: T tokens, H heads, N sub-keys, Q half key dim, D width, C classes.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparsemem import distributed
from sparsemem.encode import length_batches, token_lists
from sparsemem.errors import ConfigError, DataError
from sparsemem.memory.attach import SeenEnough, before_read, memory_layers
from sparsemem.memory.layer import MemoryLayer, init_memory
from sparsemem.memory.whiten import inverse_root, whitening
from sparsemem.prompts import background_documents

KeyFit = Literal["random", "k_means", "context_invariant"]


def fit_keys(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    method: KeyFit = "k_means",
    *,
    num_tokens: int = 100_000,
    temperature: float = 1.0,
    prompt_formats: bool = True,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Fit the queries, keys and scale of every memory layer to the hidden states of some texts.

    "k_means" projects the hidden states on their principal components and clusters each half. States
    keep their context, so the last word of a name and the same word elsewhere read different slots; a
    name in a wording never seen still finds some of its own, which the memory layer takes for enough.
    "context_invariant" first whitens them by the covariance within occurrences of one token in
    different contexts and keeps the directions in which tokens differ most beyond that (a linear
    discriminant, Fisher 1936), so that what surrounds a word hardly changes which slots it reads: more
    of them are found again, and more are hit by other text.
    Heads get interleaved components, each cut in two halves.

    Args:
        model: A model with a memory.
        tokenizer: Its tokenizer.
        texts: Background texts.
        method: "random", "k_means" or "context_invariant".
        num_tokens: Tokens to use; fewer if the texts end.
        temperature: Divides the scores before the softmax over the slots read.
        prompt_formats: Put two thirds of the texts into this product's own prompts.
        seed: Seed of the clustering and the random keys.
        on_step: Called with (tokens read, `num_tokens`).

    Returns:
        The same model.

    Raises:
        ConfigError: `method` is unknown, the memory's queries are wider than the model, or the model is
            spread over processes.
        DataError: The texts have too few tokens to fit num_keys sub-keys.
    """
    if method not in get_args(KeyFit):
        raise ConfigError(f"keys={method!r} is unknown; use one of {', '.join(get_args(KeyFit))}")
    distributed.check_whole(model, "fitting keys")
    generator = torch.Generator().manual_seed(seed)
    layers = list(memory_layers(model))
    documents = background_documents(texts, tokenizer) if prompt_formats else texts
    _check_width(layers)
    inputs = background_states(model, tokenizer, documents, num_tokens, layers, on_step)
    # All is computed before anything is changed.
    fitted = [
        _fit(layer, states, method, temperature, generator)
        for layer, states in zip(layers, inputs, strict=True)
    ]
    for layer, states, weights in zip(layers, inputs, fitted, strict=True):
        if weights is None:
            init_memory(layer, generator)
        else:
            for name, tensor in weights.items():
                layer.get_parameter(name).data.copy_(tensor)
        layer.value_scale.fill_(states.scale)
    return model


def principal_components(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and components (D, D), scaled to unit variance overall, strongest first."""
    mean_D = hidden_TD.mean(dim=0)
    centred_TD = hidden_TD - mean_D
    values_D, vectors_DD = torch.linalg.eigh(centred_TD.T @ centred_TD / len(hidden_TD))
    return mean_D, vectors_DD.flip(1) / values_D.mean().sqrt()


def context_invariant_components(hidden_TD: Tensor, classes_T: Tensor) -> tuple[Tensor, Tensor]:
    """Find the directions in which tokens differ beyond what their context does to them.

    Args:
        hidden_TD: Hidden states, shape (tokens, hidden_size).
        classes_T: Class of each, shape (tokens,): here the token itself.

    Returns:
        Mean (D,) and components (D, D): the discriminant directions, strongest first, in units of
        the standard deviation within a class.
    """
    mean_D = hidden_TD.mean(dim=0)
    _, class_T, sizes_C = classes_T.unique(return_inverse=True, return_counts=True)
    class_sums_CD = torch.zeros(len(sizes_C), hidden_TD.shape[1]).index_add_(0, class_T, hidden_TD)
    class_means_CD = class_sums_CD / sizes_C.unsqueeze(1)
    # A token seen once says nothing about what context does to it. Each class counts by the root of
    # its size: "the" must not decide alone what context means.
    repeated_T = sizes_C[class_T] > 1
    if not repeated_T.any():
        raise DataError(
            "no token occurs twice in the background, so context cannot be told from it; give more text"
        )
    scale_T = (sizes_C[class_T].float() - 1).clamp(min=1).rsqrt().sqrt()
    within_TD = ((hidden_TD - class_means_CD[class_T]) * scale_T.unsqueeze(1))[repeated_T]
    within_DD = within_TD.T @ within_TD / (scale_T[repeated_T] ** 2).sum()
    between_CD = class_means_CD - class_means_CD.mean(dim=0)
    between_DD = between_CD.T @ between_CD / len(sizes_C)
    # Shrunk towards the identity: the smallest directions of a sample covariance are noise.
    ridge = 1e-2 * within_DD.diagonal().mean()
    whiten_DD = inverse_root(within_DD + ridge * torch.eye(len(within_DD)))
    _, vectors_DD = torch.linalg.eigh(whiten_DD @ between_DD @ whiten_DD)
    return mean_D, whiten_DD @ vectors_DD.flip(1)


def k_means(points_TQ: Tensor, num_clusters: int, generator: torch.Generator, steps: int = 10) -> Tensor:
    """Cluster points by Lloyd's algorithm; returns centres (num_clusters, Q)."""
    start = torch.randperm(len(points_TQ), generator=generator)[:num_clusters]
    centres_NQ = points_TQ[start].clone()
    for _ in range(steps):
        offsets_N = centres_NQ.square().sum(1) / 2
        parts = points_TQ.split(512)  # so that the distances of a part stay in a cache
        nearest_T = torch.cat([(part @ centres_NQ.T - offsets_N).argmax(dim=1) for part in parts])
        sizes_N = torch.bincount(nearest_T, minlength=num_clusters)
        sums_NQ = torch.zeros_like(centres_NQ).index_add_(0, nearest_T, points_TQ)
        filled_N = sizes_N > 0
        centres_NQ[filled_N] = sums_NQ[filled_N] / sizes_N[filled_N].unsqueeze(1)
    return centres_NQ


def balanced_sample(
    hidden_TD: Tensor, classes_T: Tensor, generator: torch.Generator, per_class: int = 4
) -> Tensor:
    """Keep at most `per_class` states of each token, so that clusters go to rare tokens too."""
    order_T = torch.randperm(len(classes_T), generator=generator)
    shuffled_T = classes_T[order_T]
    by_class_T = shuffled_T.argsort(stable=True)
    sorted_T = shuffled_T[by_class_T]
    first_T = torch.searchsorted(sorted_T, sorted_T)
    rank_T = torch.arange(len(sorted_T)) - first_T
    return hidden_TD[order_T[by_class_T[rank_T < per_class]]]


def check_sample(sample_TD: Tensor, num_needed: int, what: str) -> None:
    """Raise DataError if a balanced sample has fewer states than there are sub-keys to fit to it."""
    if len(sample_TD) < num_needed:
        raise DataError(
            f"the background has {len(sample_TD)} distinct enough tokens, too few to fit "
            f"{num_needed} {what}; give more varied text, or fewer num_keys"
        )


TOKENS_FOR_SCALE = 10_000
"""Of so many tokens, or a little more, what a memory is added to is computed: far above where it reads."""


@dataclasses.dataclass(frozen=True)
class States:
    """What one layer saw: hidden states (T, D), their tokens, and outputs it is added to (S, D)."""

    hidden: Tensor
    tokens: Tensor
    outputs: Tensor

    @property
    def scale(self) -> float:
        """Root of the median mean square of the outputs: a few outlying positions must not decide."""
        if not len(self.outputs):
            return 1.0
        return max(self.outputs.square().mean(dim=-1).median().sqrt().item(), 1e-6)


def background_states(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    num_tokens: int,
    layers: list[MemoryLayer],
    on_step: Callable[[int, int], None] | None,
) -> list[States]:
    """Collect what memory layers see of some texts, the first token of each left out.

    Raises:
        DataError: There are fewer tokens than sub-keys.
    """
    sequences = _sequences(tokenizer, texts, num_tokens)
    # The first position of a sequence is an outlier in every model (an attention sink).
    starts = torch.tensor([0, *(len(ids) - 1 for ids in sequences)]).cumsum(0)
    total = int(starts[-1])
    needed = max(layer.num_keys for layer in layers)
    if total < needed:
        raise DataError(
            f"the background has {total} tokens, too few to fit {needed} sub-keys; "
            "give more text, or fewer num_keys"
        )
    width = layers[0].query.in_features
    hidden = {layer.block_index: torch.empty(total, width) for layer in layers}
    outputs = {layer.block_index: [torch.empty(0, width)] for layer in layers}
    tokens = torch.tensor([token for ids in sequences for token in ids[1:]])
    collected = 0
    for places, batch in length_batches(sequences, device=next(model.parameters()).device):
        kept = batch["attention_mask"].bool().clone()
        kept[:, 0] = False
        # Every state goes where it would be without batches: k-means starts from states by their place.
        ends = [range(int(starts[place]), int(starts[place + 1])) for place in places]
        targets = torch.tensor([target for end in ends for target in end], dtype=torch.int64)

        def keep(layer: MemoryLayer, states: Tensor, kept: Tensor = kept, to: Tensor = targets) -> None:
            hidden[layer.block_index][to] = states[kept].float().cpu()

        is_early = collected < TOKENS_FOR_SCALE
        sized = [layer for layer in layers if is_early and layer.beside is not None]
        with _states_seen(model, layers, keep, ends=not sized), _outputs(sized, kept, outputs):
            model(**batch, use_cache=False)
        collected += len(targets)
        if on_step:
            on_step(collected, num_tokens)
    return [
        States(hidden[index], tokens, torch.cat(outputs[index]))
        for index in (layer.block_index for layer in layers)
    ]


def _sequences(tokenizer: Any, texts: Iterable[str], num_tokens: int) -> list[list[int]]:
    """Tokenize texts until they have `num_tokens` tokens, the first of each not counted."""
    sequences: list[list[int]] = []
    for ids in token_lists(tokenizer, texts):
        ids = ids[: num_tokens + 1]
        if len(ids) > 1:
            sequences.append(ids)
            num_tokens -= len(ids) - 1
        if num_tokens <= 0:
            break
    return sequences


@contextlib.contextmanager
def _states_seen(
    model: nn.Module, layers: list[MemoryLayer], keep: Callable[[MemoryLayer, Tensor], None], ends: bool
) -> Iterator[None]:
    """Call `keep(layer, hidden states)` in every layer, and end the pass at the highest if it `ends` there.

    Not `observe_reads`: what keys that are about to be replaced would read is of no use, and looking it up
    takes a third of the pass.
    """

    def seen(layer: MemoryLayer, answer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        keep(layer, hidden)
        if ends and layer is layers[-1]:
            raise SeenEnough
        return torch.zeros_like(hidden) if layer.pool.is_empty() and not layer.relation else answer(hidden)

    for layer in layers:
        layer.forward = functools.partial(seen, layer, layer.forward)  # type: ignore[method-assign]
    try:
        # An empty memory is called only while somebody wants to know its reads.
        nobody = before_read(model, lambda _layer, _reads: None)
        with torch.no_grad(), nobody, contextlib.suppress(SeenEnough):
            yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def _outputs(layers: list[MemoryLayer], kept: Tensor, outputs: dict[int, list[Tensor]]) -> Iterator[None]:
    """Collect what memories are added to, and end the pass at the last."""
    handles = []
    for layer in reversed(layers):

        def keep(_module: nn.Module, _args: Any, output: Any, index: int = layer.block_index) -> None:
            values = output[0] if isinstance(output, tuple) else output
            outputs[index].append(values[kept].float().cpu())
            if index == layers[-1].block_index:
                raise SeenEnough

        # Before the memory's own hook, and of several layers that share a module in their order.
        handles.append(layer.beside.last.register_forward_hook(keep, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_width(layers: list[MemoryLayer]) -> None:
    for layer in layers:
        if layer.query.out_features > layer.query.in_features:
            raise ConfigError(
                f"num_heads * 2 * query_dim = {layer.query.out_features} exceeds the model's width "
                f"{layer.query.in_features}; lower query_dim or num_heads"
            )


@torch.no_grad()
def _fit(
    layer: MemoryLayer, states: States, method: str, temperature: float, generator: torch.Generator
) -> dict[str, Tensor] | None:
    """Return the fitted parameters of a layer by name; None where they are to be random."""
    if method == "random":
        return None
    if method == "context_invariant":
        mean_D, components_DC = context_invariant_components(states.hidden, states.tokens)
    else:
        mean_D, components_DC = principal_components(states.hidden)
    # Part p gets components p, p + parts, ...: all parts are equally informative.
    parts, width = layer.num_heads * 2, layer.query.out_features
    order = torch.arange(width).view(layer.query_dim, parts).T.flatten()
    weight = components_DC[:, order].T / math.sqrt(temperature)
    bias = -weight @ mean_D
    sample_TD = balanced_sample(states.hidden, states.tokens, generator)
    queries_TPQ = (sample_TD @ weight.T + bias).view(-1, parts, layer.query_dim)
    check_sample(sample_TD, layer.num_keys, "sub-keys")
    keys_PNQ = torch.stack(
        [k_means(queries_TPQ[:, part].contiguous(), layer.num_keys, generator) for part in range(parts)]
    )
    return {
        "query.weight": weight,
        "query.bias": bias,
        "keys": keys_PNQ.view(layer.keys.shape),
        # q.k - |k|^2 / 2 ranks by Euclidean distance, as k-means does.
        "key_bias": (-keys_PNQ.square().sum(-1) / 2).view(layer.key_bias.shape),
        **_fit_relation(layer, states),
    }


def _fit_relation(layer: MemoryLayer, states: States) -> dict[str, Tensor]:
    if layer.relation is None:
        return {}
    weight, bias = whitening(states.outputs, layer.relation_dim)
    return {"relation.weight": weight, "relation.bias": bias}
