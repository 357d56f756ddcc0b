"""Do the slots a ranking chooses sit at entities? Selection only, nothing is trained.

Shape letters: T tokens, R reads per token (all heads together).
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem.data import Fact, occurrences
from sparsemem.encode import pad
from sparsemem.errors import DataError
from sparsemem.evaluation.statistics import Interval, paired_bootstrap
from sparsemem.memory.attach import memory_layers, observe_reads
from sparsemem.memory.layer import MemoryLayer, Reads
from sparsemem.slots.alignment import core_set, hits_per_token, share_at, shift_test
from sparsemem.slots.ranking import RANKINGS
from sparsemem.slots.selection import select_slots
from sparsemem.slots.usage import PoolUsage, Usage

PLACES = ("subject, first token", "subject, inside", "subject, last token", "after subject", "answer", "else")
"""Where a token stands; the first of these that fits."""

RARE = 0.02
"""Share of the background's documents up to which the product trains a slot."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """How slots are chosen, among all reads of a fact.

    Args:
        ranking: One of `RANKINGS`.
        weighted: Whether a read counts by its weight; the paper counts each as one.
        max_document_frequency: As in `select_slots`.
    """

    ranking: str
    weighted: bool = False
    max_document_frequency: float = 1.0


SELECTIONS = {name: Selection(name) for name in RANKINGS} | {
    "tf_idf, weighted, rare only": Selection("tf_idf", weighted=True, max_document_frequency=RARE)
}
"""The rankings as they are, and as the product uses the first of them."""


@dataclasses.dataclass(frozen=True)
class ReadWording:
    """One wording of a fact and what it reads.

    Args:
        slot_ids: Shape (tokens, reads).
        weights: Same shape.
        places: Index into `PLACES` of each token, shape (tokens,).
    """

    slot_ids: Tensor
    weights: Tensor
    places: Tensor

    @property
    def is_subject(self) -> Tensor:
        """The tokens of the subject."""
        return self.places < 3


def entity_study(
    model: nn.Module,
    tokenizer: Any,
    usage: Usage,
    facts: Sequence[Fact],
    *,
    top_ts: Sequence[int] = (25, 100, 500),
    num_shifts: int = 999,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure where in their facts the slots stand that rankings choose, against chance.

    Args:
        model: A model with one memory layer.
        tokenizer: Its (fast) tokenizer.
        usage: Background usage.
        facts: Facts whose subject is given; wordings that do not name it are left out.
        top_ts: Slots per fact.
        num_shifts: Of the permutation test.
        on_step: Called with (facts read, facts).

    Returns:
        As plain JSON values: `selections`, by name and number of slots, the share of their reads at the
        subject with its interval over facts, the share of tokens there, and p; the reads by place;
        `core`, the slots read in every wording.

    Raises:
        DataError: A fact has no subject, or fewer than two wordings name it.
    """
    (layer,) = memory_layers(model)
    pool_usage = usage.pools[layer.pool_name]
    read = []
    for number, fact in enumerate(facts, 1):
        read.append(read_wordings(model, tokenizer, fact))
        if on_step:
            on_step(number, len(facts))
    return {
        "num_facts": len(facts),
        "num_wordings": sum(map(len, read)),
        "num_tokens": sum(len(wording.places) for of_fact in read for wording in of_fact),
        "reads_per_token": layer.num_heads * layer.top_k,
        "block": layer.block_index,
        "token_share": _by_place([[torch.ones_like(w.places) for w in of_fact] for of_fact in read], read),
        "selections": {
            name: {str(top_t): _alignment(read, selection, pool_usage, top_t, num_shifts) for top_t in top_ts}
            for name, selection in SELECTIONS.items()
        },
        "core": _core(read, pool_usage),
    }


def read_wordings(model: nn.Module, tokenizer: Any, fact: Fact) -> list[ReadWording]:
    """Read the statements and questions of a fact that name its subject.

    Raises:
        DataError: There are fewer than two.
    """
    texts = [text for text in (*fact.statements, *fact.questions) if occurrences(text, fact.subject or "")]
    if not fact.subject or len(texts) < 2:
        raise DataError(f"{fact.id}: fewer than two wordings name a subject; leave this fact out")
    encoded = tokenizer(texts, return_offsets_mapping=True)
    batch = pad(encoded["input_ids"])
    found: list[Reads] = []
    device = next(model.parameters()).device

    def keep(_layer: MemoryLayer, reads: Reads) -> None:
        found.append(reads)

    observe_reads(model, keep, **{name: tensor.to(device) for name, tensor in batch.items()})
    return [
        ReadWording(
            slot_ids=found[0].slot_ids[row, : len(offsets)].flatten(1).cpu(),
            weights=found[0].weights[row, : len(offsets)].flatten(1).cpu(),
            places=_places(text, offsets, fact),
        )
        for row, (text, offsets) in enumerate(zip(texts, encoded["offset_mapping"], strict=True))
    ]


