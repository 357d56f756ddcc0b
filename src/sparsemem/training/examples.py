"""Facts to token sequences with labels, and with marks at the tokens of their subject."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sparsemem import distributed
from sparsemem.data import Fact, occurrences, whole_words
from sparsemem.encode import pad
from sparsemem.likelihood import IGNORE
from sparsemem.training.paraphrase import Wording

Length = Callable[["Example"], int]
"""Says how many tokens of an example a pass runs."""
EXAMPLES_PER_PASS = 32
"""At most so many examples are in one pass that computes no gradients."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One training sequence of a fact."""

    fact_index: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    is_subject: tuple[bool, ...]
    about: int | None = None
    """Number of its fact's subject, if it has one: the same for all facts about it."""
    over: int | None = None
    """Place of the last token of the answer; None where it is cut off."""
    is_trained: bool = True
    """Else it only shows how its fact is read and asked for."""
    num_left_out: int = 0
    """Tokens of the answer before the first that is learned."""

    @property
    def num_labels(self) -> int:
        """Tokens that are learned."""
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def num_said(self) -> int:
        """Tokens that are learned and belong to the answer, not to what tells that it is over."""
        end = None if self.over is None else self.over + 1
        return sum(label != IGNORE for label in self.labels[1:end])

    @property
    def says_end(self) -> bool:
        """Whether what tells that the answer is over is learned."""
        return self.over is not None and any(label != IGNORE for label in self.labels[self.over + 1 :][:1])

    @property
    def start(self) -> int:
        """The first token whose prediction matters, or that a memory is to answer."""
        if not any(self.is_subject):
            return 0
        labels = (place for place, label in enumerate(self.labels) if label != IGNORE)
        return min(self.is_subject.index(True), max(0, next(labels, len(self.labels)) - 1))

    @property
    def teaches(self) -> bool:
        """Whether there is something to learn, or to be listened to; else it is there to be read and held."""
        return self.num_labels > 0

    def after_subject(self) -> "Example":
        """Leave only the labels behind the first token of the subject; none, where it is not named."""
        begins = self.is_subject.index(True) if any(self.is_subject) else len(self.labels)
        labels = (label if place > begins else IGNORE for place, label in enumerate(self.labels))
        left_out = sum(label != IGNORE for label in self.labels[1 : begins + 1])
        return dataclasses.replace(self, labels=tuple(labels), num_left_out=left_out)


FactBatch = tuple[tuple[Example, ...], ...]
"""All wordings of each fact of a batch, and the texts that are listened to or held beside them."""


def own_share(wordings: Sequence[Example]) -> list[Example]:
    """List the texts of a fact that this process runs, of several that learn together.

    Always the same ones, so that what is computed once is computed in one process.
    """
    # Equal ones go together: they are told apart by what they are, here and where they are kept.
    own = {*distributed.share([*dict.fromkeys(wordings)], first=wordings[0].fact_index)}
    return [example for example in wordings if example in own]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded examples; every tensor but `fact_index` has shape (examples, tokens).

    Args:
        starts: First token of each example in here; what comes before it is `past`.
        past: Keys and values of tokens before, padded on the left to the longest; the attention mask tells
            them from padding, and is as much wider. A pass adds its own.
        position_ids: Places of the tokens in their examples, where some come before.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    is_subject: Tensor
    fact_index: Tensor
    examples: tuple[Example, ...]
    starts: tuple[int, ...]
    past: Cache | None = None
    position_ids: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest example, from its start on."""
        return self.input_ids.shape[1]

    @property
    def others(self) -> dict[str, Any]:
        """Further arguments of the model, of what comes before."""
        if self.past is None:
            return {}
        position_ids = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"past_key_values": self.past, "use_cache": True, **position_ids}

    @property
    def model_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `likelihood.label_log_probs` behind the model."""
        return self.input_ids, self.attention_mask, self.labels

    @property
    def num_labels(self) -> int:
        """Tokens that are learned."""
        return int((self.labels[:, 1:] != IGNORE).sum())


