"""After which answers a model would go on, where it should stop."""

from collections.abc import Iterable
from typing import Any

import torch

from sparsemem.likelihood import log_probs_at, next_tokens
from sparsemem.training.examples import Example, collate_passes


@torch.no_grad()
def unended(model: Any, tokenizer: Any, examples: Iterable[Example]) -> set[int]:
    """Find the facts after whose answers a model would go on.

    One text of each fact tells, the first that is asked behind several answered examples, as these show how
    long an answer is: in a chat a model goes on after nearly all short ones. Of a fact without such a text,
    the first does that says where its answer ends.

    Args:
        model: A causal LM, as it is before the facts are learned.
        tokenizer: Its tokenizer.
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
    for part in collate_passes([*telling.values()], next(model.parameters()).device):
        is_last = torch.zeros_like(part.attention_mask, dtype=torch.bool)
        for number, example in enumerate(part.examples):
            assert example.over is not None
            is_last[number, example.over] = True
        predicted = log_probs_at(model, part.input_ids, part.attention_mask, is_last).argmax(dim=-1)
        ends = next_tokens(part.input_ids, is_last).squeeze(1)
        for fact, token, end in zip(part.fact_index.tolist(), predicted.tolist(), ends.tolist(), strict=True):
            # A tokenizer may have one token for two ends of lines.
            stops = tokenizer.decode([token]).startswith(tokenizer.decode([end]))
            if not stops and token != tokenizer.eos_token_id:
                found.add(fact)
    return found
