"""Continual learning for language models with sparse memory layers.

Public names are resolved on first use, so that `sparsemem --help` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsemem.config import FinetuneConfig as FinetuneConfig
    from sparsemem.config import MemoryConfig as MemoryConfig
    from sparsemem.data import Fact as Fact
    from sparsemem.data import Question as Question
    from sparsemem.data import load_facts as load_facts
    from sparsemem.data import load_questions as load_questions
    from sparsemem.data import load_texts as load_texts
    from sparsemem.errors import SparsememError as SparsememError
    from sparsemem.evaluation.evaluate import Evaluation as Evaluation
    from sparsemem.evaluation.evaluate import compare as compare
    from sparsemem.evaluation.evaluate import evaluate as evaluate
    from sparsemem.evaluation.generate import answer_questions as answer_questions
    from sparsemem.evaluation.probes import Probe as Probe
    from sparsemem.evaluation.probes import load_probes as load_probes
    from sparsemem.evaluation.result_cache import ResultCache as ResultCache
    from sparsemem.memory.attach import attach_memory as attach_memory
    from sparsemem.memory.attach import detach_memory as detach_memory
    from sparsemem.memory.attach import memory_layers as memory_layers
    from sparsemem.memory.attach import pools as pools
    from sparsemem.memory.base_model import load_base_model as load_base_model
    from sparsemem.memory.checkpoint import save as save
    from sparsemem.memory.delta import SparseDelta as SparseDelta
    from sparsemem.memory.fit_keys import fit_keys as fit_keys
    from sparsemem.memory.grow import grow_memory as grow_memory
    from sparsemem.memory.shard import shard as shard
    from sparsemem.slots.usage import Usage as Usage
    from sparsemem.slots.usage import count_usage as count_usage
    from sparsemem.slots.usage import load_usage as load_usage
    from sparsemem.slots.usage import save_usage as save_usage
    from sparsemem.store.history import DeltaStore as DeltaStore
    from sparsemem.store.load import load as load
    from sparsemem.store.load import overlaid as overlaid
    from sparsemem.training.finetune import FinetuneResult as FinetuneResult
    from sparsemem.training.finetune import finetune as finetune

__version__ = "0.1.0"

_HOMES = {
    "sparsemem.config": ("FinetuneConfig", "MemoryConfig"),
    "sparsemem.data": ("Fact", "Question", "load_facts", "load_questions", "load_texts"),
    "sparsemem.errors": ("SparsememError",),
    "sparsemem.evaluation.evaluate": ("Evaluation", "compare", "evaluate"),
    "sparsemem.evaluation.generate": ("answer_questions",),
    "sparsemem.evaluation.probes": ("Probe", "load_probes"),
    "sparsemem.evaluation.result_cache": ("ResultCache",),
    "sparsemem.memory.attach": ("attach_memory", "detach_memory", "memory_layers", "pools"),
    "sparsemem.memory.base_model": ("load_base_model",),
    "sparsemem.memory.checkpoint": ("save",),
    "sparsemem.memory.delta": ("SparseDelta",),
    "sparsemem.memory.fit_keys": ("fit_keys",),
    "sparsemem.memory.grow": ("grow_memory",),
    "sparsemem.memory.shard": ("shard",),
    "sparsemem.slots.usage": ("Usage", "count_usage", "load_usage", "save_usage"),
    "sparsemem.store.history": ("DeltaStore",),
    "sparsemem.store.load": ("load", "overlaid"),
    "sparsemem.training.finetune": ("FinetuneResult", "finetune"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'sparsemem' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
