"""Texts to padded token batches."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def token_batches(
    tokenizer: Any,
    texts: Iterable[str],
    *,
    batch_size: int = 8,
    max_length: int = 256,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Tensor]]:
    """Yield `input_ids` and `attention_mask` of consecutive texts, cut at `max_length`, right padded.

    Texts that give no token are left out. Shapes (batch, tokens), int64.
    """
    texts = iter(texts)
    while chunk := list(islice(texts, batch_size)):
        encoded = tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"]
        sequences = [ids for ids in encoded if ids]
        if sequences:
            yield {key: value.to(device) for key, value in pad(sequences).items()}


def token_lists(tokenizer: Any, texts: Iterable[str], *, max_length: int = 256) -> Iterator[list[int]]:
    """Yield the token ids of each text, cut at `max_length`; texts that give no token are left out."""
    texts = iter(texts)
    while chunk := list(islice(texts, 8)):
        yield from filter(None, tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"])


def length_batches(
    sequences: Sequence[list[int]], *, max_tokens: int = 2048, device: torch.device | str = "cpu"
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batch sequences of like length, so that hardly anything is padding; longest first.

    Ordinary text in batches of eight as it comes is more than a third padding.

    Args:
        sequences: Token ids, none empty.
        max_tokens: Size of a batch, padding included; a longer sequence gets a batch of its own.
        device: Where the batches go.

    Yields:
        Places of the sequences in the list, and `input_ids` and `attention_mask` of shape (batch, tokens).
    """
    places = sorted(range(len(sequences)), key=lambda place: -len(sequences[place]))
    while places:
        size = max(1, max_tokens // len(sequences[places[0]]))
        batch, places = places[:size], places[size:]
        yield batch, {key: value.to(device) for key, value in pad([sequences[i] for i in batch]).items()}


def pad(sequences: Sequence[Sequence[int]], side: str = "right", value: int = 0) -> dict[str, Tensor]:
    """Pad token lists to one length.

    Args:
        sequences: Token ids, at least one list, none empty.
        side: Where the padding goes, "right" or "left".
        value: Id of the padding; masked, so any valid one will do.

    Returns:
        `input_ids` and `attention_mask`, shape (sequences, longest), int64.
    """
    length = max(map(len, sequences))
    input_ids = torch.full((len(sequences), length), value, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        span = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        input_ids[row, span] = torch.tensor(ids)
        attention_mask[row, span] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
