"""Whose a slot is where rows have names, and which of a name's rows a text asks for.

Shape letters: P positions, F facts of a name, E earlier facts, R rows, K relation dim, V value dim.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sparsemem import distributed
from sparsemem.likelihood import before_labels
from sparsemem.memory.layer import NOTHING_ASKED, MemoryLayer
from sparsemem.memory.pool import IN_BASE
from sparsemem.training.examples import Batch

NOBODY = -1
"""Owner of a slot that holds nothing. A fact of this update has its number, an earlier row one below this."""


BEGINS, GOES_ON, OVER = range(3)
"""Where a text is: before an answer, within it, and at its last token."""
SCORES = 32.0, 26.0, 0.0
"""What a row is to score there."""
WEIGHTS = 4.0, 1.0, 1.0
"""Weight of the squared error there. A long answer has one beginning among dozens of tokens, and goes on
rightly only where it began so. Where it is over, it would be said again if its row were still asked for."""
SAME = 0.98
"""Cosine from which on two facts are asked for by the same wordings, where answers begin. Different facts
about one person have at most 0.80, those about one author of TOFU 0.96."""
SAME_ROW = 0.95
"""Share of what a new row would score where its answer begins, from which on an earlier one is taken to
answer the same, if it is not known what that was asked by. At one another's questions rows of facts about one
person score at most 0.9 of it; of TOFU, in one pair of a hundred, more."""
RIDGE = 0.1
"""Weight of the squared length of a key beside the squared error of a score. Ordinary text asks in all
directions alike, so what it scores in the mean grows with that length."""


class Asked(NamedTuple):
    """Queries by which facts are asked for, as far as this process has seen them.

    Args:
        queries: Shape (positions, relation_dim).
        facts: Fact whose answer each is about, shape (positions,), int64.
        where: `BEGINS`, `GOES_ON` or `OVER`, same shape, int64.
    """

    queries: Tensor
    facts: Tensor
    where: Tensor


class Naming:
    """Gives each fact slots of its name, and each new row its name and first key.

    What is read at a name says which name it is; what a text asks for then chooses among the rows of that
    name. So it does not matter how many of a name's slots hold a row: a further fact takes an equal share of
    those of the others, which stay as they are.

    A key is found in closed form. What is asked depends on blocks that nothing is ever added to, so all of it
    is known before training: the keys of a name's facts are those that score best, by `solve_keys`.

    One question has one answer: a fact that is asked for just as an earlier one was takes the place of that
    one's row. Beside it, its key would have to be twice as long, and ordinary text ask for it far more often.

    Args:
        layer: The only memory layer, one with relations.
    """

    def __init__(self, layer: MemoryLayer) -> None:
        self.layer, self.pool = layer, layer.pool
        places = self.pool.slot_to_row.long()
        self.owners = torch.where(places == IN_BASE, NOBODY, NOBODY - 1 - places)
        self.names = self.pool.groups(torch.arange(self.pool.num_slots, device=places.device))
        self.name_of: dict[int, int] = {}
        self.about: dict[int, int | None] = {}
        """Number of what each fact is about, if it is known; facts about the same get one name."""
        self._called: dict[int, int] = {}
        self._asked: list[Asked] = []
        nothing = self.pool.rows.new_zeros(0, layer.relation_dim)
        self._nothing = self._earlier = Asked(nothing, self.owners[:0], self.owners[:0])
        """Where answers begin of facts that were taught before, in this update or an earlier one."""
        self._keys: dict[int, Tensor] = {}
        self._claimed: dict[int, tuple[Tensor, Tensor]] = {}
        """Slots that each fact claimed, and whose they were."""
        self._inherited: dict[int, Tensor] = {}
        """Slots of the row whose place a fact takes."""

    @contextlib.contextmanager
    def asked(self, part: Batch) -> Iterator[None]:
        """Within this context a pass of `part` up to the answer shows what its facts are asked by."""

        def keep(_block: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            positions = before_labels(part.labels)
            # A text that is learned whole goes on after the name: nothing was asked yet.
            begins = (positions.cumsum(dim=1) == 1) & ~part.is_subject
            where = torch.where(begins, BEGINS, GOES_ON)
            for row, (example, start) in enumerate(zip(part.examples, part.starts, strict=True)):
                if example.teaches and example.over is not None:
                    positions[row, example.over - start], where[row, example.over - start] = True, OVER
            assert self.layer.relation is not None
            queries_PK = normalize(self.layer.relation(hidden[positions].float()), dim=-1)
            facts = part.fact_index.unsqueeze(1).expand_as(positions)[positions]
            self._asked.append(Asked(queries_PK, facts, where[positions]))

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
        inherited = [self._inherited[fact] for fact in chosen if fact in self._inherited]
        slot_ids = torch.cat([self.owners.new_zeros(0), *chosen.values(), *inherited]).unique()
        slot_ids = slot_ids[torch.isin(self.owners[slot_ids], self.owners.new_tensor([*chosen]))]
        return slot_ids, self.pool.num_slots + self.owners[slot_ids]

    def solve(self) -> None:
        """Find the keys of the facts that were claimed and asked for since the last time."""
        # A process may have run none of the wordings.
        asked = Asked(*map(distributed.gathered, _joined([self._nothing, *self._asked])))
        self._asked = []
        is_new = torch.isin(asked.facts, asked.facts.new_tensor([*self.name_of]))
        begins = asked.where == BEGINS
        self._earlier = _joined([self._earlier, _at(asked, begins & ~is_new)])
        by_name: dict[int, list[int]] = {}
        for fact in asked.facts[is_new].unique().tolist():
            by_name.setdefault(self.name_of[fact], []).append(fact)
        for name, facts in by_name.items():
            own = _at(asked, torch.isin(asked.facts, asked.facts.new_tensor(facts)))
            self._keys |= zip(facts, self._keys_of_name(name, facts, own), strict=True)
        self._earlier = _joined([self._earlier, _at(asked, begins & is_new)])

    def begin(self) -> None:
        """Give the active rows that are new their name and key, and no value."""
        assert self.pool.active is not None
        assert self.pool.selection is not None
        facts = (self.pool.selection.tags - self.pool.num_slots).tolist()
        # Not told by being zero: slots taken from a row of an earlier update come with what it holds.
        for place, fact in enumerate(facts):
            if fact in self._keys:
                row_V = torch.zeros_like(self.pool.active[place])
                row_V[0] = self.name_of[fact]
                row_V[1 : 1 + self.layer.relation_dim] = self._keys.pop(fact)
                self.pool.active.data[place] = row_V

    def _keys_of_name(self, name: int, facts: list[int], asked: Asked) -> Tensor:
        """Find the keys of new facts of a name, and whose places they take; shape (facts, relation_dim)."""
        earlier = self._asked_before(name, facts)
        begins, begun = _begins(asked), _begins(earlier)
        same = {
            fact: {e for e, begun_K in begun.items() if cosine_similarity(begins_K, begun_K, dim=0) >= SAME}
            for fact, begins_K in begins.items()
        }
        places = (self.pool.rows[:, 0] == name).nonzero().squeeze(1)
        if len(places):
            replaced = self._replaced(asked, begins, begun, same, places)
            self._inherit(facts, replaced)
            places = places[~torch.isin(places, places.new_tensor([*replaced.values()]))]
        again = earlier.facts.new_tensor([*set().union(*same.values())])
        others = _at(earlier, ~torch.isin(earlier.facts, again))
        # With the weight of any position, not that of the beginning of an own answer.
        others = others._replace(where=torch.full_like(others.where, GOES_ON))
        return self._keys_of(facts, _joined([asked, others]), places)

    def _asked_before(self, name: int, facts: list[int]) -> Asked:
        """Return what earlier facts about the same as some new ones of a name were asked by."""
        subjects = {self.about.get(fact) for fact in facts} - {None}
        same = [
            fact
            for fact in self._earlier.facts.unique().tolist()
            if self.name_of.get(fact) == name or self.about.get(fact) in subjects
        ]
        return _at(self._earlier, torch.isin(self._earlier.facts, self._earlier.facts.new_tensor(same)))

    def _replaced(
        self,
        asked: Asked,
        begins: Mapping[int, Tensor],
        begun: Mapping[int, Tensor],
        same: Mapping[int, set[int]],
        places: Tensor,
    ) -> dict[int, int]:
        """Find the earlier rows that answer just what new facts answer.

        Args:
            asked: What the new facts of a name are asked by.
            begins: The mean of it where their answers begin, by fact.
            begun: The same of earlier facts about the same, as far as it is known.
            same: Earlier facts that are asked for by the wordings of each new one.
            places: The name's earlier rows, shape (rows,).

        Returns:
            Row by fact, each once.
        """
        replaced: dict[int, int] = {}
        answered = self._answered(places, begun)
        for fact, asked_K in begins.items():
            enough = torch.inf
            if None in answered:
                (own_K,) = self._keys_of([fact], _at(asked, asked.facts == fact), places[:0])
                enough = SAME_ROW * float(own_K @ asked_K)
            scores = (self._earlier_keys(places) @ asked_K).tolist()
            alike = [
                (score, place)
                for score, place, known in zip(scores, places.tolist(), answered, strict=True)
                if place not in replaced.values()
                and (score >= enough if known is None else known in same[fact])
            ]
            if alike:
                replaced[fact] = max(alike)[1]
        return replaced

    def _answered(self, places: Tensor, begun: Mapping[int, Tensor]) -> list[int | None]:
        """Tell which earlier fact each of some rows answers; None, if none that is known."""
        if not begun:
            return [None] * len(places)
        facts = [*begun]
        best_R, fact_R = (self._earlier_keys(places) @ torch.stack([*begun.values()]).T).max(dim=1)
        found = zip(best_R.tolist(), fact_R.tolist(), strict=True)
        return [facts[fact] if best >= NOTHING_ASKED else None for best, fact in found]

    def _inherit(self, facts: list[int], replaced: Mapping[int, int]) -> None:
        """Give new facts of a name the slots of the rows whose places they take."""
        # What they were to share with other rows stays theirs; who claimed last gives back first.
        for fact in reversed(self._claimed):
            if fact in replaced:
                slot_ids, before = self._claimed[fact]
                shared = (self.owners[slot_ids] == fact) & (before != NOBODY)
                self.owners[slot_ids[shared]] = before[shared]
        for fact, place in replaced.items():
            others = self.owners.new_tensor([other for other in facts if other != fact])
            holds = (self.pool.slot_to_row == place) & ~torch.isin(self.owners, others)
            self._inherited[fact] = holds.nonzero().squeeze(1)
            self.owners[self._inherited[fact]] = fact

    def _earlier_keys(self, places: Tensor) -> Tensor:
        return self.pool.rows[places, 1 : 1 + self.layer.relation_dim]

    def _keys_of(self, facts: list[int], asked: Asked, places: Tensor) -> Tensor:
        """Find the keys of new facts of a name, shape (facts, relation_dim).

        Args:
            facts: The facts.
            asked: What they are asked by, and others, by which they are not.
            places: Rows of the name that stay, shape (rows,).
        """
        earlier_RK = self._earlier_keys(places)
        own_PF = asked.facts.unsqueeze(1) == asked.facts.new_tensor(facts)
        earlier_PR = asked.queries @ earlier_RK.T
        # As far above what an earlier row scores as above nothing: it may answer the same question, and
        # then where that is asked the new row is not to be silent.
        rival_P = earlier_PR.amax(dim=1) if len(earlier_RK) else earlier_PR.new_tensor(NOTHING_ASKED)
        above_P = (rival_P - NOTHING_ASKED).clamp(min=0) * (asked.where != OVER)
        scores_P1 = (own_PF.new_tensor(SCORES, dtype=torch.float32)[asked.where] + above_P).unsqueeze(1)
        mean_FR = own_PF.float().T @ earlier_PR / own_PF.sum(dim=0).unsqueeze(1)
        silent_RK = earlier_RK[(mean_FR < NOTHING_ASKED).all(dim=0)]
        weights_P = scores_P1.new_tensor(WEIGHTS)[asked.where]
        return solve_keys(asked.queries, own_PF * scores_P1, weights_P, silent_RK)

    def _name(self, fact: int, of_fact: Tensor) -> None:
        """Find the name that a fact is about among those known, or make one of what is free."""
        names = self.names[of_fact]
        free, taken = of_fact[names < 0], of_fact[names >= 0]
        known, times = names[names >= 0].unique(return_counts=True)
        about = self.about.get(fact)
        name = NOBODY if about is None else self._called.get(about, NOBODY)
        own = self._share_of(name, free, taken)
        if name == NOBODY or not len(own):
            is_known = len(known) and (2 * int(times.max()) > len(of_fact) or not len(free))
            # A slot that is free is nobody else's, so no other name is called so.
            name = int(known[times.argmax()]) if is_known else 1 + int(free.min())
            own = self._share_of(name, free, taken)
        self.name_of[fact] = name
        self._claimed[fact] = own, self.owners[own]
        self.names[own], self.owners[own] = name, fact
        if about is not None:
            self._called.setdefault(about, name)

    def _share_of(self, name: int, free: Tensor, taken: Tensor) -> Tensor:
        """List the slots that a further fact about a name gets, of those it chose."""
        return torch.cat([free, *self._shares(taken[self.names[taken] == name])])

    def _shares(self, slot_ids: Tensor) -> Iterator[Tensor]:
        """Take an equal share of the slots of each row, and from none its last."""
        owners = self.owners[slot_ids].unique()
        for owner in owners:
            yield slot_ids[self.owners[slot_ids] == owner][1 :: len(owners) + 1]


def _at(asked: Asked, places: Tensor) -> Asked:
    return Asked(*(kind[places] for kind in asked))


def _joined(parts: Sequence[Asked]) -> Asked:
    return Asked(*map(torch.cat, zip(*parts, strict=True)))


def _begins(asked: Asked) -> dict[int, Tensor]:
    """Return the mean of what each fact is asked by where its answer begins; of those whose answers do."""
    at = _at(asked, asked.where == BEGINS)
    return {fact: at.queries[at.facts == fact].mean(dim=0) for fact in at.facts.unique().tolist()}


def solve_keys(queries_PK: Tensor, scores_PF: Tensor, weights_P: Tensor, earlier_RK: Tensor) -> Tensor:
    """Find the keys that give queries their scores, by weighted ridge regression.

    Args:
        queries_PK: Queries of length 1, shape (positions, K).
        scores_PF: What each fact's row is to score at each position: 0 where another is asked for.
        weights_P: Weight of the squared error at each position.
        earlier_RK: Keys of rows that stay as they are; at each the new ones are to score 0, with weight 1.

    Returns:
        Shape (facts, K).
    """
    root_P1 = weights_P.sqrt().unsqueeze(1)
    queries_PK = torch.cat([root_P1 * queries_PK, normalize(earlier_RK, dim=1)]).double()
    silent_RF = scores_PF.new_zeros(len(earlier_RK), scores_PF.shape[1])
    scores_PF = torch.cat([root_P1 * scores_PF, silent_RF]).double()
    keys_KF: Tensor
    if len(queries_PK) < queries_PK.shape[1]:  # fewer equations of the one kind than of the other
        keys_KF = queries_PK.T @ torch.linalg.solve(_ridged(queries_PK @ queries_PK.T), scores_PF)
    else:
        keys_KF = torch.linalg.solve(_ridged(queries_PK.T @ queries_PK), queries_PK.T @ scores_PF)
    return keys_KF.T.float()


def _ridged(products: Tensor) -> Tensor:
    return products + RIDGE * torch.eye(len(products), dtype=products.dtype, device=products.device)
