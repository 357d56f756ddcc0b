"""The memory layer: a hidden state asks, the pool answers.

Shape letters: T tokens, H heads, N sub-keys per half, K top-k, R reads of all heads (H * K),
Q half key dim, V value dim, D width.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from sparsemem.memory.lookup import best_slots
from sparsemem.memory.pool import NOTHING, Pool

Placement = Literal["add", "replace"]

NOTHING_ASKED = 9.0
"""What nothing scores where rows of a name are chosen among. A key is such that a state that asks for its row
scores `training.naming.SCORES`."""

FADES_IN = 12
"""Tokens after which a name that was read scores 1 less. A text that is about something else by then may ask
what a row of that name would answer."""

DOUBT = 12.0
"""What the logarithm of the agreement with which a name was read counts beside a score. Most names that
ordinary text is taken to mention are read with little: another date, another storm."""

TOKENS_AT_A_TIME = 256
"""Tokens whose reads are compared with one another at a time, R * R numbers each."""


class Reads(NamedTuple):
    """What a layer is about to read.

    Args:
        hidden: States that ask, shape (batch, tokens, hidden_size).
        slot_ids: Slots each of them reads, shape (batch, tokens, heads, top_k).
        weights: Weight of each read, same shape, float32; those of a head sum to 1.
    """

    hidden: Tensor
    slot_ids: Tensor
    weights: Tensor


BeforeRead = Callable[["MemoryLayer", Reads], None]
"""Called with a layer and its reads once they are known and before a row is touched: here usage is
counted and slots are chosen."""


class MemoryLayer(nn.Module):
    """A sparse key-value memory over a hidden state.

    `y = c sum_i a_i softmax(scores)_i v_i` over the top-k slots of each head, heads summed, where the
    constant c (`value_scale`, 1 unless fitted) is the size of what y is added to. The agreement
    `a = 2 m / quorum - 1`, within 0 and 1, says how sure the memory is that it knows this state: m is
    the share of the token's reads, by weight, that find the same row. A name that was learned finds a
    good part of its slots in any wording. Other text hits one now and then, more often as the memory
    fills, but seldom two of one row: it gets nothing, not a little, so that its logits stay the same bit
    for bit. Slots that share their row with no other count together. With a base table every slot holds
    something, and a is 1. With `placement="add"` the output is y, to be added beside the feed-forward
    network; with "replace" it is the gated `(y * silu(x W1)) W2` of Memory+ (Berges et al. 2024,
    arXiv:2412.09764), which takes the network's place. Queries, keys and rows are float32 whatever the
    backbone's dtype, so that the same hidden state always reads the same slots.

    Args:
        hidden_size: Width D of the model.
        pool: Values to read; may be shared with other layers.
        num_keys: Sub-keys per half; the pool has num_keys**2 slots.
        num_heads: Independent lookups per token.
        top_k: Slots read per head.
        query_dim: Width of half a key.
        placement: "add" or "replace".
        quorum: Share of a token's reads that must find one row for the full answer, with half of which it
            gets nothing; 0 asks for none.
        block_index: The block it sits in.
        output_index: The block beside whose feed-forward network its answer is added, by default its own;
            with relations, the block before which it is.
        pool_name: Name of the pool in usage, deltas and files; layers that share a pool share it.
        relation_dim: Numbers of a row that say what it answers; 0 for rows that answer anything.
    """

    keys: nn.Parameter
    key_bias: nn.Parameter
    value_scale: Tensor

    def __init__(
        self,
        hidden_size: int,
        pool: Pool,
        *,
        num_keys: int,
        num_heads: int,
        top_k: int,
        query_dim: int,
        placement: Placement = "add",
        quorum: float = 0.0,
        block_index: int = 0,
        output_index: int | None = None,
        pool_name: str = "pool",
        relation_dim: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_keys, self.top_k, self.query_dim = num_heads, num_keys, top_k, query_dim
        self.pool = pool
        self.quorum = quorum
        self.block_index, self.pool_name = block_index, pool_name
        self.output_index = block_index if output_index is None else output_index
        self.query = nn.Linear(hidden_size, num_heads * 2 * query_dim)
        self.keys = nn.Parameter(torch.randn(num_heads, 2, num_keys, query_dim) / math.sqrt(query_dim))
        self.key_bias = nn.Parameter(torch.zeros(num_heads, 2, num_keys))
        # Rows are in units of what they are added to, so that one learning rate suits every model.
        self.register_buffer("value_scale", torch.ones(()))
        self.relation_dim = relation_dim
        self.relation = nn.Linear(hidden_size, relation_dim) if relation_dim else None
        self.gate = nn.Linear(hidden_size, pool.value_dim, bias=False) if placement == "replace" else None
        self.out = nn.Linear(pool.value_dim, hidden_size, bias=False) if placement == "replace" else None
        self.beside: Any = None
        """The hooks that join the output to the feed-forward network's, where placement is "add"."""
        self.replaced: list[nn.Module] = []
        """The feed-forward network whose place was taken, where placement is "replace"."""
        self.before_read: BeforeRead | None = None

    def lookup(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Find the slots each token reads; shapes (..., heads, top_k), weights float32 and summing to 1."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1]).float()
        queries_TH2Q = self.query(hidden_TD).view(-1, self.num_heads, 2, self.query_dim)
        scores_THK, slot_ids_THK = best_slots(queries_TH2Q, self.keys, self.key_bias, self.top_k)
        shape = (*hidden.shape[:-1], self.num_heads, self.top_k)
        return slot_ids_THK.view(shape), scores_THK.softmax(dim=-1).view(shape)

    def forward(self, hidden: Tensor) -> Tensor:
        """Answer every position of (..., hidden_size) in the same shape and dtype.

        With relations, say which names are read at each, as `names_read` does; `answer` then answers.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            slot_ids, weights = self.lookup(hidden)
            if self.before_read is not None:
                self.before_read(self, Reads(hidden, slot_ids, weights))
            reads = self.num_heads * self.top_k
            slot_ids_TR, weights_TR = slot_ids.view(-1, reads), weights.reshape(-1, reads)
            if self.relation is not None:
                return self.names_read(slot_ids_TR, weights_TR).view(*hidden.shape[:-1], -1, 2)
            if self.quorum and self.pool.base is None:
                weights_TR = weights_TR * self.agreement(slot_ids_TR, weights_TR)
            y_TV = self.pool.read(slot_ids_TR, weights_TR) * self.value_scale
            if self.gate is not None and self.out is not None:
                hidden_TD = hidden.reshape(-1, hidden.shape[-1]).float()
                y_TV = self.out(y_TV * silu(self.gate(hidden_TD)))
        return y_TV.view(hidden.shape).to(hidden.dtype)

    def names_read(self, slot_ids_TR: Tensor, weights_TR: Tensor) -> Tensor:
        """Tell the names that enough reads of a token agree on.

        Args:
            slot_ids_TR: Slots read, shape (tokens, heads * top_k).
            weights_TR: Weight of each read, same shape.

        Returns:
            Shape (tokens, names, 2): each name and its agreement, the surest first, then zeros.
        """
        # More than half a quorum of the reads is needed, so that no token can have more.
        most = math.ceil(2 / self.quorum) - 1
        agreement_TR = self.agreement(slot_ids_TR, weights_TR)
        names_TN2 = torch.zeros(len(slot_ids_TR), most, 2, device=slot_ids_TR.device)
        tokens = agreement_TR.any(dim=1).nonzero().squeeze(1)
        left_SR, groups_SR = agreement_TR[tokens], self.pool.groups(slot_ids_TR[tokens])
        for number in range(most if len(tokens) else 0):
            surest_S1, place_S1 = left_SR.max(dim=1, keepdim=True)
            name_S1 = groups_SR.gather(1, place_S1)
            names_TN2[tokens, number] = torch.cat([name_S1 * (surest_S1 > 0), surest_S1], dim=1)
            left_SR = left_SR * (groups_SR != name_S1)
        return names_TN2

    def answer(self, hidden: Tensor, names: Tensor) -> Tensor:
        """Add what is known of the names read so far, as far as a position asks for it.

        `h + c sum_r g_r v_r` with `g = softmax(q(h) . k_r + DOUBT log a_r - d_r)` over the rows r of all
        names read at this position or before, and over nothing, whose score is `NOTHING_ASKED`. a is the
        agreement with which the name was read and d how far back, in units of `FADES_IN` tokens: of all
        times it was read, that which says most. Keys get no gradient: `training.naming` finds them in
        closed form.

        Args:
            hidden: Shape (batch, tokens, hidden_size).
            names: Names read at the same tokens and, in front, at those before; (batch, tokens, names, 2).

        Returns:
            In the shape and dtype of `hidden`; bit for bit the same at tokens before which no name was read.
        """
        assert self.relation is not None
        name_BTN, agreement_BTN = names.unbind(dim=-1)
        found_U = name_BTN[agreement_BTN > 0].unique()
        if not len(found_U):
            # A gradient of zero, not none: of several processes each goes backward.
            return hidden if self.pool.active is None else hidden + 0 * self.pool.active.sum().to(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            read_BTU = torch.stack(
                [(agreement_BTN * (name_BTN == name)).amax(dim=-1) for name in found_U], dim=-1
            )
            gained_T1 = torch.arange(read_BTU.shape[1], device=names.device).unsqueeze(1) / FADES_IN
            said_BTU = (DOUBT * read_BTU.log() + gained_T1).cummax(dim=1).values - gained_T1
            said_BTU = said_BTU[:, -hidden.shape[1] :]
            rows_RV, number_R = self.pool.rows_named(found_U)
            _, keys_RK, values_RD = rows_RV.split([1, self.relation_dim, self.width], dim=1)
            asks_BT = said_BTU.isfinite().any(dim=-1)
            # The block that is answered may lie on another device than the memory.
            asking_PD = hidden[asks_BT.to(hidden.device)].float().to(names.device)
            queries_PK = normalize(self.relation(asking_PD), dim=-1)
            scores_PR = queries_PK @ keys_RK.detach().T + said_BTU[asks_BT][:, number_R]
            scores_PR = torch.cat([scores_PR, scores_PR.new_full((len(scores_PR), 1), NOTHING_ASKED)], dim=1)
            y_PD = scores_PR.softmax(dim=1)[:, :-1] @ values_RD * self.value_scale
        return hidden.index_put((asks_BT.to(hidden.device),), y_PD.to(hidden), accumulate=True)

    def agreement(self, slot_ids_TR: Tensor, weights_TR: Tensor) -> Tensor:
        """Say how much the other reads of its token agree with each read.

        Args:
            slot_ids_TR: Slots read, shape (tokens, heads * top_k).
            weights_TR: Weight of each read, same shape; those of a head sum to 1.

        Returns:
            Shape (tokens, heads * top_k), 0 to 1; without a quorum, or over a base table, 1 where a slot
            holds something.
        """
        if self.pool.base is not None:
            return torch.ones_like(weights_TR)
        groups_TR = self.pool.groups(slot_ids_TR)
        holds_TR = (groups_TR != NOTHING).to(weights_TR.dtype)
        if not self.quorum:
            return holds_TR
        found_TR = weights_TR * holds_TR / self.num_heads
        agreement_TR = torch.zeros_like(found_TR)
        # Where all that is found is too little, no part of it is enough.
        tokens = (2 * found_TR.sum(dim=1) > self.quorum).nonzero().squeeze(1)
        for some in tokens.split(TOKENS_AT_A_TIME):
            same_SRR = groups_TR[some].unsqueeze(2) == groups_TR[some].unsqueeze(1)
            share_SR = (same_SRR.to(found_TR.dtype) @ found_TR[some].unsqueeze(2)).squeeze(2)
            agreement_TR[some] = (2 * share_SR / self.quorum - 1).clamp(0, 1)
        return agreement_TR

    @property
    def width(self) -> int:
        """Numbers of what a row adds; those before it are its name and relation."""
        return self.pool.value_dim if self.relation is None else self.relation.in_features

    def is_silent(self) -> bool:
        """Whether the output is known to be zero, so that nothing needs to be computed."""
        return self.gate is None and self.before_read is None and self.pool.is_empty()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryLayer":
        # As in the pool: a model cast to bfloat16 must go on reading the very same slots.
        exact = {name: p.data for name, p in self.named_parameters()}
        scale = self.value_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for network in self.replaced:  # which is no submodule, and goes along to where it will be put back
            network._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            parameter.data = exact[name].to(parameter.device)
        self.value_scale = scale.to(self.value_scale.device)
        return self


def init_memory(layer: MemoryLayer, generator: torch.Generator) -> None:
    """Draw queries, keys and gates at random, the same for the same generator on every device."""

    def draw(parameter: Tensor, fan_in: int) -> None:
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 1 / math.sqrt(fan_in), generator=generator))

    with torch.no_grad():
        for linear in (layer.query, layer.gate, layer.out):
            if linear is not None:
                draw(linear.weight, linear.in_features)
        layer.query.bias.zero_()
        if layer.relation is not None:
            draw(layer.relation.weight, layer.relation.in_features)
            layer.relation.bias.zero_()
        draw(layer.keys, layer.query_dim)
        layer.key_bias.zero_()
