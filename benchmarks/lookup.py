"""Finding the best slots: in two stages, over all slots, and the matrix product that nothing can avoid.

    python benchmarks/lookup.py

256 tokens, 16 heads, 8 reads each, half keys of 16, as by default. "brute_force" adds up the score of every
slot and takes the best, some tokens at a time; its largest size here is 262,144 slots. "scores" is the matrix
product and the bias alone, in the same parts as the lookup.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import in_turn, parser, publish
from torch import Tensor

from sparsemem.memory.lookup import SCORES_AT_ONCE, best_slots, sub_key_scores

NUM_TOKENS, NUM_HEADS, TOP_K, QUERY_DIM = 256, 16, 8, 16
NUM_KEYS = (64, 128, 256, 512, 1024, 2048, 4096)
MOST_SLOTS_BY_BRUTE_FORCE = 512**2
ROUNDS = 7


def brute_force(queries: Tensor, keys: Tensor, bias: Tensor) -> None:
    for some in queries.split(max(1, SCORES_AT_ONCE["cpu"] // (NUM_HEADS * keys.shape[2] ** 2))):
        first, second = sub_key_scores(some, keys, bias).unbind(dim=2)
        (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2).topk(TOP_K, dim=-1)


def scores(queries: Tensor, keys: Tensor, bias: Tensor) -> None:
    for some in queries.split(max(1, SCORES_AT_ONCE["cpu"] // bias.numel())):
        sub_key_scores(some, keys, bias)


def main() -> None:
    args = parser(__doc__).parse_args()
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(NUM_TOKENS, NUM_HEADS, 2, QUERY_DIM, generator=generator)
    times: dict[int, Any] = {}
    ratios = {}
    for num_keys in NUM_KEYS:
        keys = torch.randn(NUM_HEADS, 2, num_keys, QUERY_DIM, generator=generator)
        given = queries, keys, -keys.square().sum(-1) / 2
        contenders: dict[str, Callable[[], Any]] = {
            "two_stages": partial(best_slots, *given, TOP_K),
            "scores": partial(scores, *given),
        }
        if num_keys**2 <= MOST_SLOTS_BY_BRUTE_FORCE:
            contenders["brute_force"] = partial(brute_force, *given)
        times[num_keys] = measured = in_turn(contenders, ROUNDS)
        ours = measured["two_stages"]["median_seconds"]
        ratios[f"lookup_over_scores_{num_keys**2}_slots"] = ours / measured["scores"]["median_seconds"]
        if "brute_force" in measured:
            brute = measured["brute_force"]["median_seconds"]
            ratios[f"brute_force_over_lookup_{num_keys**2}_slots"] = brute / ours
    publish("lookup", {"ratios": ratios, "times": times}, args)


if __name__ == "__main__":
    main()