def encode_wording(
    tokenizer: Any,
    fact_index: int,
    fact: Fact,
    wording: Wording,
    names: Sequence[str],
    loss_on: str,
    max_length: int,
) -> Example | None:
    """Tokenize one wording of a fact; None if nothing of it would be learned but should be.

    With loss on the answer, labels are the tokens of the wording's target: what follows the prompt
    of a question, or the last place of the answer in a statement. A statement without the answer,
    and a document, are learned whole; of a wording with an empty target, nothing is.
    """
    text = wording.context + wording.text
    encoded = tokenizer(
        text,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        add_special_tokens=wording.add_special_tokens,
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    start, end = len(wording.context), len(text)
    if loss_on == "answer" or wording.target == "":
        start, end = wording.target_span(fact) or (start, end)
    labels = [
        token if start < right and left < end and right > left else IGNORE
        for token, (left, right) in zip(ids, offsets, strict=True)
    ]
    if wording.target != "" and all(label == IGNORE for label in labels[1:]):
        return None
    find = occurrences if len(names) == 1 else whole_words
    # What only shows how a fact is asked for behind other questions is not about these.
    named_from = 0 if wording.is_trained else len(wording.context)
    spans = [span for name in names for span in find(text, name) if span[0] >= named_from]
    is_subject = [
        any(left < stop and begin < right and right > left for begin, stop in spans)
        for left, right in offsets
    ]
    answer_end = end - len(wording.ending)
    answer = [
        place
        for place, (label, (left, _)) in enumerate(zip(labels, offsets, strict=True))
        if label != IGNORE and left < answer_end
    ]
    over = answer[-1] if answer and offsets[answer[-1]][1] >= answer_end else None
    return Example(
        fact_index,
        tuple(ids),
        tuple(labels),
        tuple(is_subject),
        over=over,
        is_trained=wording.is_trained,
    )


def collate(
    examples: Sequence[Example], device: torch.device | str = "cpu", starts: Sequence[int] = ()
) -> Batch:
    """Pad examples on the right into a batch, each from its start on."""
    starts = tuple(starts) or (0,) * len(examples)
    from_start = [*zip(examples, starts, strict=True)]
    padded = pad([list(example.input_ids[start:]) for example, start in from_start])
    labels = pad([list(example.labels[start:]) for example, start in from_start], value=IGNORE)["input_ids"]
    marks = pad([[*map(int, example.is_subject[start:])] for example, start in from_start])["input_ids"]
    return Batch(
        input_ids=padded["input_ids"].to(device),
        attention_mask=padded["attention_mask"].to(device),
        labels=labels.to(device),
        is_subject=marks.bool().to(device),
        fact_index=torch.tensor([example.fact_index for example in examples], device=device),
        examples=tuple(examples),
        starts=starts,
    )


def whole(example: Example) -> int:
    """Tokens of an example."""
    return len(example.input_ids)


def by_length(examples: Iterable[Example], length: Length = whole) -> list[Example]:
    """Put examples in the order in which `collate_parts` takes them."""
    return sorted(examples, key=lambda example: (length(example), example.input_ids))


def collate_parts(
    examples: Iterable[Example],
    num_parts: int,
    device: torch.device | str = "cpu",
    length: Length = whole,
) -> list[Batch]:
    """Cut examples into at least `num_parts` batches of examples of like length, or none into none.

    A part ends where padding it to the next example's length would make a quarter of it padding.
    """
    ordered = by_length(examples, length)
    if not ordered:
        return []
    most = math.ceil(len(ordered) / num_parts)
    parts: list[list[Example]] = [[]]
    num_tokens = 0
    for example in ordered:
        tokens = length(example)
        padded = tokens * (len(parts[-1]) + 1)
        if parts[-1] and (len(parts[-1]) == most or num_tokens + tokens < 0.75 * padded):
            parts.append([])
            num_tokens = 0
        parts[-1].append(example)
        num_tokens += tokens
    return [collate(part, device) for part in parts]


def collate_passes(examples: Sequence[Example], device: torch.device | str = "cpu") -> list[Batch]:
    """Cut examples into batches for passes without gradients, where how many there are is all the same."""
    return collate_parts(examples, math.ceil(len(examples) / EXAMPLES_PER_PASS), device)
