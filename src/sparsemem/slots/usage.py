"""Background usage: how often ordinary text reads each slot.

Shape letters: S slots, C candidate slots.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem import distributed
from sparsemem.encode import length_batches, token_lists
from sparsemem.errors import CheckpointError, DataError, PoolMismatchError
from sparsemem.files import read_tensors, write_tensors
from sparsemem.memory.attach import memory_layers, observe_reads, pools
from sparsemem.memory.layer import MemoryLayer, Reads
from sparsemem.prompts import background_documents
from sparsemem.slots.directions import NUM_DOCUMENTS, fisher_directions

USAGE_FILE = "background_usage.safetensors"
FORMAT = "sparsemem-usage"
FORMAT_VERSION = 3
"""2: with directions, of length 1. 3: as long as a step may be."""

WINDOW = 1024
"""Documents tokenized at a time; those of like length are counted together."""


@dataclasses.dataclass(frozen=True)
class PoolUsage:
    """Reads of one pool by the background, for all its slots or for some of them.

    Args:
        reads: Reads per slot, shape (slots,), int32: they are gathered at random, so their width is time.
        document_frequency: Documents that read the slot at least once, shape (slots,), int32.
        num_documents: Documents counted; a document is one background batch.
        total_reads: Reads of all slots of the pool.
        mean_document_frequency: Share of the documents that read a slot, the mean over all slots of the pool.
        num_slots: Slots of the pool.
    """

    reads: Tensor
    document_frequency: Tensor
    num_documents: int
    total_reads: int
    mean_document_frequency: float
    num_slots: int

    @classmethod
    def of_pool(cls, reads: Tensor, document_frequency: Tensor, num_documents: int) -> "PoolUsage":
        """Make the usage of a whole pool from its counts."""
        most = torch.iinfo(torch.int32).max
        small, frequency = (count.clamp(max=most).int() for count in (reads, document_frequency))
        mean = float(document_frequency.double().mean()) / max(1, num_documents)
        return cls(small, frequency, num_documents, int(reads.sum()), mean, len(reads))

    def take(self, slot_ids: Tensor) -> "PoolUsage":
        """Restrict the counts to some slots; the totals stay those of the pool."""
        slot_ids = slot_ids.to(self.reads.device)
        return dataclasses.replace(
            self, reads=self.reads[slot_ids], document_frequency=self.document_frequency[slot_ids]
        )


@dataclasses.dataclass(frozen=True)
class Usage:
    """Background usage of every pool of a model.

    Args:
        pools: Usage by pool name.
        token_document_frequency: Documents that contain each token, shape (vocabulary,), int64.
        num_documents: Documents counted.
        num_tokens: Tokens counted, padding excluded.
        keys_digest: Which queries and keys made the reads.
        directions: By pool name, the axes to train rows in, as `fisher_directions` finds them; none, where it
            was counted by the first version.
    """

    pools: dict[str, PoolUsage]
    token_document_frequency: Tensor
    num_documents: int
    num_tokens: int
    keys_digest: str
    directions: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def check(self, model: nn.Module) -> None:
        """Raise PoolMismatchError unless this usage was counted on the memory `model` has now."""
        if self.keys_digest != keys_digest(model):
            raise PoolMismatchError(
                f"usage was counted with keys {self.keys_digest[:12]}, the memory has "
                f"{keys_digest(model)[:12]}; count_usage(...) again after attaching or fitting keys"
            )
        widths = {layer.pool_name: layer.width for layer in memory_layers(model)}
        for name, axes in self.directions.items():
            if axes.shape != 2 * (widths[name],):
                raise PoolMismatchError(
                    f"directions of {name} have shape {tuple(axes.shape)}, its rows "
                    f"{widths[name]} numbers; count_usage(...) again"
                )


def count_usage(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    num_documents: int = 1000,
    max_length: int = 256,
    prompt_formats: bool = True,
    on_step: Callable[[int, int], None] | None = None,
) -> Usage:
    """Count how often background text reads each slot, and find the axes in which its gradients vary.

    Lin et al. 2025 (arXiv:2510.15103) count over 1,000 random pretraining batches. Here a document
    is one text of at most `max_length` tokens. Of several processes each counts a share of the batches and
    all get the sum; a batch stays what it is in one process, so the sum is the same to the last read.

    Args:
        model: A model with a memory, keys fitted.
        tokenizer: Its tokenizer.
        texts: Background texts, one document each.
        num_documents: Documents to count; fewer if the texts end.
        max_length: Tokens per document.
        prompt_formats: Put two thirds of the texts into this product's own prompts, so that their
            template does not look rare.
        on_step: Called with how many documents were run, and how many there are; those that give the axes
            are run twice.

    Raises:
        ConfigError: The model is spread over processes.
        DataError: There is no text.
    """
    distributed.check_whole(model, "counting usage")
    documents = background_documents(texts, tokenizer) if prompt_formats else texts
    reads = {name: torch.zeros(pool.num_slots, dtype=torch.int64) for name, pool in pools(model).items()}
    frequency = {name: torch.zeros_like(zeros) for name, zeros in reads.items()}
    token_frequency = torch.zeros(model.get_input_embeddings().num_embeddings, dtype=torch.int64)
    counted = num_tokens = turn = 0
    first: list[list[int]] = []

    def report(num_run: int) -> None:
        if on_step:
            on_step(num_run, num_documents + NUM_DOCUMENTS)

    device = next(model.parameters()).device
    sequences = islice(token_lists(tokenizer, documents, max_length=max_length), num_documents)
    while window := list(islice(sequences, WINDOW)):
        first += window[: NUM_DOCUMENTS - len(first)]
        for _, batch in length_batches(window, device=device):
            mask = batch["attention_mask"].bool()
            rows = torch.arange(len(mask), device=device).unsqueeze(1).expand_as(mask)[mask]
            if turn % distributed.world_size() == distributed.rank():
                _count_reads(model, batch, mask, rows, reads, frequency)
            tokens = (rows * len(token_frequency) + batch["input_ids"][mask]).cpu().unique()
            token_frequency += torch.bincount(tokens % len(token_frequency), minlength=len(token_frequency))
            counted += len(mask)
            num_tokens += int(mask.sum())
            turn += 1
            report(counted)
    if not counted:
        raise DataError("the background has no text; give at least some hundred documents")
    counts = {name: (distributed.summed(reads[name]), distributed.summed(frequency[name])) for name in reads}
    return Usage(
        pools={name: PoolUsage.of_pool(*of_pool, counted) for name, of_pool in counts.items()},
        token_document_frequency=token_frequency,
        num_documents=counted,
        num_tokens=num_tokens,
        keys_digest=keys_digest(model),
        directions=distributed.from_main(
            lambda: fisher_directions(model, first, lambda num: report(counted + num))
        ),
    )


def _count_reads(
    model: Any,
    batch: dict[str, Tensor],
    mask: Tensor,
    rows: Tensor,
    reads: dict[str, Tensor],
    frequency: dict[str, Tensor],
) -> None:
    """Add what a batch reads to the counts of each pool; `rows` is the document of each real token."""
    seen: dict[str, list[Tensor]] = {name: [] for name in reads}

    def keep(layer: MemoryLayer, current: Reads) -> None:
        real = current.slot_ids[mask].flatten(1)
        # Document number and slot in one integer, so that one sort counts both statistics.
        keyed = real + rows.unsqueeze(1) * layer.pool.num_slots
        seen[layer.pool_name].append(keyed.flatten())

    observe_reads(model, keep, **batch)
    for name, parts in seen.items():
        keyed, times = (found.cpu() for found in torch.cat(parts).unique(return_counts=True))
        slot_ids = keyed % len(reads[name])
        reads[name].index_add_(0, slot_ids, times)
        frequency[name].index_add_(0, slot_ids, torch.ones_like(times))


def keys_digest(model: nn.Module) -> str:
    """Digest of what decides which slots are read, and where it goes: queries, keys, top-k and places."""
    digest = hashlib.sha256()
    for layer in memory_layers(model):
        place: tuple[Any, ...] = (layer.block_index, layer.pool_name, layer.top_k)
        # Usage that was counted before the two could differ goes on being known.
        if layer.output_index != layer.block_index:
            place += (layer.output_index,)
        digest.update(repr(place).encode())
        relation = () if layer.relation is None else (layer.relation.weight, layer.relation.bias)
        for part in (layer.query.weight, layer.query.bias, layer.keys, layer.key_bias, *relation):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_usage(usage: Usage, path: str | Path) -> None:
    """Write usage as a safetensors file, atomically; raises OutputError."""
    tensors = {"token_document_frequency": usage.token_document_frequency}
    for name, pool in usage.pools.items():
        tensors[f"reads.{name}"] = pool.reads
        tensors[f"document_frequency.{name}"] = pool.document_frequency
    tensors |= {f"directions.{name}": axes for name, axes in usage.directions.items()}
    header = {
        "num_documents": str(usage.num_documents),
        "num_tokens": str(usage.num_tokens),
        "keys_digest": usage.keys_digest,
    }
    write_tensors(Path(path), tensors, FORMAT, FORMAT_VERSION, header)


def load_usage(path: str | Path) -> Usage:
    """Read usage.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: It is damaged, foreign or of a newer format.
    """
    tensors, header = read_tensors(Path(path), FORMAT, FORMAT_VERSION)
    names = [key.partition(".")[2] for key in tensors if key.startswith("reads.")]
    try:
        num_documents = int(header["num_documents"])
        pool_usages = {}
        for name in names:
            reads, frequency = tensors[f"reads.{name}"], tensors[f"document_frequency.{name}"]
            pool_usages[name] = PoolUsage.of_pool(reads, frequency, num_documents)
        return Usage(
            pools=pool_usages,
            token_document_frequency=tensors["token_document_frequency"],
            num_documents=num_documents,
            num_tokens=int(header["num_tokens"]),
            keys_digest=header["keys_digest"],
            directions={name: tensors[key] for name in names if (key := f"directions.{name}") in tensors},
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid usage: {error}; count it again with attach") from error
