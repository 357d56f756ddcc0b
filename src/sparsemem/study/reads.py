"""What the tokens of a text read of what was learned, and which fact put it there.

Shape letters: T tokens, R reads per token (all heads together).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem.data import Fact
from sparsemem.memory.attach import observe_reads, pools
from sparsemem.memory.delta import SparseDelta
from sparsemem.memory.layer import MemoryLayer, Reads
from sparsemem.memory.rows import distinct
from sparsemem.slots.alignment import NOBODY, last_writers, most_weight, weight_of_slots
from sparsemem.slots.subject import names_of
from sparsemem.slots.usage import Usage
from sparsemem.training.examples import Batch, collate_passes, encode_wording
from sparsemem.training.paraphrase import Wording

FIRES_FROM = 0.05
"""Agreement from which a token counts as answered: a twentieth of the full answer. Below it, what its
reads found written they found by accident."""
ABOUT_AS_MUCH = 0.5
"""Share of the weight that a name's slots get from the fact that reads them most, from which on another fact
may be about the same name."""


@dataclasses.dataclass(frozen=True)
class Taught:
    """An update, and what it taught.

    Args:
        name: What it is called: its number.
        message: What it is.
        facts: What it taught, as far as that is known.
        delta: The rows it changed.
    """

    name: str
    message: str
    facts: tuple[Fact, ...]
    delta: SparseDelta


@dataclasses.dataclass(frozen=True)
class ReadSlot:
    """A read that found a slot that was written.

    Args:
        pool: Name of the pool.
        slot: The slot.
        share: Weight of the read among all reads of the token in that layer, 0 to 1.
        document_frequency: Background documents that read the slot.
        update: Name of the update that wrote it last; None if it was there before all of them.
        fact: What it was written for, as far as that is known.
    """

    pool: str
    slot: int
    share: float
    document_frequency: int
    update: str | None
    fact: str | None = None


@dataclasses.dataclass
class Token:
    """What one token reads, all memory layers together.

    Args:
        text: The token as it stands in the text.
        agreement: How much of the memory's answer it gets, 0 to 1, in the layer where that is most.
        num_reads: Slots it reads.
        slots: Those of them that were written.
    """

    text: str
    agreement: float = 0.0
    num_reads: int = 0
    slots: list[ReadSlot] = dataclasses.field(default_factory=list)

    @property
    def fires(self) -> bool:
        """Whether something learned answers."""
        return bool(self.slots) and self.agreement >= FIRES_FROM


class ReadRecorder:
    """Describes tokens by what they read; for `before_read`, in a forward pass of their one sequence.

    Args:
        tokens: To be filled in.
        usage: Background usage.
        updates: All that were made, oldest first.
    """

    def __init__(self, tokens: Sequence[Token], usage: Usage, updates: Sequence[Taught]) -> None:
        self.tokens, self.usage, self.updates = tokens, usage, updates

    def __call__(self, layer: MemoryLayer, reads: Reads) -> None:
        """Add what a layer is about to read."""
        name = layer.pool_name
        slot_ids_TR, weights_TR = reads.slot_ids[0].flatten(1), reads.weights[0].flatten(1)
        agreement_T = layer.agreement(slot_ids_TR, weights_TR).amax(dim=1).tolist()
        is_written_TR = layer.pool.is_written(slot_ids_TR).cpu()
        slot_ids_TR, shares_TR = slot_ids_TR.cpu(), weights_TR.cpu() / layer.num_heads
        writers_TR = last_writers(slot_ids_TR, written_slots(self.updates, name))
        frequency_TR = self.usage.pools[name].document_frequency[slot_ids_TR]
        for place, token in enumerate(self.tokens):
            token.agreement = max(token.agreement, agreement_T[place])
            token.num_reads += slot_ids_TR.shape[1]
            for column in is_written_TR[place].nonzero().squeeze(1).tolist():
                writer = int(writers_TR[place, column])
                token.slots.append(
                    ReadSlot(
                        pool=name,
                        slot=int(slot_ids_TR[place, column]),
                        share=float(shares_TR[place, column]),
                        document_frequency=int(frequency_TR[place, column]),
                        update=None if writer == NOBODY else self.updates[writer].name,
                    )
                )


def firing_tokens(layer: MemoryLayer, reads: Reads) -> Tensor:
    """Tell which tokens something learned answers to in a layer; bool, shape (sequences, tokens)."""
    slot_ids_TR, weights_TR = reads.slot_ids.flatten(0, 1).flatten(1), reads.weights.flatten(0, 1).flatten(1)
    finds_T = layer.pool.is_written(slot_ids_TR).any(dim=1)
    agrees_T = (layer.agreement(slot_ids_TR, weights_TR) >= FIRES_FROM).any(dim=1)
    return (finds_T & agrees_T).view(reads.slot_ids.shape[:2])


def written_slots(updates: Sequence[Taught], pool: str) -> list[Tensor]:
    """List the slots each update wrote of a pool."""
    none = torch.zeros(0, dtype=torch.int64)
    changes = (update.delta.changes.get(pool) for update in updates)
    return [change.slot_ids if change else none for change in changes]


def name_facts(
    model: nn.Module, tokenizer: Any, usage: Usage, update: Taught, tokens: Sequence[Token]
) -> None:
    """Say of the slots that tokens read of an update for which of its facts they were written.

    That is the fact whose subject reads them most; the first of several of one subject. Slots that hold
    one row were written for one fact, so they are asked about together; but where rows have names only facts
    that read the name's slots about as much as any other come into question.
    """
    if not update.facts:
        return
    slots = [slot for token in tokens for slot in token.slots if slot.update == update.name]
    asked, rows, names = {}, {}, {}
    for pool, change in update.delta.changes.items():
        read = torch.tensor([slot.slot for slot in slots if slot.pool == pool], dtype=torch.int64)
        row_of = distinct(change.after)[1]
        name_of = change.after[:, 0] if pools(model)[pool].has_names else row_of
        is_asked = torch.isin(name_of, name_of[torch.isin(change.slot_ids, read)])
        asked[pool] = change.slot_ids[is_asked]
        rows[pool], names[pool] = (
            kind[is_asked].unique(return_inverse=True)[1] for kind in (row_of, name_of)
        )
    owners = {}
    for pool, weights in _subject_weights(model, tokenizer, usage, update.facts, asked).items():
        of_rows, of_names = (
            weights.new_zeros(weights.shape).index_add_(1, kind[pool], weights)[:, kind[pool]]
            for kind in (rows, names)
        )
        owner = most_weight(of_rows * (of_names >= ABOUT_AS_MUCH * of_names.amax(dim=0)))
        owners.update(
            {(pool, slot): fact for slot, fact in zip(asked[pool].tolist(), owner.tolist(), strict=True)}
        )
    for token in tokens:
        for place, slot in enumerate(token.slots):
            fact = owners[slot.pool, slot.slot] if slot.update == update.name else NOBODY
            if fact != NOBODY:
                token.slots[place] = dataclasses.replace(slot, fact=_label(update.facts[fact]))


def _subject_weights(
    model: nn.Module, tokenizer: Any, usage: Usage, facts: Sequence[Fact], asked: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Add up the weight that the subject of each fact gives each slot asked about.

    It is read in the first question and the first statement, in passes that end at the memory.

    Returns:
        Shape (facts, slots), by pool.
    """
    weights = {pool: torch.zeros(len(facts), len(slot_ids)) for pool, slot_ids in asked.items()}
    examples = []
    for index, fact in enumerate(facts):
        names = names_of(fact, tokenizer, usage)
        for text in (*fact.questions[:1], *fact.statements[:1]):
            wording = Wording(text, target="")  # nothing of it is to be learned
            if example := encode_wording(tokenizer, index, fact, wording, names, "answer", 512):
                examples.append(example)
    if not examples:
        return weights
    device = next(model.parameters()).device
    for part in collate_passes(examples, device):

        def add(layer: MemoryLayer, reads: Reads, part: Batch = part) -> None:
            if layer.pool_name not in asked:
                return
            # Of a wording without a subject, any token counts.
            is_named = part.is_subject.any(dim=1, keepdim=True)
            counts = torch.where(is_named, part.is_subject, part.attention_mask.bool())
            for row, fact_index in enumerate(part.fact_index.tolist()):
                slot_ids, shares = (t[row][counts[row]].cpu() for t in (reads.slot_ids, reads.weights))
                weights[layer.pool_name][fact_index] += weight_of_slots(
                    slot_ids, shares, asked[layer.pool_name]
                )

        observe_reads(model, add, input_ids=part.input_ids, attention_mask=part.attention_mask)
    return weights


def _label(fact: Fact) -> str:
    return f"{fact.question} {fact.answer}" if fact.question else str(fact.statement)
