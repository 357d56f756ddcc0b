"""Parse the command line, run one command, turn errors into exit codes."""

import argparse
import os
import sys
from collections.abc import Sequence

import sparsemem
from sparsemem import console
from sparsemem.cli import compare, demo, explain, grow, history, learn, model, plan, report, stream
from sparsemem.errors import ConfigError

COMMANDS = (
    model.add_attach,
    learn.add_learn,
    model.add_ask,
    model.add_evaluate,
    stream.add_stream,
    history.add_history,
    explain.add_explain,
    plan.add_plan,
    grow.add_grow,
    report.add_report,
    compare.add_compare,
    demo.add_demo,
)


IN_SEVERAL_PROCESSES = (model.attach, learn.learn)
"""What torchrun and `accelerate launch` speed up."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; imports no torch."""
    parser = argparse.ArgumentParser(
        prog="sparsemem",
        description="Let a language model keep learning, without forgetting.",
        epilog="Begin with: sparsemem demo. Help of a command: sparsemem COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"sparsemem {sparsemem.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for a user's mistake, 1 for a run that failed, 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    return console.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int | None:
    """Run a command, together with the other processes if a launcher started several.

    Raises:
        ConfigError: The command is for one process.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1:
        return args.run(args)  # type: ignore[no-any-return]
    from sparsemem.distributed import processes

    with processes():
        if args.run not in IN_SEVERAL_PROCESSES:
            raise ConfigError(f"this command is for one process, not {num_processes}; leave out the launcher")
        return args.run(args)  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
