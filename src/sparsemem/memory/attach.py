"""Put memory layers into a Hugging Face causal LM, in place, and take them out again."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsemem import distributed
from sparsemem.config import MemoryConfig
from sparsemem.errors import ConfigError, LayerNotFoundError, NotAttachedError, UnknownArchitectureError
from sparsemem.memory.hooks import Before, Beside
from sparsemem.memory.layer import BeforeRead, MemoryLayer, Reads, init_memory
from sparsemem.memory.pool import Pool

FFN_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1..fc2")
"""What families call the feed-forward network of a block; OPT has two bare linear layers."""

RELATED_DEPTH, ADDED_DEPTH = 0.78, 0.67
"""Where a memory answers: of 30 blocks, at 23 the state before an answer tells what is asked, and of whom, in
wordings never seen; a row that answers anything is learned best when it is added in block 20."""

AUTO_DEPTH = 0.13
"""Where `layers="auto"` puts the memory: block 4 of 30 learned most in held-out wordings, and at block 10
hardly more than half of that is left (experiments/ablations)."""


def attach_memory(
    model: Any, config: MemoryConfig | None = None, bases: dict[str, Tensor] | None = None
) -> Any:
    """Add memory layers to a causal LM, in place.

    The model stays what it was, a Hugging Face model: `generate`, `Trainer` and peft go on working,
    and with `placement="add"` its logits are the same until something is learned.

    Args:
        model: A decoder-only Hugging Face model.
        config: Shape and place of the memory.
        bases: Read-only values behind a pool, by pool name ("layer_4", or "shared"); zeros otherwise.

    Returns:
        The same model. `memory_layers(model)` and `pools(model)` give the parts.

    Raises:
        NotAttachedError: The model has a memory already.
        UnknownArchitectureError: Its blocks or feed-forward network could not be found.
        LayerNotFoundError: `config.layers` lies outside the model.
        ConfigError: The widths do not fit the placement.
    """
    config = config or MemoryConfig()
    check_detached(model)
    blocks = find_blocks(model, config.blocks)
    indices = _block_indices(config, len(blocks))
    hidden_size = model.config.get_text_config().hidden_size
    value_dim = config.value_dim or hidden_size
    if config.placement == "add" and value_dim != hidden_size:
        raise ConfigError(
            f"value_dim={value_dim}, but rows are added to a stream of width {hidden_size}; "
            "leave value_dim out or use placement='replace'"
        )
    relation_dim = _relation_dim(config, hidden_size, len(blocks) - 1 - indices[-1], bases or {})
    spots = {index: find_ffn(blocks[index], config.ffn) for index in indices}
    outputs = {index: _output_index(config, relation_dim, index, len(blocks)) for index in indices}
    if config.placement == "replace":
        for path, ends in spots.values():
            _check_replaceable(path, *ends)
    layers = _build_layers(config, outputs, hidden_size, value_dim, relation_dim, bases or {})
    for index, (path, (first, last)) in spots.items():
        layer = layers[index].to(next(first.parameters()).device)
        if config.placement == "add":
            blocks[index].memory = layer
            if relation_dim:
                layer.beside = Before(layer, first, blocks[layer.output_index - 1 :][:2])
            else:
                _, (_, last) = find_ffn(blocks[layer.output_index], config.ffn)
                layer.beside = Beside(layer, first, last)
        else:
            # In a list, so that the network neither trains nor shows up in the state dict.
            layer.replaced = [first]
            _set_submodule(blocks[index], path, layer)
    unwrapped(model).memory_config = config
    return model


def detach_memory(model: nn.Module) -> nn.Module:
    """Take the memory out again, in place: the model is what it was before `attach_memory`.

    Raises:
        NotAttachedError: The model has no memory.
    """
    config = memory_config(model)
    blocks = find_blocks(model, config.blocks)
    for layer in list(memory_layers(model)):
        block = blocks[layer.block_index]
        if layer.beside is not None:
            layer.beside.remove()
            del block.memory
        else:
            path = next(name for name, module in block.named_modules() if module is layer)
            _set_submodule(block, path, layer.replaced[0])
    del unwrapped(model).memory_config
    return model


def memory_layers(model: nn.Module) -> Iterator[MemoryLayer]:
    """Yield the memory layers of a model, lowest first."""
    return (module for module in model.modules() if isinstance(module, MemoryLayer))


def check_detached(model: nn.Module) -> None:
    """Raise NotAttachedError if the model has a memory."""
    if any(True for _ in memory_layers(model)):
        raise NotAttachedError("the model has a memory already; detach_memory(model) first")


def pools(model: nn.Module) -> dict[str, Pool]:
    """Return the pools of a model by name, lowest layer first; shared ones once.

    Raises:
        NotAttachedError: The model has no memory.
    """
    found = {layer.pool_name: layer.pool for layer in memory_layers(model)}
    if not found:
        raise NotAttachedError("the model has no memory; attach_memory(model) first")
    return found


def memory_config(model: nn.Module) -> MemoryConfig:
    """Return the config the memory was attached with.

    Raises:
        NotAttachedError: The model has no memory.
    """
    config = getattr(unwrapped(model), "memory_config", None)
    if config is None:
        raise NotAttachedError("the model has no memory; attach_memory(model) first")
    assert isinstance(config, MemoryConfig)
    return config


def unwrapped(model: Any) -> Any:
    """Return the Hugging Face model itself where peft or a data-parallel engine has wrapped it."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


