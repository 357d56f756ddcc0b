"""Scores of a model that has learned nothing yet, measured once for all runs that start from it."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparsemem.config import from_json, to_json
from sparsemem.data import Fact
from sparsemem.evaluation.evaluate import Evaluation, FactScores
from sparsemem.evaluation.probes import Probe, ProbeScore
from sparsemem.evaluation.result_cache import ResultCache
from sparsemem.files import read_json, write_json
from sparsemem.memory.attach import memory_config, memory_layers
from sparsemem.memory.base_model import fingerprint, torch_dtype
from sparsemem.memory.checkpoint import base_weights
from sparsemem.prompts import PromptFormat
from sparsemem.study.measure import measure


def base_scores(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    probes: Sequence[Probe],
    prompt: PromptFormat,
    dtype: str,
    cache: Path,
) -> tuple[Evaluation, ResultCache | None]:
    """Measure a model that has learned nothing yet, or read what an earlier run measured.

    Args:
        model: As it was loaded, or with a memory as it was attached.
        tokenizer: Its tokenizer.
        facts: What will be taught.
        probes: What must not be forgotten.
        prompt: How questions are asked.
        dtype: Precision to measure in, "float32" or another.
        cache: Folder for what runs share.

    Returns:
        The scores, and of a model with a memory what makes measuring it again cheaper.
    """
    weights = next(model.parameters())
    key = digest(
        fingerprint(base_weights(model)),
        # A memory beside the network is silent until it learns; one in its place is another model.
        [layer.block_index for layer in memory_layers(model) if layer.replaced],
        [[fact.question, fact.answers, fact.heldout_questions] for fact in facts],
        [dataclasses.asdict(probe) for probe in probes],
        [field.name for cls in (FactScores, ProbeScore) for field in dataclasses.fields(cls)],
        prompt,
        dtype,
        weights.device.type,
    )
    path = cache / "scores" / f"{key}.json"
    layers = list(memory_layers(model))
    kept = None
    if layers:
        memory = [fingerprint(layer.named_parameters()) for layer in layers]
        kept = path.with_name(f"{key}-{digest(to_json(memory_config(model)), memory)}.pt")
    if not path.is_file() or (kept and not kept.is_file()):
        results = ResultCache() if kept else None
        before = in_dtype(model, dtype)
        scores = measure("measure before", before, tokenizer, facts, probes, prompt, results)
        if results and kept:
            results.save(kept)
        write_json(path, dataclasses.asdict(scores))
    values = read_json(path)
    return (
        Evaluation(
            facts=from_json(FactScores, values["facts"], path),
            probes={name: from_json(ProbeScore, score, path) for name, score in values["probes"].items()},
        ),
        ResultCache.load(kept, weights.device) if kept else None,
    )


def in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """Return a model, or a copy of it in another precision."""
    return model if dtype == "float32" else copy.deepcopy(model).to(torch_dtype(dtype))


def digest(*parts: Any) -> str:
    """Digest of plain JSON values, for the name of a file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