def _places(text: str, offsets: Sequence[tuple[int, int]], fact: Fact) -> Tensor:
    """Say of each token where it stands."""
    places = torch.full((len(offsets),), PLACES.index("else"))

    def tokens_of(part: str) -> list[list[int]]:
        return [
            [i for i, (left, right) in enumerate(offsets) if left < stop and start < right and right > left]
            for start, stop in occurrences(text, part)
        ]

    for answer in fact.answers:
        for tokens in tokens_of(answer):
            places[tokens] = PLACES.index("answer")
    spans = [tokens for tokens in tokens_of(fact.subject or "") if tokens]
    for tokens in spans:
        places[tokens[-1] + 1 : tokens[-1] + 2] = PLACES.index("after subject")
    for tokens in spans:
        places[tokens] = PLACES.index("subject, inside")
        places[tokens[0]] = PLACES.index("subject, first token")
        # The only token of a short name ends it.
        places[tokens[-1]] = PLACES.index("subject, last token")
    return places


def _alignment(
    read: Sequence[Sequence[ReadWording]],
    selection: Selection,
    usage: PoolUsage,
    top_t: int,
    num_shifts: int,
) -> dict[str, Any]:
    hits, shares, chances = [], [], []
    for of_fact in read:
        chosen = _select(of_fact, selection, usage, top_t)
        hits.append([hits_per_token(wording.slot_ids, chosen) for wording in of_fact])
        marks = [wording.is_subject for wording in of_fact]
        shares.append(share_at(hits[-1], marks) or 0.0)
        chances.append(float(torch.cat(marks).double().mean()))
    flat = [wording_hits for of_fact in hits for wording_hits in of_fact]
    chance, p = shift_test(
        flat, [wording.is_subject for of_fact in read for wording in of_fact], num_shifts=num_shifts
    )
    return {
        "share": _interval(shares, [0.0] * len(shares)),
        "token_share": statistics.fmean(chances),
        "above_chance": _interval(shares, chances),
        "shifted_share": chance,
        "p": p,
        "by_place": _by_place(hits, read),
    }


def _select(of_fact: Sequence[ReadWording], selection: Selection, usage: PoolUsage, top_t: int) -> Tensor:
    slot_ids = torch.cat([wording.slot_ids.flatten() for wording in of_fact])
    weights = torch.cat([wording.weights.flatten() for wording in of_fact])
    chosen = select_slots(
        slot_ids,
        weights if selection.weighted else torch.ones_like(weights),
        torch.zeros_like(slot_ids),
        usage,
        RANKINGS[selection.ranking],
        top_t,
        selection.max_document_frequency,
    )
    return chosen[0]


def _by_place(hits: Sequence[Sequence[Tensor]], read: Sequence[Sequence[ReadWording]]) -> dict[str, float]:
    """Share of all hits at each place."""
    flat_hits = torch.cat([tensor for of_fact in hits for tensor in of_fact])
    flat_places = torch.cat([wording.places for of_fact in read for wording in of_fact])
    counts = torch.bincount(flat_places, weights=flat_hits.double(), minlength=len(PLACES))
    return dict(zip(PLACES, (counts / counts.sum().clamp(min=1)).tolist(), strict=True))


def _core(read: Sequence[Sequence[ReadWording]], usage: PoolUsage) -> dict[str, Any]:
    """Describe the slots read in every wording of a fact, anywhere and at its subject."""
    anywhere = [core_set([wording.slot_ids for wording in of_fact]) for of_fact in read]
    at_subject = [core_set([w.slot_ids[w.is_subject] for w in of_fact]) for of_fact in read]
    is_rare = usage.document_frequency <= RARE * usage.num_documents
    shares = [
        share_at([hits_per_token(w.slot_ids, core) for w in of_fact], [w.is_subject for w in of_fact]) or 0.0
        for of_fact, core in zip(read, anywhere, strict=True)
    ]
    return {
        "size": _sizes([len(core) for core in anywhere]),
        "rare": _sizes([int(is_rare[core].sum()) for core in anywhere]),
        "at_subject": _sizes([len(core) for core in at_subject]),
        "rare_at_subject": _sizes([int(is_rare[core].sum()) for core in at_subject]),
        "share_at_subject": _interval(shares, [0.0] * len(shares)),
    }


def _sizes(values: Sequence[int]) -> dict[str, Any]:
    return {
        **_interval([float(value) for value in values], [0.0] * len(values)),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def _interval(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Mean difference over facts, with its 95 % bootstrap interval."""
    interval: Interval = paired_bootstrap(values, others, num_resamples=2000)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