@contextlib.contextmanager
def before_read(model: nn.Module, hook: BeforeRead) -> Iterator[None]:
    """Call `hook(layer, reads)` in every memory layer once its reads are known."""
    layers = list(memory_layers(model))
    for layer in layers:
        layer.before_read = hook
    try:
        yield
    finally:
        for layer in layers:
            layer.before_read = None


@torch.no_grad()
def observe_reads(
    model: nn.Module, hook: BeforeRead, through: nn.Module | None = None, /, **inputs: Tensor
) -> None:
    """Run a forward pass that ends at the highest memory layer, calling `hook` in each one.

    For counting and fitting, where nothing above the memory matters: with the memory at block 4 of
    30 this is a sixth of the work. A model that is spread over processes runs to its end, which is
    where it lets go of the weights it gathered.

    Args:
        model: A model with a memory.
        hook: As in `before_read`.
        through: A block above the memory to end behind, rather than at the memory.
        inputs: Arguments of the model.
    """
    last = max(memory_layers(model), key=lambda layer: layer.block_index)
    is_spread = distributed.is_spread(model)

    def stop(*_: Any) -> None:
        if not is_spread:
            raise SeenEnough

    def hook_then_stop(layer: MemoryLayer, reads: Reads) -> None:
        hook(layer, reads)
        if through is None and layer is last:
            stop()

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(SeenEnough))
        stack.enter_context(before_read(model, hook_then_stop))
        if through is not None:
            stack.callback(through.register_forward_hook(stop).remove)
        # The logits are for nothing, so as few as can be.
        model(**inputs, use_cache=False, **({"logits_to_keep": 1} if is_spread else {}))


class SeenEnough(Exception):  # noqa: N818 - not an error
    """Ends a forward pass early, when a hook has what it wanted."""


def find_blocks(model: Any, path: str = "auto") -> nn.ModuleList:
    """Find the list of decoder blocks: the outermost ModuleList with one entry per layer.

    Raises:
        UnknownArchitectureError: There is none or more than one, or `path` leads nowhere.
    """
    if path != "auto":
        try:
            blocks = unwrapped(model).get_submodule(path)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            raise UnknownArchitectureError(
                f"blocks={path!r} is not a list of blocks of {type(model).__name__}; {_choices(model)}"
            )
        return blocks
    depth = model.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not nested:
            found[name] = module
    if len(found) != 1:
        raise UnknownArchitectureError(
            f"{type(model).__name__} has {len(found)} lists of {depth} blocks where one was expected; "
            f"{_choices(model)}"
        )
    return next(iter(found.values()))


