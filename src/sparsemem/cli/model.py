"""attach, ask, evaluate."""

import argparse
from typing import Any

from sparsemem import console
from sparsemem.cli.options import (
    add_command,
    add_config_options,
    add_folder_command,
    add_loading,
    config_from,
)
from sparsemem.cli.tables import show_evaluation
from sparsemem.config import LoadConfig, MemoryConfig


def add_attach(commands: Any) -> None:
    """Add `attach`."""
    parser = add_command(
        commands,
        "attach",
        "insert a memory into a model, fit its keys and count background usage",
        "sparsemem attach HuggingFaceTB/SmolLM2-135M-Instruct --background wiki.txt --out smol",
        attach,
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id, local folder or .gguf file")
    add_making(parser)
    parser.add_argument(
        "--keys", default="k_means", metavar="{random,k_means,context_invariant}",
        help="how keys are fitted (default: k_means)",
    )  # fmt: skip
    add_config_options(parser, MemoryConfig, "memory")


def add_making(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that makes a memory folder."""
    parser.add_argument(
        "--background", nargs="+", required=True, metavar="TEXT",
        help="ordinary text: .txt, .jsonl with \"text\", .parquet, or a Hub data set",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--num-tokens", type=int, default=100_000, metavar="N", help="tokens to fit keys on")
    parser.add_argument(
        "--num-documents", type=int, default=1000, metavar="N", help="texts to count usage over"
    )
    add_loading(parser)


def attach(args: argparse.Namespace) -> None:
    """Run `attach`."""
    config = config_from(args, MemoryConfig)
    from sparsemem.study.attach import attach_to_folder

    result = attach_to_folder(
        args.model,
        args.background,
        args.out,
        config,
        keys=args.keys,
        num_tokens=args.num_tokens,
        num_documents=args.num_documents,
        loading=config_from(args, LoadConfig),
    )
    if args.json:
        console.emit_json(result)
    else:
        console.say(
            f"{args.out}: {result['num_slots']:,} slots at block {', '.join(map(str, result['layers']))} of "
            f"{args.model}, usage of {result['num_documents']} texts. "
            f"Teach it with: sparsemem learn {args.out} FACTS.jsonl"
        )


def add_ask(commands: Any) -> None:
    """Add `ask`."""
    parser = add_folder_command(
        commands,
        "ask",
        "ask a question",
        'sparsemem ask smol "Who composed Norway Waltz?" --without last',
        ask,
    )
    parser.add_argument("question", metavar="QUESTION", help="what to ask")
    parser.add_argument(
        "--without",
        metavar="REV",
        help='answer as before that update: its number, "last", or the beginning of its id',
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="where an answer is cut")
    add_prompt(parser)
    add_loading(parser)


def ask(args: argparse.Namespace) -> None:
    """Run `ask`."""
    from sparsemem.study.ask import ask_folder

    answer = ask_folder(
        args.folder,
        args.question,
        without=args.without,
        prompt=args.prompt,
        max_new_tokens=args.max_new_tokens,
        loading=config_from(args, LoadConfig),
    )
    if args.json:
        console.emit_json({"question": args.question, "answer": answer})
    else:
        console.emit(answer)


def add_evaluate(commands: Any) -> None:
    """Add `evaluate`."""
    parser = add_folder_command(
        commands,
        "evaluate",
        "measure what a model knows of some facts, and its probes",
        "sparsemem evaluate smol --facts facts.jsonl --probes nq=nq_open.jsonl wiki=wiki.txt",
        evaluate,
    )
    parser.add_argument("--facts", metavar="FACTS", help="facts to ask for")
    add_probes(parser)
    add_prompt(parser)
    add_loading(parser)


def evaluate(args: argparse.Namespace) -> None:
    """Run `evaluate`."""
    from sparsemem.study.learn import evaluate_folder

    result = evaluate_folder(
        args.folder,
        facts=args.facts,
        probes=args.probes,
        prompt=args.prompt,
        loading=config_from(args, LoadConfig),
    )
    if args.json:
        console.emit_json(result)
    else:
        show_evaluation(result)


def add_probes(parser: argparse.ArgumentParser) -> None:
    """Add `--probes`."""
    parser.add_argument(
        "--probes", nargs="*", metavar="NAME=PATH",
        help="what must not be forgotten: {question, answers}, {question, choices, answer}, .txt or {text}; "
        "by default 160 built-in questions, none if left empty",
    )  # fmt: skip


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add `--prompt`."""
    parser.add_argument(
        "--prompt", default="qa", metavar="{qa,chat}",
        help="ask after five answered examples, or in the model's chat template (default: qa)",
    )  # fmt: skip
