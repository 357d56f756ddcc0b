"""What may move: the slots of a memory, all weights, or the weights of a PEFT adapter."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem import distributed
from sparsemem.config import FinetuneConfig
from sparsemem.errors import ConfigError
from sparsemem.memory.attach import before_read, memory_layers, observe_reads, pools
from sparsemem.memory.delta import DeltaRecorder, SparseDelta
from sparsemem.memory.layer import MemoryLayer, Reads
from sparsemem.memory.pool import NOTHING, Pool
from sparsemem.slots.ranking import RANKINGS
from sparsemem.slots.selection import select_slots
from sparsemem.slots.usage import Usage
from sparsemem.training.endings import unended
from sparsemem.training.examples import (
    Batch,
    Example,
    FactBatch,
    collate,
    collate_parts,
    collate_passes,
    own_share,
)
from sparsemem.training.naming import Naming
from sparsemem.training.optim import SlotOptimizer
from sparsemem.training.prefix import Forward, PrefixCache
from sparsemem.training.questions import Questions


def _ends(marks: Tensor) -> Tensor:
    """Keep the last token of each marked span, shape (examples, tokens)."""
    return marks & ~nn.functional.pad(marks[:, 1:], (0, 1))


def _tails(marks: Tensor) -> Tensor:
    """Keep all but the first token of each marked span; the only one of a span of one.

    What a name will be is not known yet at its first token, which therefore reads what any other word
    that begins like it reads.
    """
    return (marks & nn.functional.pad(marks[:, :-1], (1, 0))) | _ends(marks)


ANCHORS: dict[str, Callable[[Tensor], Tensor]] = {
    "subject": lambda marks: marks,
    "subject_tail": _tails,
    "subject_end": _ends,
}
"""Which of the subject's tokens choose slots."""


Chosen = Mapping[int, Tensor]
"""Slots by the fact that chose them."""

NOBODY, SHARED, EARLIER = -1, -2, -3
"""Owner of a slot that no tied fact chose, of one that several train, and of one that had a row before. Of a
row that several slots hold, it is a number below: one for each row."""


