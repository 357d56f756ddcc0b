"""Log-probabilities of labels, with logits computed where there is a label and nowhere else."""

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that does not count, as in transformers."""


def label_log_probs(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of every label given the tokens before it.

    The output head sees only the positions before a label, whatever the family does after it (soft
    caps, scales): for short answers behind long prompts that saves nearly all of the head's work.

    Args:
        model: A causal LM of transformers, or a PEFT model around one.
        input_ids: Right-padded tokens, shape (sequences, tokens).
        attention_mask: 1 at tokens, 0 at padding, same shape.
        labels: Tokens to score, `IGNORE` elsewhere, same shape; the first position cannot be scored.

    Returns:
        Shape (labels,), float32, in reading order.
    """
    before_label = torch.zeros_like(labels, dtype=torch.bool)
    before_label[:, :-1] = labels[:, 1:] != IGNORE

    def at_labels(_head: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][before_label].unsqueeze(0),)

    handle = model.get_output_embeddings().register_forward_pre_hook(at_labels)
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[0]
    finally:
        handle.remove()
    targets = labels[:, 1:][before_label[:, :-1]]
    log_probs: Tensor = logits.float().log_softmax(dim=-1)
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
