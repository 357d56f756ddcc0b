"""Short answers to many questions, greedily, the same whatever order they come in."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sparsemem.encode import pad
from sparsemem.evaluation.result_cache import ResultCache
from sparsemem.prompts import SHOTS, PromptFormat, chat_prompt, check_format, qa_examples, qa_question


@torch.no_grad()
def answer_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    prompt: PromptFormat = "qa",
    max_new_tokens: int = 16,
    batch_size: int = 32,
    results: ResultCache | None = None,
) -> list[str]:
    """Answer questions closed-book.

    Batches are made in an order of their own (by length, then text), so that a question gets the
    same neighbours, the same padding and thus the same answer whatever the order of the list.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        questions: What to ask.
        prompt: "qa" asks after five answered examples, "chat" in the model's chat template.
        max_new_tokens: Where an answer is cut.
        batch_size: Questions at a time.
        results: Batches that ran before; see `ResultCache`.

    Returns:
        First line of each answer.

    Raises:
        ConfigError: `prompt` is unknown, or "chat" and the tokenizer has no chat template.
    """
    check_format(prompt)
    distinct = list(dict.fromkeys(questions))
    if prompt == "qa":
        prefix = tokenizer(qa_examples(SHOTS))["input_ids"]
        encoded = {q: tokenizer(qa_question(q), add_special_tokens=False)["input_ids"] for q in distinct}
    else:
        prefix = []
        texts = {q: chat_prompt(tokenizer, q) for q in distinct}
        encoded = {q: tokenizer(t, add_special_tokens=False)["input_ids"] for q, t in texts.items()}
    order = sorted(distinct, key=lambda question: (len(encoded[question]), question))
    was_training = model.training
    model.eval()
    shared = ("prefix", *prefix)
    read_prefix = functools.partial(_prefix_cache, model, prefix)
    cache = results.watch(model, shared, read_prefix) if results else read_prefix()
    answers: dict[str, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        asked = tuple(tuple(encoded[q]) for q in batch)
        run = functools.partial(_generate, model, tokenizer, prefix, cache, asked, max_new_tokens)
        new_ids = results.get(model, (shared, asked, max_new_tokens), run, shared) if results else run()
        for question, text in zip(
            batch, tokenizer.batch_decode(new_ids, skip_special_tokens=True), strict=True
        ):
            lines = text.strip().splitlines()
            answers[question] = lines[0].strip() if lines else ""
    model.train(was_training)
    return [answers[question] for question in questions]


def _prefix_cache(model: nn.Module, prefix: list[int]) -> DynamicCache | None:
    """Keys and values of the part that all prompts share, computed once."""
    if not prefix:
        return None
    cache = DynamicCache(config=model.config)
    input_ids = torch.tensor([prefix], device=next(model.parameters()).device)
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _generate(
    model: Any,
    tokenizer: Any,
    prefix: list[int],
    cache: DynamicCache | None,
    questions: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> Tensor:
    device = next(model.parameters()).device
    padded = pad(questions, side="left", value=tokenizer.pad_token_id or 0)
    shared = torch.tensor([prefix] * len(questions), dtype=torch.int64).view(len(questions), -1)
    input_ids = torch.cat([shared, padded["input_ids"]], dim=1).to(device)
    attention_mask = torch.cat([torch.ones_like(shared), padded["attention_mask"]], dim=1).to(device)
    past = None
    if cache is not None:
        past = copy.deepcopy(cache)
        past.batch_repeat_interleave(len(questions))
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    ends = {*newline, tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=past,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    new_ids: Tensor = output[:, input_ids.shape[1] :]
    return new_ids


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
