"""Whose a slot is where rows have names, and which of a name's rows a text asks for.

Shape letters: P positions, N new rows, R earlier rows, K relation dim, V value dim.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sparsemem.memory.layer import NOTHING_ASKED, MemoryLayer
from sparsemem.memory.pool import IN_BASE
from sparsemem.training.questions import GOES_ON, MOST_ROWS, OVER, Asked, Questions, joined

NOBODY = -1
"""Owner of a slot that holds nothing. A row of this update has its number, an earlier row one below this."""
SCORES = 32.0, 26.0, 26.0, 0.0
"""What a row is to score where its answer begins, resumes, goes on and is over."""
WEIGHTS = 4.0, 1.0, 1.0, 1.0
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


class Naming:
    """Gives each fact slots of its name, and each new row its name and first key.

    What is read at a name says which name it is; what a text asks for then chooses among the rows of that
    name. So it does not matter how many of a name's slots hold a row: a further fact takes an equal share of
    those of the others, which stay as they are. A long answer takes several rows, which divide its slots.

    A key is found in closed form. What is asked depends on blocks that nothing is ever added to, so all of it
    is known before training: the keys of a name's facts are those that score best, by `solve_keys`.

    One question has one answer: a fact that is asked for just as an earlier one was takes its place. Beside
    it, a key would have to be twice as long, and ordinary text ask for it far more often.

    Args:
        layer: The only memory layer, one with relations.
    """

    def __init__(self, layer: MemoryLayer) -> None:
        self.layer, self.pool, self.questions = layer, layer.pool, Questions(layer)
        places = self.pool.slot_to_row.long()
        self.owners = torch.where(places == IN_BASE, NOBODY, NOBODY - 1 - places)
        self.names = self.pool.groups(torch.arange(self.pool.num_slots, device=places.device))
        self.name_of: dict[int, int] = {}
        self._called: dict[int, int] = {}
        """The name of what facts are about."""
        self._earlier = self.questions.nothing
        """Where rows begin to answer facts that were taught before, in this update or an earlier one."""
        self._keys: dict[int, Tensor] = {}
        self._num_rows: dict[int, int] = {}
        self._claimed: dict[int, tuple[Tensor, Tensor]] = {}
        """Slots that each fact claimed, and whose they were."""
        self._inherited: dict[int, Tensor] = {}
        """Slots of the rows whose place a fact takes."""

    def claim(self, chosen: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the slots that the facts of a batch train, and their tags: one for each row."""
        for fact, of_fact in chosen.items():
            if fact not in self.name_of and len(of_fact):
                self._name(fact, of_fact)
        inherited = [self._inherited[fact] for fact in chosen if fact in self._inherited]
        slot_ids = torch.cat([self.owners.new_zeros(0), *chosen.values(), *inherited]).unique()
        slot_ids = slot_ids[torch.isin(self._facts_at(slot_ids), self.owners.new_tensor([*chosen]))]
        return slot_ids, self.pool.num_slots + self.owners[slot_ids]

    def solve(self) -> None:
        """Find the keys of the facts that were claimed and asked for since the last time."""
        asked = self.questions.take()
        is_new = torch.isin(asked.facts, asked.facts.new_tensor([*self.name_of]))
        self._earlier = joined([self._earlier, asked.at(asked.is_start & ~is_new)])
        by_name: dict[int, list[int]] = {}
        for fact in asked.facts[is_new].unique().tolist():
            by_name.setdefault(self.name_of[fact], []).append(fact)
        for name, facts in by_name.items():
            own = asked.at(torch.isin(asked.facts, asked.facts.new_tensor(facts)))
            self._keys |= self._keys_of_name(name, facts, own)
        self._earlier = joined([self._earlier, asked.at(asked.is_start & is_new)])

    def begin(self) -> None:
        """Give the active rows that are new their name and key, and no value."""
        assert self.pool.active is not None
        assert self.pool.selection is not None
        rows = (self.pool.selection.tags - self.pool.num_slots).tolist()
        # Not told by being zero: slots taken from a row of an earlier update come with what it holds.
        for place, row in enumerate(rows):
            if row in self._keys:
                row_V = torch.zeros_like(self.pool.active[place])
                row_V[0] = self.name_of[row // MOST_ROWS]
                row_V[1 : 1 + self.layer.relation_dim] = self._keys.pop(row)
                self.pool.active.data[place] = row_V

    def _by_rows_there_are(self, asked: Asked) -> Asked:
        """Let each row of a fact that got fewer slots than it wants rows say more of the answer."""
        rows = asked.rows.clone()
        for fact in asked.facts.unique().tolist():
            wanted = self.questions.num_rows(fact)
            if (number := self._num_rows.get(fact, wanted)) < wanted:
                of_fact = asked.facts == fact
                rows[of_fact] = fact * MOST_ROWS + rows[of_fact] % MOST_ROWS * number // wanted
        return asked._replace(rows=rows)

    def _keys_of_name(self, name: int, facts: list[int], asked: Asked) -> dict[int, Tensor]:
        """Find the key of each new row of a name, shape (relation_dim,), and whose places facts take."""
        earlier = self._asked_before(name, facts)
        starts, started = asked.starts(), earlier.starts()
        same = {
            fact: {e for e, of_e in _firsts(started) if cosine_similarity(of_fact, of_e, dim=0) >= SAME}
            for fact, of_fact in _firsts(starts)
        }
        places = (self.pool.rows[:, 0] == name).nonzero().squeeze(1)
        if len(places):
            replaced = self._replaced(asked, starts, started, same, places)
            self._inherit(facts, replaced)
            places = places[~torch.isin(places, places.new_tensor([*replaced]))]
        again = earlier.facts.new_tensor([*set().union(*same.values())])
        others = earlier.at(~torch.isin(earlier.facts, again))
        # With the weight of any position, not that of the beginning of an own answer.
        others = others._replace(where=torch.full_like(others.where, GOES_ON))
        asked = self._by_rows_there_are(asked)
        rows = asked.rows.unique()
        return dict(zip(rows.tolist(), self._keys_of(rows, joined([asked, others]), places), strict=True))

    def _asked_before(self, name: int, facts: list[int]) -> Asked:
        """Return what earlier facts about the same as some new ones of a name were asked by."""
        about = self.questions.about
        subjects = {about.get(fact) for fact in facts} - {None}
        same = [
            fact
            for fact in self._earlier.facts.unique().tolist()
            if self.name_of.get(fact) == name or about.get(fact) in subjects
        ]
        return self._earlier.at(torch.isin(self._earlier.facts, self._earlier.facts.new_tensor(same)))

    def _replaced(
        self,
        asked: Asked,
        starts: Mapping[int, Tensor],
        started: Mapping[int, Tensor],
        same: Mapping[int, set[int]],
        places: Tensor,
    ) -> dict[int, int]:
        """Find the earlier rows that answer just what new facts answer.

        Args:
            asked: What the new facts of a name are asked by.
            starts: The mean of it where a row begins to answer, by new row.
            started: The same of earlier facts about the same, as far as it is known.
            same: Earlier facts that are asked for by the wordings of each new one.
            places: The name's earlier rows, shape (rows,).

        Returns:
            New fact by earlier row.
        """
        replaced: dict[int, int] = {}
        answered = self._answered(places, started)
        for row, asked_K in starts.items():
            fact, enough = row // MOST_ROWS, torch.inf
            if None in answered:
                own = asked.at(asked.facts == fact)
                (own_K,) = self._keys_of(own.rows.new_tensor([row]), own, places[:0])
                enough = SAME_ROW * float(own_K @ asked_K)
            scores = (self._earlier_keys(places) @ asked_K).tolist()
            alike = [
                (score, place)
                for score, place, known in zip(scores, places.tolist(), answered, strict=True)
                if place not in replaced
                and (score >= enough if known is None else known // MOST_ROWS in same.get(fact, ()))
            ]
            if alike:
                replaced[max(alike)[1]] = fact
        # The other rows of a longer answer.
        for place, known in zip(places.tolist(), answered, strict=True):
            for fact, earlier in same.items():
                if known is not None and known // MOST_ROWS in earlier:
                    replaced.setdefault(place, fact)
        return replaced

    def _answered(self, places: Tensor, started: Mapping[int, Tensor]) -> list[int | None]:
        """Tell which row of an earlier fact each of some rows is; None, if of none that is known."""
        if not started:
            return [None] * len(places)
        rows = [*started]
        best_R, row_R = (self._earlier_keys(places) @ torch.stack([*started.values()]).T).max(dim=1)
        found = zip(best_R.tolist(), row_R.tolist(), strict=True)
        return [rows[row] if best >= NOTHING_ASKED else None for best, row in found]

    def _inherit(self, facts: list[int], replaced: Mapping[int, int]) -> None:
        """Give new facts of a name the slots of the rows whose places they take."""
        heirs = [*dict.fromkeys(replaced.values())]
        # What they were to share with other rows stays theirs; who claimed last gives back first.
        for fact in reversed(self._claimed):
            if fact in heirs:
                slot_ids, before = self._claimed[fact]
                shared = (self._facts_at(slot_ids) == fact) & (before != NOBODY)
                self.owners[slot_ids[shared]] = before[shared]
        for fact in heirs:
            places = self.owners.new_tensor([place for place, heir in replaced.items() if heir == fact])
            others = self.owners.new_tensor([other for other in facts if other != fact])
            owned_by = self.owners // MOST_ROWS
            holds = torch.isin(self.pool.slot_to_row, places) & ~torch.isin(owned_by, others)
            self._inherited[fact] = holds.nonzero().squeeze(1)
            self._divide((holds | (owned_by == fact)).nonzero().squeeze(1), fact)

    def _earlier_keys(self, places: Tensor) -> Tensor:
        return self.pool.rows[places, 1 : 1 + self.layer.relation_dim]

    def _keys_of(self, rows_N: Tensor, asked: Asked, places: Tensor) -> Tensor:
        """Find the keys of new rows of a name, shape (new rows, relation_dim).

        Args:
            rows_N: Their numbers.
            asked: What they are asked by, and others, by which they are not.
            places: Rows of the name that stay, shape (rows,).
        """
        earlier_RK = self._earlier_keys(places)
        own_PN = asked.rows.unsqueeze(1) == rows_N
        earlier_PR = asked.queries @ earlier_RK.T
        # As far above what an earlier row scores as above nothing: it may answer the same question, and
        # then where that is asked the new row is not to be silent.
        rival_P = earlier_PR.amax(dim=1) if len(earlier_RK) else earlier_PR.new_tensor(NOTHING_ASKED)
        above_P = (rival_P - NOTHING_ASKED).clamp(min=0) * (asked.where != OVER)
        scores_P1 = (own_PN.new_tensor(SCORES, dtype=torch.float32)[asked.where] + above_P).unsqueeze(1)
        mean_NR = own_PN.float().T @ earlier_PR / own_PN.sum(dim=0).unsqueeze(1)
        silent_RK = earlier_RK[(mean_NR < NOTHING_ASKED).all(dim=0)]
        weights_P = scores_P1.new_tensor(WEIGHTS)[asked.where]
        return solve_keys(asked.queries, own_PN * scores_P1, weights_P, silent_RK)

    def _name(self, fact: int, of_fact: Tensor) -> None:
        """Find the name that a fact is about among those known, or make one of what is free."""
        names = self.names[of_fact]
        free, taken = of_fact[names < 0], of_fact[names >= 0]
        known, times = names[names >= 0].unique(return_counts=True)
        about = self.questions.about.get(fact)
        name = NOBODY if about is None else self._called.get(about, NOBODY)
        own = self._share_of(name, free, taken)
        if name == NOBODY or not len(own):
            is_known = len(known) and (2 * int(times.max()) > len(of_fact) or not len(free))
            # A slot that is free is nobody else's, so no other name is called so.
            name = int(known[times.argmax()]) if is_known else 1 + int(free.min())
            own = self._share_of(name, free, taken)
        self.name_of[fact] = name
        self._claimed[fact] = own, self.owners[own]
        self.names[own] = name
        self._divide(own, fact)
        if about is not None:
            self._called.setdefault(about, name)

    def _divide(self, slot_ids: Tensor, fact: int) -> None:
        """Divide slots among the rows of a fact, of which there are no more than slots."""
        number = self._num_rows[fact] = max(1, min(self.questions.num_rows(fact), len(slot_ids)))
        rows = torch.arange(len(slot_ids), device=slot_ids.device) % number
        self.owners[slot_ids] = fact * MOST_ROWS + rows

    def _facts_at(self, slot_ids: Tensor) -> Tensor:
        """Tell which fact of this update owns each of some slots; a negative number, where none does."""
        return self.owners[slot_ids] // MOST_ROWS

    def _share_of(self, name: int, free: Tensor, taken: Tensor) -> Tensor:
        """List the slots that a further fact about a name gets, of those it chose."""
        return torch.cat([free, *self._shares(taken[self.names[taken] == name])])

    def _shares(self, slot_ids: Tensor) -> Iterator[Tensor]:
        """Take an equal share of the slots of each row, and from none its last."""
        owners = self.owners[slot_ids].unique()
        for owner in owners:
            yield slot_ids[self.owners[slot_ids] == owner][1 :: len(owners) + 1]


def _firsts(starts: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield what facts are asked by where their answers begin."""
    for row, asked_K in starts.items():
        if row % MOST_ROWS == 0:
            yield row // MOST_ROWS, asked_K


def solve_keys(queries_PK: Tensor, scores_PN: Tensor, weights_P: Tensor, earlier_RK: Tensor) -> Tensor:
    """Find the keys that give queries their scores, by weighted ridge regression.

    Args:
        queries_PK: Queries of length 1, shape (positions, K).
        scores_PN: What each row is to score at each position: 0 where another is asked for.
        weights_P: Weight of the squared error at each position.
        earlier_RK: Keys of rows that stay as they are; at each the new ones are to score 0, with weight 1.

    Returns:
        Shape (new rows, K).
    """
    root_P1 = weights_P.sqrt().unsqueeze(1)
    queries_PK = torch.cat([root_P1 * queries_PK, normalize(earlier_RK, dim=1)]).double()
    silent_RN = scores_PN.new_zeros(len(earlier_RK), scores_PN.shape[1])
    scores_PN = torch.cat([root_P1 * scores_PN, silent_RN]).double()
    keys_KN: Tensor
    if len(queries_PK) < queries_PK.shape[1]:  # fewer equations of the one kind than of the other
        keys_KN = queries_PK.T @ torch.linalg.solve(_ridged(queries_PK @ queries_PK.T), scores_PN)
    else:
        keys_KN = torch.linalg.solve(_ridged(queries_PK.T @ queries_PK), queries_PK.T @ scores_PN)
    return keys_KN.T.float()


def _ridged(products: Tensor) -> Tensor:
    return products + RIDGE * torch.eye(len(products), dtype=products.dtype, device=products.device)
