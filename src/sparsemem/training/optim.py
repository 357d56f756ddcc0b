"""Optimizers on active rows, with state that belongs to a row and outlives the selection.

Shape letters: A active rows, V value dim.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsemem import distributed
from sparsemem.errors import ConfigError
from sparsemem.memory.pool import Pool


class SlotOptimizer(torch.optim.Optimizer):
    """Steps the active rows of each pool, and nothing else.

    A stock optimizer on `pool.active` does the same as long as the selection stays. When it changes
    from step to step, state has to follow the rows: each here keeps its own moments and its own step
    count by its tag, so one that returns after a hundred steps of others goes on where it was, and one
    seen for the first time gets a first step. Equal to `torch.optim.AdamW` and `SGD` while the
    selection is constant.

    Args:
        pools: Pools by name.
        name: "adamw" or "sgd".
        lr: Learning rate.
        momentum: For "sgd".
        betas: For "adamw".
        eps: For "adamw".
        weight_decay: Decoupled for "adamw", added to the gradient for "sgd", as in torch.
        num_steps: Steps that each row of a fact has, unless it is chosen later than the fact's first.
        average_from: With its step of that number a row of a fact becomes the mean of what it was after each
            step from this share of them on (Polyak and Juditsky 1992): single steps scatter around it. With 1
            it stays as the last step left it, as do rows that belong to a slot and not to a fact.
        extrapolate: How far from where it began a row of a fact ends, relative to that mean.
        directions: By pool name, orthogonal columns of one length, shape (V, V): "adamw" scales coordinates
            along these, and not those that rows are written in; a step is as many times longer as they are.

    Raises:
        ConfigError: `name` is unknown.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        name: str = "adamw",
        *,
        lr: float,
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        num_steps: int = 1,
        average_from: float = 1.0,
        extrapolate: float = 1.0,
        directions: Mapping[str, Tensor] | None = None,
    ) -> None:
        if name not in UPDATES:
            raise ConfigError(f"optimizer={name!r} is unknown; use one of {', '.join(UPDATES)}")
        self.pools = pools
        self.update = UPDATES[name]
        self.num_steps, self.num_averaged = num_steps, num_steps - math.floor(average_from * num_steps)
        self.extrapolate = extrapolate
        self.directions = {
            name: axes.to(pools[name].slot_to_row.device) for name, axes in (directions or {}).items()
        }
        self.row_state: dict[str, dict[str, _StateTable]] = {pool: {} for pool in pools}
        defaults = {
            "lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay
        }  # fmt: skip
        super().__init__([{"params": []}], defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the active rows."""
        for pool in self.pools.values():
            if pool.active is not None:
                pool.active.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the active rows that have a gradient; of several processes by the sum of theirs."""
        for name, pool in self.pools.items():
            if pool.active is None or pool.selection is None:
                continue
            grad = pool.active.grad
            if grad is None and distributed.world_size() == 1:
                continue
            if grad is None:  # this process had nothing to run
                grad = torch.zeros_like(pool.active)
            of_facts = pool.selection.tags >= pool.num_slots
            before_AV = pool.active[of_facts]  # a copy
            state = _State(self.row_state[name], pool.selection.tags)
            axes = self.directions.get(name)
            self.update(pool.active, distributed.summed(grad), state, self.param_groups[0], axes)
            state.save()
            if len(before_AV):
                state = _State(self.row_state[name], pool.selection.tags[of_facts])
                pool.active[of_facts] = self._ended(before_AV, pool.active[of_facts], state)
                state.save()

    def _ended(self, before_AV: Tensor, rows_AV: Tensor, state: "_State") -> Tensor:
        """Go on with the mean of each row of a fact; return the rows, those that are done as they end.

        Args:
            before_AV: The rows before this step.
            rows_AV: The rows after it.
            state: Theirs.
        """
        steps_A1 = state.get("steps", 1).add_(1)
        since_A1 = (steps_A1 - (self.num_steps - self.num_averaged)).clamp(min=1)
        mean_AV, start_AV = (state.get(name, rows_AV.shape[1]) for name in ("mean", "start"))
        mean_AV.lerp_(rows_AV, 1 / since_A1)  # until the first that counts, just the row itself
        start_AV.copy_(torch.where(steps_A1 == 1, before_AV, start_AV))
        return torch.where(steps_A1 == self.num_steps, start_AV.lerp(mean_AV, self.extrapolate), rows_AV)


class _StateTable:
    """Rows of optimizer state by tag; one without has zeros. As large as the tags it has seen."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tags = torch.zeros(0, dtype=torch.int64, device=device)  # ascending
        self.rows = torch.zeros(0, width, device=device)

    def get(self, tags: Tensor) -> Tensor:
        places, known = self._find(tags)
        values = self.rows.new_zeros(len(tags), self.rows.shape[1])
        values[known] = self.rows[places[known]]
        return values

    def set(self, tags: Tensor, values: Tensor) -> None:
        _, known = self._find(tags)
        if not known.all():
            self.tags, order = torch.cat([self.tags, tags[~known]]).sort()
            self.rows = torch.cat([self.rows, values[~known]])[order]
        self.rows[self._find(tags)[0]] = values

    def _find(self, tags: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place of each tag, and whether it has one."""
        places = torch.searchsorted(self.tags, tags)
        known = torch.zeros_like(tags, dtype=torch.bool)
        inside = places < len(self.tags)
        known[inside] = self.tags[places[inside]] == tags[inside]
        return places, known


class _State:
    """State tensors of the rows of one step, fetched on demand and saved after it."""

    def __init__(self, tables: dict[str, _StateTable], tags: Tensor) -> None:
        self.tables, self.tags = tables, tags
        self.values: dict[str, Tensor] = {}

    def get(self, name: str, width: int) -> Tensor:
        if name not in self.tables:
            self.tables[name] = _StateTable(width, self.tags.device)
        self.values[name] = self.tables[name].get(self.tags)
        return self.values[name]

    def save(self) -> None:
        for name, values in self.values.items():
            self.tables[name].set(self.tags, values)


def _adamw(
    rows_AV: Tensor, grad_AV: Tensor, state: _State, group: dict[str, Any], axes_VV: Tensor | None
) -> None:
    if axes_VV is not None:
        grad_AV = grad_AV @ axes_VV
    beta1, beta2 = group["betas"]
    width = rows_AV.shape[1]
    # In float64: 1 - 0.999**1 has four digits left in float32.
    steps_A1 = state.get("step", 1).add_(1).double()
    mean_AV = state.get("exp_avg", width).lerp_(grad_AV, 1 - beta1)
    square_AV = state.get("exp_avg_sq", width).mul_(beta2).addcmul_(grad_AV, grad_AV, value=1 - beta2)
    rows_AV.mul_(1 - group["lr"] * group["weight_decay"])
    # The bias correction is per row: rows differ in how many steps they have had.
    scale_AV = (square_AV / (1 - beta2**steps_A1).float()).sqrt_().add_(group["eps"])
    step_AV = mean_AV / (1 - beta1**steps_A1).float() / scale_AV
    rows_AV.sub_(step_AV if axes_VV is None else step_AV @ axes_VV.T, alpha=group["lr"])


def _sgd(
    rows_AV: Tensor, grad_AV: Tensor, state: _State, group: dict[str, Any], _axes_VV: Tensor | None
) -> None:
    # A sum of gradients is the same in all axes.
    if group["weight_decay"]:
        grad_AV = grad_AV.add(rows_AV, alpha=group["weight_decay"])
    if group["momentum"]:
        grad_AV = state.get("momentum", rows_AV.shape[1]).mul_(group["momentum"]).add_(grad_AV)
    rows_AV.add_(grad_AV, alpha=-group["lr"])


UPDATES: dict[str, Callable[[Tensor, Tensor, _State, dict[str, Any], Tensor | None], None]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}
