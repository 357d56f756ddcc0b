"""Do the slots a ranking chooses sit at entities? Selection only, nothing is trained.

Shape letters: T tokens, R reads per token (all heads together).
"""

import dataclasses
import itertools
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
from sparsemem.training.methods import ANCHORS

PLACES = ("subject, first token", "subject, inside", "subject, last token", "after subject", "answer", "else")
"""Where a token stands; the first of these that fits."""

Spans = Sequence[tuple[int, int]]
"""Start and end of names in a text, in characters."""
Tagger = Callable[[Sequence[str]], Sequence[Spans]]
"""Finds the names in texts."""

RARE = 0.02
"""Share of the background's documents up to which a slot is rare; the product's limit with its own memory."""


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
        is_name: The tokens of names, as a tagger finds them, shape (tokens,).
    """

    slot_ids: Tensor
    weights: Tensor
    places: Tensor
    is_name: Tensor

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
    tagger: Tagger | None = None,
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
        tagger: Finds names, of which the same is asked as of the facts' own subjects.
        on_step: Called with (facts read, facts).

    Returns:
        As plain JSON values: `selections`, by name and number of slots, the share of their reads at the
        subject with its interval over facts, the share of tokens there, and p; the reads by place; with a
        tagger the same of its `names`; `core`, the slots read in every wording.

    Raises:
        DataError: A fact has no subject, or fewer than two wordings name it.
    """
    (layer,) = memory_layers(model)
    pool_usage = usage.pools[layer.pool_name]
    read = []
    for number, fact in enumerate(facts, 1):
        read.append(read_wordings(model, tokenizer, fact, tagger))
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
            name: {
                str(top_t): _alignment(read, selection, pool_usage, top_t, num_shifts, tagger is not None)
                for top_t in top_ts
            }
            for name, selection in SELECTIONS.items()
        },
        "core": _core(read, pool_usage),
    }


def read_wordings(
    model: nn.Module, tokenizer: Any, fact: Fact, tagger: Tagger | None = None
) -> list[ReadWording]:
    """Read the statements and questions of a fact that name its subject.

    Without a tagger no token is one of a name.

    Raises:
        DataError: There are fewer than two.
    """
    texts = wordings_with_subject(fact)
    if not fact.subject or len(texts) < 2:
        raise DataError(f"{fact.id}: fewer than two wordings name a subject; leave this fact out")
    names = tagger(texts) if tagger else [()] * len(texts)
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
            is_name=torch.tensor([bool(_spans_at(offset, of_text)) for offset in offsets]),
        )
        for row, (text, offsets, of_text) in enumerate(
            zip(texts, encoded["offset_mapping"], names, strict=True)
        )
    ]


def wordings_with_subject(fact: Fact) -> list[str]:
    """List the statements and questions of a fact that name its subject."""
    return [text for text in (*fact.statements, *fact.questions) if occurrences(text, fact.subject or "")]


def trained_slots(read: Sequence[ReadWording], usage: PoolUsage, top_t: int) -> Tensor:
    """Choose the slots that the product would train for a fact: rare ones that its subject's tail reads."""
    tails = [ANCHORS["subject_tail"](wording.is_subject.unsqueeze(0)).squeeze(0) for wording in read]
    at_subject = [
        dataclasses.replace(wording, slot_ids=wording.slot_ids[tail], weights=wording.weights[tail])
        for wording, tail in zip(read, tails, strict=True)
    ]
    return _select(at_subject, SELECTIONS["tf_idf, weighted, rare only"], usage, top_t)


def weights_on(wording: ReadWording, slots: Tensor) -> Tensor:
    """Add up the weight with which each token reads each slot, shape (tokens, slots)."""
    is_slot_TRC = wording.slot_ids.unsqueeze(2) == slots
    return (is_slot_TRC * wording.weights.unsqueeze(2)).sum(dim=1)


def _spans_at(offset: tuple[int, int], spans: Spans) -> list[tuple[int, int]]:
    """List the spans that a token is in."""
    left, right = offset
    return [(start, stop) for start, stop in spans if left < stop and start < right and right > left]


def _places(text: str, offsets: Sequence[tuple[int, int]], fact: Fact) -> Tensor:
    """Say of each token where it stands."""
    places = torch.full((len(offsets),), PLACES.index("else"))

    def tokens_of(part: str) -> list[list[int]]:
        return [
            [i for i, offset in enumerate(offsets) if _spans_at(offset, [span])]
            for span in occurrences(text, part)
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
    has_names: bool,
) -> dict[str, Any]:
    hits = []
    for of_fact in read:
        chosen = _select(of_fact, selection, usage, top_t)
        hits.append([hits_per_token(wording.slot_ids, chosen) for wording in of_fact])
    at_names = [[wording.is_name for wording in of_fact] for of_fact in read]
    return {
        **_share_at(hits, [[wording.is_subject for wording in of_fact] for of_fact in read], num_shifts),
        **({"names": _share_at(hits, at_names, num_shifts)} if has_names else {}),
        "by_place": _by_place(hits, read),
    }


def _share_at(
    hits: Sequence[Sequence[Tensor]], marks: Sequence[Sequence[Tensor]], num_shifts: int
) -> dict[str, Any]:
    """Say what share of the hits of each fact falls on the marked tokens of its wordings, against chance."""
    shares = [share_at(*of_fact) or 0.0 for of_fact in zip(hits, marks, strict=True)]
    chances = [float(torch.cat([*of_fact]).double().mean()) for of_fact in marks]
    chance, p = shift_test(
        *([*itertools.chain(*tensors)] for tensors in (hits, marks)), num_shifts=num_shifts
    )
    return {
        "share": _interval(shares, [0.0] * len(shares)),
        "token_share": statistics.fmean(chances),
        "above_chance": _interval(shares, chances),
        "shifted_share": chance,
        "p": p,
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
