"""Attach a memory to a model and keep it in a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemem import console, distributed
from sparsemem.config import LoadConfig, MemoryConfig
from sparsemem.data import load_texts
from sparsemem.files import check_new, new_folder
from sparsemem.memory.attach import attach_memory, memory_layers
from sparsemem.memory.base_model import load_base_model
from sparsemem.memory.checkpoint import save
from sparsemem.memory.fit_keys import KeyFit, fit_keys
from sparsemem.slots.usage import USAGE_FILE, Usage, count_usage, save_usage


def attach_to_folder(
    model_name: str,
    background: Sequence[str],
    out: str | Path,
    config: MemoryConfig | None = None,
    *,
    keys: KeyFit = "k_means",
    num_tokens: int = 100_000,
    num_documents: int = 1000,
    prompt_formats: bool = True,
    loading: LoadConfig | None = None,
) -> dict[str, Any]:
    """Insert a memory, fit its keys, count background usage, and write all of it to a new folder.

    Args:
        model_name: Hub id, local folder or GGUF file.
        background: Sources of ordinary text: files or Hub data sets.
        out: The folder to make.
        config: Shape and place of the memory.
        keys: How keys are fitted.
        num_tokens: Tokens to fit them on.
        num_documents: Documents to count usage over.
        prompt_formats: Put two thirds of the text into this product's own prompts.
        loading: Device and precision of the model.

    Returns:
        What was made, as plain JSON values.

    Raises:
        SparsememError: Something given is not usable; nothing was written.
    """
    config, out = config or MemoryConfig(), Path(out)
    check_new(out)
    texts = [text for source in background for text in load_texts(source)]
    with console.progress(f"load {model_name}"):
        options = (loading or LoadConfig()).options()
        model, tokenizer = distributed.main_first(lambda: load_base_model(model_name, **options))
        attach_memory(model, config)
    with console.progress(f"fit keys ({keys})") as step:
        if distributed.is_main():
            fit_keys(
                model,
                tokenizer,
                texts,
                keys,
                num_tokens=num_tokens,
                prompt_formats=prompt_formats,
                on_step=step,
            )
        for layer in memory_layers(model):
            distributed.copy_from_main([*layer.parameters(), *layer.buffers()])
    with console.progress("count background usage") as step:
        usage = count_usage(
            model, tokenizer, texts, num_documents=num_documents, prompt_formats=prompt_formats, on_step=step
        )
    distributed.from_main(lambda: _write(model, usage, out))
    return {
        "folder": str(out),
        "base_model": model_name,
        "layers": [layer.block_index for layer in memory_layers(model)],
        "num_slots": config.num_slots,
        "num_documents": usage.num_documents,
        "num_tokens": usage.num_tokens,
    }


def _write(model: Any, usage: Usage, out: Path) -> None:
    with new_folder(out) as folder:
        save(model, folder)
        save_usage(usage, folder / USAGE_FILE)