def find_ffn(block: nn.Module, path: str = "auto") -> tuple[str, tuple[nn.Module, nn.Module]]:
    """Find the feed-forward network of a block.

    Returns:
        Its path inside the block, and its first and last module (the same one in most families).

    Raises:
        UnknownArchitectureError: There is none, or `path` leads nowhere.
    """
    for candidate in FFN_NAMES if path == "auto" else (path,):
        first, _, last = candidate.partition("..")
        try:
            return candidate, (block.get_submodule(first), block.get_submodule(last or first))
        except AttributeError:
            continue
    children = ", ".join(name for name, _ in block.named_children())
    raise UnknownArchitectureError(
        f"no feed-forward network {'under a known name' if path == 'auto' else repr(path)} in "
        f"{type(block).__name__}; name it with ffn='...' among its parts: {children}"
    )


def _block_indices(config: MemoryConfig, num_blocks: int) -> tuple[int, ...]:
    if config.layers == "auto":
        return (round(AUTO_DEPTH * num_blocks),)
    for index in config.layers:
        if not 0 <= index < num_blocks:
            raise LayerNotFoundError(
                f"layers={config.layers}, but this model has {num_blocks} blocks (0..{num_blocks - 1}); "
                f"pass layers=({num_blocks // 2},) for the middle one"
            )
    return tuple(sorted(config.layers))


def _relation_dim(config: MemoryConfig, hidden_size: int, num_above: int, bases: dict[str, Tensor]) -> int:
    """Return the width of the keys of rows; `num_above` blocks are left to answer in."""
    if config.relation_dim is None:
        return hidden_size if config.can_relate and num_above and not bases else 0
    reasons = {
        "rows of a base table have no names": bool(bases),
        "no block is left above to answer in": not num_above,
        f"the model is {hidden_size} wide": config.relation_dim > hidden_size,
    }
    if config.relation_dim and (reason := next((why for why, holds in reasons.items() if holds), None)):
        raise ConfigError(f"relation_dim={config.relation_dim}, but {reason}; use relation_dim=0")
    return config.relation_dim


def _output_index(config: MemoryConfig, relation_dim: int, index: int, num_blocks: int) -> int:
    """Return the block beside or before which what is read in block `index` is answered."""
    if config.placement == "replace":
        return index
    depth = config.output_depth
    if depth is None:
        depth = RELATED_DEPTH if relation_dim else ADDED_DEPTH
    # What is added to a token in the last block, no token behind it ever sees.
    return max(index + bool(relation_dim), min(int(depth * num_blocks), num_blocks - 2))


def _build_layers(
    config: MemoryConfig,
    outputs: dict[int, int],
    hidden_size: int,
    value_dim: int,
    relation_dim: int,
    bases: dict[str, Tensor],
) -> dict[int, MemoryLayer]:
    """Build the layers of some blocks; `outputs` says for each of these where its answer is added."""
    names = {index: "shared" if config.shared_pool else f"layer_{index}" for index in outputs}
    if unknown := sorted(set(bases) - set(names.values())):
        raise ConfigError(
            f"bases has {unknown[0]!r}, but the pools are {', '.join(sorted(set(names.values())))}; rename it"
        )
    pools = {
        name: Pool(
            config.num_slots,
            value_dim + (1 + relation_dim if relation_dim else 0),
            bases.get(name),
            has_names=bool(relation_dim),
        )
        for name in dict.fromkeys(names.values())
    }
    generator = torch.Generator().manual_seed(config.seed)
    layers = {}
    for index, name in names.items():
        layers[index] = MemoryLayer(
            hidden_size,
            pools[name],
            num_keys=config.num_keys,
            num_heads=config.num_heads,
            top_k=config.top_k,
            query_dim=config.query_dim,
            placement=config.placement,
            quorum=config.quorum,
            block_index=index,
            output_index=outputs[index],
            pool_name=name,
            relation_dim=relation_dim,
        )
        init_memory(layers[index], generator)
    return layers


def _check_replaceable(path: str, first: nn.Module, last: nn.Module) -> None:
    needed = [p for p in inspect.signature(first.forward).parameters.values() if p.default is p.empty]
    if first is not last or len(needed) > 1:
        raise ConfigError(
            f"placement='replace' needs a feed-forward network that is one module and takes the hidden "
            f"state alone; here it is {path} of {type(first).__name__}; use placement='add'"
        )


def _set_submodule(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def _choices(model: nn.Module) -> str:
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return f"name the blocks with blocks='...'; its lists are: {', '.join(lists) or 'none'}"
