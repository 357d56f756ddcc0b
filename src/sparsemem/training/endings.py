"""After which answers a model would go on, where it should stop."""

from collections.abc import Iterable
from typing import Any

import torch

from sparsemem.likelihood import log_probs_at
from sparsemem.training.examples import Example, collate_passes


@torch.no_grad()
def unended(model: Any, examples: Iterable[Example]) -> set[int]:
    """Find the facts after whose answers a model would go on.

    One text of each fact tells, the first that is asked behind answered examples, as these show how long an
    answer is; of a fact without one, any that says where its answer ends.

    Args:
        model: A causal LM, as it is before the facts are learned.
        examples: Texts of facts.

    Returns:
        Numbers of facts.
    """
    telling: dict[int, Example] = {}
    for example in examples:
        known = telling.get(example.fact_index)
        if example.says_end and (known is None or (known.is_trained and not example.is_trained)):
            telling[example.fact_index] = example
    found = set()
    # Every process sees all of them: a model that is spread over processes runs in all at once.
    for part in collate_passes([*telling.values()], next(model.parameters()).device):
        is_last = torch.zeros_like(part.attention_mask, dtype=torch.bool)
        for number, example in enumerate(part.examples):
            assert example.over is not None
            is_last[number, example.over] = True
        predicted = log_probs_at(model, part.input_ids, part.attention_mask, is_last).argmax(dim=-1)
        ends = part.labels.roll(-1, dims=1)[is_last]
        found |= set(part.fact_index[predicted != ends].tolist())
    return found
