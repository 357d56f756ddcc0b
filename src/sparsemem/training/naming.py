"""Whose a slot is where rows have names: several facts about one name share its slots.

Shape letters: P positions, N new rows, K relation dim, V value dim.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsemem import distributed
from sparsemem.likelihood import before_labels
from sparsemem.memory.layer import KEY_LENGTH, MemoryLayer
from sparsemem.memory.pool import IN_BASE
from sparsemem.training.examples import Batch

NOBODY = -1
"""Owner of a slot that holds nothing. A fact of this update has its number, an earlier row one below this."""


class Naming:
    """Gives each fact slots of its name, and each new row its name and first key.

    What is read at a name says which name it is; what a text asks for then chooses among the rows of that
    name. So it does not matter how many of a name's slots hold a row: a further fact takes an equal share of
    those of the others, which stay as they are.

    Args:
        layer: The only memory layer, one with relations.
    """

    def __init__(self, layer: MemoryLayer) -> None:
        self.layer, self.pool = layer, layer.pool
        places = self.pool.slot_to_row.long()
        self.owners = torch.where(places == IN_BASE, NOBODY, NOBODY - 1 - places)
        self.names = self.pool.groups(torch.arange(self.pool.num_slots, device=places.device))
        self.name_of: dict[int, int] = {}
        self._asked: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def asked(self, part: Batch) -> Iterator[None]:
        """Within this context a pass of `part` up to the answer shows what its facts are asked by."""

        def keep(_block: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            positions = before_labels(part.labels)
            # The first of each: there the question is put, and the others go on with the answer.
            positions &= positions.cumsum(dim=1) == 1
            assert self.layer.relation is not None
            queries_PK = normalize(self.layer.relation(hidden[positions].float()), dim=-1)
            facts = part.fact_index.unsqueeze(1).expand_as(positions)[positions]
            for fact, query_K in zip(facts.tolist(), queries_PK, strict=True):
                self._asked[fact] = self._asked.get(fact, 0) + query_K

        # In front: others may end the pass there.
        handle = self.layer.beside.last.register_forward_hook(keep, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def claim(self, chosen: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the slots that the facts of a batch train, and their tags: one for each fact."""
        for fact, of_fact in chosen.items():
            if fact not in self.name_of and len(of_fact):
                self._name(fact, of_fact)
        slot_ids = torch.cat([self.owners.new_zeros(0), *chosen.values()]).unique()
        slot_ids = slot_ids[torch.isin(self.owners[slot_ids], self.owners.new_tensor([*chosen]))]
        return slot_ids, self.pool.num_slots + self.owners[slot_ids]

    def begin(self) -> None:
        """Give the active rows that are new their name, and the key by which they were asked for."""
        assert self.pool.active is not None
        assert self.pool.selection is not None
        facts = (self.pool.selection.tags - self.pool.num_slots).tolist()
        with torch.no_grad():
            new_N = (~self.pool.active.any(dim=1)).nonzero().squeeze(1)
            if not len(new_N):
                return
            new = [facts[place] for place in new_N.tolist()]
            names_N1 = self.pool.active.new_tensor([[self.name_of[fact]] for fact in new])
            nothing_NV = torch.zeros_like(self.pool.active[new_N])
            # A process that runs none of the wordings of a fact has not seen it asked.
            unseen_K = nothing_NV[0, : self.layer.relation_dim]
            keys_NK = distributed.summed(torch.stack([self._asked.pop(fact, unseen_K) for fact in new]))
            keys_NK = KEY_LENGTH * normalize(keys_NK, dim=1)
            values_NV = nothing_NV[:, : self.layer.width]
            self.pool.active[new_N] = torch.cat([names_N1, keys_NK, values_NV], dim=1)

    def _name(self, fact: int, of_fact: Tensor) -> None:
        """Find the name that a fact is about among those known, or make one of what is free."""
        names = self.names[of_fact]
        free, taken = of_fact[names < 0], of_fact[names >= 0]
        known, times = names[names >= 0].unique(return_counts=True)
        if len(known) and (2 * int(times.max()) > len(of_fact) or not len(free)):
            name = int(known[times.argmax()])
            own = torch.cat([free, *self._shares(taken[self.names[taken] == name])])
        else:
            # The slot is nobody else's, so no other name is called so.
            name, own = 1 + int(free.min()), free
        self.name_of[fact] = name
        self.names[own], self.owners[own] = name, fact

    def _shares(self, slot_ids: Tensor) -> Iterator[Tensor]:
        """Take an equal share of the slots of each row, and from none its last."""
        owners = self.owners[slot_ids].unique()
        for owner in owners:
            yield slot_ids[self.owners[slot_ids] == owner][1 :: len(owners) + 1]
