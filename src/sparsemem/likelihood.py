"""Log-probabilities of labels, with logits computed where there is a label and nowhere else."""

from typing import Any

from torch import Tensor, nn

IGNORE = -100
"""Label of a position that does not count, as in transformers."""


def label_log_probs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **others: Any
) -> Tensor:
    """Return the log-probability of every label given the tokens before it.

    Args:
        model: A causal LM of transformers, or a PEFT model around one.
        input_ids: Right-padded tokens, shape (sequences, tokens).
        attention_mask: 1 at tokens, 0 at padding, same shape.
        labels: Tokens to score, `IGNORE` elsewhere, same shape; the first position cannot be scored.
        others: As in `log_probs_at`.

    Returns:
        Shape (labels,), float32, in reading order.
    """
    positions = before_labels(labels)
    log_probs = log_probs_at(model, input_ids, attention_mask, positions, **others)
    return log_probs.gather(-1, next_tokens(labels, positions)).squeeze(-1)


def log_probs_at(
    model: Any, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, **others: Any
) -> Tensor:
    """Predict what follows the tokens at some positions.

    The output head sees only these, whatever the family does after it (soft caps, scales): for short
    answers behind long prompts that saves nearly all of the head's work.

    Args:
        model: As in `label_log_probs`, with `input_ids` and `attention_mask`.
        input_ids: Tokens.
        attention_mask: 1 at tokens.
        positions: Where to predict, bool, in the shape of `input_ids`.
        others: More that the model is to be called with.

    Returns:
        Log-probabilities, shape (positions, vocabulary), float32, in reading order.
    """

    def at_positions(_head: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][positions].unsqueeze(0),)

    handle = model.get_output_embeddings().register_forward_pre_hook(at_positions)
    try:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **others}
        logits = model(**inputs).logits[0]
    finally:
        handle.remove()
    log_probs: Tensor = logits.float().log_softmax(dim=-1)
    return log_probs


def before_labels(labels: Tensor) -> Tensor:
    """Mark the positions whose next token is a label; bool, in the shape of `labels`."""
    return nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1))


def next_tokens(token_ids: Tensor, positions: Tensor) -> Tensor:
    """Return the token after each marked position, shape (positions, 1)."""
    return token_ids.roll(-1, dims=1)[positions].unsqueeze(-1)