class SparseMemory:
    """The method of this project: of all the model only the chosen slots move.

    Args:
        model: A model with a memory.
        tokenizer: Its tokenizer.
        usage: Background usage of its pools.
        config: Options; `ranking`, `top_t`, `anchor`, `optimizer` and their like.
        taught: Examples of earlier facts about what new ones are about: where those are asked for, the new
            ones are not to answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        usage: Usage,
        config: FinetuneConfig,
        taught: Sequence[Example] = (),
    ) -> None:
        usage.check(model)
        self.model, self.tokenizer, self.usage = model, tokenizer, usage
        self.config, self.taught = config, taught
        self.pools = pools(model)
        self.ranking = RANKINGS[config.ranking]
        self.recorder = DeltaRecorder(self.pools)
        self.cache = PrefixCache(model, config.prefix_cache_bytes)
        num_layers = len(list(memory_layers(model)))
        self.shares_pools = len(self.pools) < num_layers
        # With one memory layer everything below the reads is frozen, so a batch always reads the same.
        self.reads_are_fixed = num_layers == 1
        self.selections: dict[tuple[Example, ...], dict[str, Chosen]] = {}
        self.owners: dict[str, Tensor] = {}
        self.naming: Naming | None = None
        layer, *_ = memory_layers(model)
        if layer.relation is None:
            self.owners = {name: _owners_before(pool) for name, pool in self.pools.items()}
        else:
            _check_named(config)
            self.naming = Naming(layer)
        self.frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        model.eval()
        self.trained: list[nn.Parameter] = []  # the rows, which are new parameters in each step
        self.optimizer = SlotOptimizer(
            self.pools,
            config.optimizer,
            lr=config.lr,
            momentum=config.momentum,
            betas=config.betas,
            weight_decay=config.weight_decay,
            num_steps=config.num_epochs,
            average_from=config.average_from,
            extrapolate=config.extrapolate,
            directions=self._directions() if config.adam_axes == "fisher" else {},
        )

    def _directions(self) -> dict[str, Tensor]:
        """Directions of whole rows: what comes before the value is scaled as it is."""
        if self.naming is None:
            return dict(self.usage.directions)
        before = torch.eye(self.naming.pool.value_dim - self.naming.layer.width)
        return {name: torch.block_diag(before, axes) for name, axes in self.usage.directions.items()}

    def prepare(self, batches: Sequence[FactBatch]) -> None:
        """See all facts that are trained in turn, since those of one name are told apart from each other."""
        if self.naming is not None:
            self._ask_taught(self.naming)
            self._introduce(self.naming.questions, tuple(itertools.chain(*batches)))
            for batch in batches:
                for of_batch in self._beforehand(batch).values():
                    self.naming.claim(of_batch)
            self.naming.solve()

    def _introduce(self, questions: Questions, facts: FactBatch) -> None:
        """Make new facts known: what they are about, and how their answers are to end."""
        new = [*itertools.chain(*(texts for texts in facts if texts[0].fact_index not in questions.about))]
        if new:
            questions.introduce(new)
            questions.unended |= distributed.from_main(
                lambda: unended(self.model, self.tokenizer, new), self.model
            )

    def _ask_taught(self, naming: Naming) -> None:
        """See once what earlier facts were asked by."""
        taught, self.taught = self.taught, ()
        naming.questions.introduce(taught)
        device = next(self.model.parameters()).device
        passes = collate_passes(distributed.share(taught), device)
        for part, counts in distributed.in_step(self.model, passes, lambda: collate(taught[:1], device)):
            with naming.questions.asked_in(part) if counts else contextlib.nullcontext():
                inputs = {"input_ids": part.input_ids, "attention_mask": part.attention_mask}
                observe_reads(self.model, lambda *_: None, naming.layer.beside.last, **inputs)

    @contextlib.contextmanager
    def step(self, batch: FactBatch, parts: Sequence[Batch]) -> Iterator[None]:
        """Within this context the parts of one optimizer step run, all with the same selection.

        Slots are chosen for all wordings and other texts of the batch's facts. Where one part holds them
        all, and several layers have a pool each, that happens inside its forward pass. Otherwise the reads
        are collected before, in a pass that ends at the memory: with one layer once for each fact.
        """
        chosen: set[str] = set()
        anchored = _facts_with_subject(batch)
        several = distributed.world_size() > 1 or len(parts) > 1
        if self.reads_are_fixed or self.shares_pools or several or not _holds(parts[0], batch):
            for name, of_batch in self._beforehand(batch).items():
                self._activate(name, of_batch, anchored)
                chosen.add(name)

        def choose(layer: MemoryLayer, reads: Reads) -> None:
            if layer.pool_name not in chosen:
                chosen.add(layer.pool_name)
                countable = [self._countable(parts[0], reads, anchored)]
                self._activate(layer.pool_name, self._select(layer.pool_name, countable), anchored)

        with before_read(self.model, choose):
            yield

    @contextlib.contextmanager
    def part(self, batch: Batch, forward: Forward) -> Iterator[Batch]:
        """Within this context a forward pass runs only what of `batch` can change; yields what that is.

        Passes that it runs itself are run within `forward`.
        """
        with self.cache.resume(batch, forward) as run:
            yield run

    def num_run(self, example: Example) -> int:
        """Tokens of an example that a pass has to run, as a rule."""
        return self.cache.num_run(example)

    def finish(self) -> SparseDelta:
        """End the training and return what it changed."""
        for pool in self.pools.values():
            pool.deactivate()
        return self.recorder.delta()

    def close(self) -> None:
        """Leave the model as trainable as it was found."""
        for pool in self.pools.values():
            pool.deactivate()
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def abort(self) -> None:
        """Put every row back to what it was."""
        self.finish().invert().apply(self.pools)

    def num_trainable(self, delta: SparseDelta | None) -> int:
        """Numbers that were changed."""
        return delta.num_values if delta else 0

    def _countable(
        self, batch: Batch, reads: Reads, anchored: Collection[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slots read where it counts, the weight of each read, and its fact.

        Padding never counts; where the selection is anchored only tokens of the subject do, in the
        facts that have one somewhere in their wordings.
        """
        counts = batch.attention_mask.bool()
        if self.config.is_anchored:
            marks = ANCHORS[self.config.anchor](batch.is_subject)
            has_subject = torch.tensor(
                [e.fact_index in anchored for e in batch.examples], device=counts.device
            )
            counts = torch.where(has_subject.unsqueeze(1), marks, counts)
        facts = batch.fact_index.unsqueeze(1).expand_as(counts)[counts]
        slot_ids, weights = reads.slot_ids[counts].flatten(1), reads.weights[counts].flatten(1)
        if not self.config.weighted_reads:
            weights = torch.ones_like(weights)
        return slot_ids.flatten(), weights.flatten(), facts.repeat_interleave(slot_ids.shape[1])

    def _beforehand(self, batch: FactBatch) -> dict[str, Chosen]:
        """Choose slots before the forward pass; once per fact where its reads never change."""
        if not self.reads_are_fixed:
            return self._select_beforehand(batch)
        for wordings in batch:
            if wordings not in self.selections:
                self.selections[wordings] = self._select_beforehand((wordings,))
        chosen = [self.selections[wordings] for wordings in batch]
        return {name: {k: v for of_fact in chosen for k, v in of_fact[name].items()} for name in self.pools}

    def _select_beforehand(self, batch: FactBatch) -> dict[str, Chosen]:
        for pool in self.pools.values():
            pool.deactivate()
        anchored = _facts_with_subject(batch)
        countable: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in self.pools}
        device = next(self.model.parameters()).device
        parts = collate_parts(itertools.chain(*map(own_share, batch)), 1, device)
        for part, counts in distributed.in_step(self.model, parts, lambda: collate([batch[0][0]], device)):

            def collect(layer: MemoryLayer, reads: Reads, part: Batch = part, counts: bool = counts) -> None:
                if counts:
                    countable[layer.pool_name].append(self._countable(part, reads, anchored))

            inputs = {"input_ids": part.input_ids, "attention_mask": part.attention_mask}
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.cache.reuse(part))
                if self.naming is not None and counts:
                    stack.enter_context(self.naming.questions.asked_in(part))
                through = None if self.naming is None else self.naming.layer.beside.last
                observe_reads(self.model, collect, through, **inputs)
        return {name: self._select(name, collected) for name, collected in countable.items()}

    def _select(self, name: str, collected: Sequence[tuple[Tensor, ...]]) -> Chosen:
        slot_ids, weights, facts = self._of_all_processes(name, collected)
        return select_slots(
            slot_ids,
            weights,
            facts,
            self.usage.pools[name],
            self.ranking,
            self.config.top_t,
            self.config.max_document_frequency,
        )

    def _of_all_processes(self, name: str, collected: Sequence[tuple[Tensor, ...]]) -> Sequence[Tensor]:
        """Put reads behind one another; those of several processes summed before, by fact and slot."""
        if distributed.world_size() == 1:
            return [torch.cat(tensors) for tensors in zip(*collected, strict=True)]
        device = self.pools[name].slot_to_row.device
        kinds = (torch.int64, torch.float32, torch.int64)
        nothing = [torch.zeros(0, dtype=kind, device=device) for kind in kinds]
        slot_ids, weights, facts = (torch.cat(tensors) for tensors in zip(nothing, *collected, strict=True))
        fact_and_slot, place = torch.stack([facts, slot_ids]).unique(dim=1, return_inverse=True)
        weights = weights.new_zeros(fact_and_slot.shape[1]).index_add_(0, place, weights)
        facts, slot_ids = (distributed.gathered(ids.int()).long() for ids in fact_and_slot)
        return slot_ids, distributed.gathered(weights), facts

    def _activate(self, name: str, chosen: Chosen, anchored: Collection[int]) -> None:
        pool = self.pools[name]
        if self.naming is None:
            # Over a base table each slot has a row of its own from the start.
            tied = anchored if self.config.ties_rows and pool.base is None else ()
            slot_ids, tags = self._claim(name, chosen, set(tied))
        else:
            slot_ids, tags = self.naming.claim(chosen)
        # What the last step trained belongs to the overlay before its rows are recorded again.
        pool.deactivate()
        self.recorder.record(name, slot_ids)
        pool.activate(slot_ids, tags)
        if self.naming is not None:
            self.naming.begin()

    def _claim(self, name: str, chosen: Chosen, tied: Collection[int]) -> tuple[Tensor, Tensor]:
        """Return the slots to train, and their tags: those of one fact share a row, others have their own.

        A slot of a tied fact belongs to the first that chose it, in this update or an earlier one, and no
        other fact pulls at it. But facts of one subject choose much the same slots: a fact that finds most
        of its own taken by one other shares all of them, with a row each, since one row for many answers
        would be too little.
        """
        owners = self.owners[name]
        untied = [of_fact for fact, of_fact in chosen.items() if fact not in tied]
        for fact, of_fact in chosen.items():
            if fact in tied:
                owner = owners[of_fact]
                taken = (owner != NOBODY) & (owner != fact)
                owners[of_fact[~taken]] = fact
                by_owner = owner[taken].unique(return_counts=True)[1]
                if len(by_owner) and 2 * int(by_owner.max()) > len(of_fact):
                    owners[of_fact] = SHARED
        slot_ids = torch.cat([owners.new_zeros(0, dtype=torch.int64), *chosen.values()]).unique()
        owner = owners[slot_ids].long()
        is_owned = owner >= 0
        trained = torch.isin(owner, owner.new_tensor([NOBODY, SHARED, *chosen]))
        if untied:
            trained |= (owner <= EARLIER) & torch.isin(slot_ids, torch.cat(untied))
        tags = torch.where(is_owned, self.pools[name].num_slots + owner, slot_ids)
        return slot_ids[trained], tags[trained]


def _check_named(config: FinetuneConfig) -> None:
    for name, fine in {"tie_rows": True, "weight_decay": 0.0}.items():
        if (value := getattr(config, name)) != fine:
            raise ConfigError(
                f"{name}={value} does not suit rows that belong to a name; use {name}={fine}, or a memory "
                "that was attached with relation_dim=0"
            )


def _owners_before(pool: Pool) -> Tensor:
    """Tell who owns each slot before training, shape (slots,), int32."""
    groups = pool.groups(torch.arange(pool.num_slots, device=pool.slot_to_row.device))
    earlier = torch.where(groups == pool.num_slots, EARLIER, EARLIER - 1 - groups)
    return torch.where(groups == NOTHING, NOBODY, earlier).int()


def _facts_with_subject(batch: FactBatch) -> set[int]:
    return {example.fact_index for wordings in batch for example in wordings if any(example.is_subject)}


def _holds(part: Batch, batch: FactBatch) -> bool:
    return len(part.examples) == sum(map(len, batch))
