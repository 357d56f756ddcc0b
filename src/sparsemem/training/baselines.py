"""The baselines: all weights of the base model, or an adapter of any PEFT type, in the same loop."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sparsemem import distributed
from sparsemem.config import FinetuneConfig
from sparsemem.errors import ConfigError, MissingDependencyError
from sparsemem.memory.attach import memory_layers, unwrapped
from sparsemem.memory.delta import SparseDelta
from sparsemem.memory.layer import MemoryLayer
from sparsemem.training.examples import Batch, Example, FactBatch, whole
from sparsemem.training.prefix import Forward


class DenseWeights:
    """Baselines: all weights of the base model, or an adapter of any PEFT type.

    Args:
        model: The model; a memory in it stays as it is.
        config: Options; `method` is "full" or a PEFT type.
    """

    def __init__(self, model: nn.Module, config: FinetuneConfig) -> None:
        memory = {id(p) for layer in memory_layers(model) for p in layer.parameters()}
        if config.method == "full":
            dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
            if dtypes:
                raise ConfigError(
                    f"method='full' needs weights in float32, and these are {dtypes.pop()}, in which small "
                    "steps round to nothing; load the model in float32, and use mixed_precision='bf16'"
                )
            self.model = model
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) not in memory)
        else:
            self.model = _with_adapter(model, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.train()
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        options: dict[str, Any] = {"adamw": {"betas": config.betas}, "sgd": {"momentum": config.momentum}}
        self.optimizer: torch.optim.Optimizer = kinds[config.optimizer](
            self.trained, lr=config.lr, weight_decay=config.weight_decay, **options[config.optimizer]
        )
        self.optimizer.register_step_pre_hook(lambda *_: _sum_gradients(self.trained))

    def prepare(self, batches: Iterable[FactBatch]) -> None:
        """Nothing to see."""

    def step(self, batch: FactBatch, parts: Sequence[Batch]) -> contextlib.AbstractContextManager[None]:
        """Nothing to choose."""
        return contextlib.nullcontext()

    def part(self, batch: Batch, _forward: Forward) -> contextlib.AbstractContextManager[Batch]:
        """Everything can change."""
        return contextlib.nullcontext(batch)

    def num_run(self, example: Example) -> int:
        """All its tokens."""
        return whole(example)

    def finish(self) -> None:
        """End the training; the model holds what was learned."""

    def close(self) -> None:
        """Go back to evaluation."""
        self.model.eval()

    def abort(self) -> None:
        """The caller discards the model: a baseline keeps no second copy of all weights."""

    def num_trainable(self, _delta: SparseDelta | None) -> int:
        """Numbers that could change."""
        return sum(parameter.numel() for parameter in self.trained)


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over processes, of which one may have had nothing to run."""
    if distributed.world_size() == 1:
        return
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters]).int()
    for parameter, number in zip(parameters, distributed.summed(has_gradient).tolist(), strict=True):
        if number:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = distributed.summed(own)


def check_method(name: str) -> None:
    """Check the name of a method.

    Raises:
        ConfigError: There is none of that name.
        MissingDependencyError: It is a PEFT type, and peft is not installed.
    """
    if name not in ("memory", "full"):
        _peft_config_class(name)


def _peft_config_class(name: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(f"method={name!r} needs peft; pip install 'sparsemem[peft]'") from error
    types = {kind.value.lower(): kind for kind in peft.PeftType}
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(types.get(name))
    if config_class is None:
        raise ConfigError(
            f"method={name!r} is unknown; use memory, full or a PEFT type such as lora, ia3, oft"
        )
    return config_class


def _with_adapter(model: nn.Module, config: FinetuneConfig) -> nn.Module:
    config_class = _peft_config_class(config.method)
    import peft

    if isinstance(model, peft.PeftModel):
        # One adapter carried on: what a second update of a baseline trains.
        model.set_adapter(model.active_adapter)
        return model  # type: ignore[no-any-return]
    options = dict(config.peft)
    if config.method == "lora":
        options = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear", **options}
    memory_names = [n for n, m in unwrapped(model).named_modules() if isinstance(m, MemoryLayer)]
    if memory_names:
        options.setdefault("exclude_modules", rf"(.*\.)?({'|'.join(memory_names)})\..*")
    try:
        adapter = config_class(task_type="CAUSAL_LM", **options)
        return peft.get_peft_model(model, adapter)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"PEFT refused method={config.method!r} with {options}: {error}") from error
