"""Fitting keys and counting usage, against the bare forward pass over the same tokens.

    python benchmarks/attach.py

On SmolLM2-135M with the default memory; fewer tokens and documents than by default, but as many of one to
the other. Clustering, whose cost hardly grows with the text, so weighs more here than by default, and so do
the axes of AdamW, for which 64 documents are run there and back however many are counted. Both floors run the
very batches that attaching runs, with no more padding: "forward" all blocks without the head, "to_memory" the
blocks up to the memory with the feed-forward network beside it, after which attaching stops.
Ratios of the processor's time stand beside those of seconds, as a pass takes long enough for the load of a
shared machine to change.
"""

import contextlib
from itertools import islice
from typing import Any

import torch
from timing import in_turn, parser, publish

import sparsemem
from sparsemem.cli.demo import installed_data
from sparsemem.encode import length_batches, token_lists
from sparsemem.memory.attach import find_blocks, memory_layers
from sparsemem.memory.base_model import fingerprint
from sparsemem.prompts import background_documents

NUM_TOKENS, NUM_DOCUMENTS = 6000, 60
ROUNDS, ROUNDS_OF_FORWARD = 5, 1


class SeenEnough(Exception):  # noqa: N818 - not an error
    """Ends a forward pass."""


def main() -> None:
    args = parser(__doc__).parse_args()
    gguf, articles = installed_data()
    model, tokenizer = sparsemem.load_base_model(str(gguf))
    sha = fingerprint(model.named_parameters())
    sparsemem.attach_memory(model)
    last = find_blocks(model)[next(memory_layers(model)).block_index]
    sequences = list(islice(token_lists(tokenizer, background_documents(articles, tokenizer)), NUM_DOCUMENTS))
    to_fit, left = [], NUM_TOKENS
    while left > 0:
        to_fit.append(sequences[len(to_fit)][: left + 1])
        left -= len(to_fit[-1]) - 1

    @torch.no_grad()
    def forward() -> None:
        for part in (to_fit, sequences):
            for _, batch in length_batches(part):
                with contextlib.suppress(SeenEnough):
                    model.model(**batch, use_cache=False)

    def to_memory() -> None:
        def stop(*_args):
            raise SeenEnough

        handle = last.mlp.register_forward_hook(stop, prepend=True)
        try:
            forward()
        finally:
            handle.remove()

    def fit_keys() -> None:
        sparsemem.fit_keys(model, tokenizer, articles, num_tokens=NUM_TOKENS)

    def count_usage() -> None:
        sparsemem.count_usage(model, tokenizer, articles, num_documents=NUM_DOCUMENTS)

    def attach() -> None:
        fit_keys()
        count_usage()

    parts = {"fit_keys": fit_keys, "count_usage": count_usage, "to_memory": to_memory}
    times = in_turn(parts, ROUNDS)
    times |= in_turn({"attach": attach, "forward": forward}, ROUNDS_OF_FORWARD)
    tokens = {"fitted": NUM_TOKENS, "counted": sum(map(len, sequences))}
    publish("attach", {"ratios": ratios_of(times), "times": times, "tokens": tokens}, args, model_sha=sha)


def ratios_of(times: dict[str, Any]) -> dict[str, float]:
    """What attaching takes, over each floor, and the share of it that fits keys."""
    ratios = {}
    for kind in ("seconds", "processor_seconds"):
        of = {name: measured[f"median_{kind}"] for name, measured in times.items()}
        both = of["fit_keys"] + of["count_usage"]
        ratios[f"attach_over_forward_{kind}"] = of["attach"] / of["forward"]
        ratios[f"attach_over_forward_to_memory_{kind}"] = both / of["to_memory"]
        ratios[f"fit_keys_share_of_attach_{kind}"] = of["fit_keys"] / both
    return ratios


if __name__ == "__main__":
    main()
