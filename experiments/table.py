"""Show the results of an experiment: its table, and its plot as experiments/NAME/pareto.png.

python experiments/table.py NAME
python experiments/table.py NAME --readme       # also between <!-- NAME:begin --> and <!-- NAME:end -->,
                                                # in its own README.md or in that of the project
python experiments/table.py NAME --beside DIR   # the results in DIR, and those of NAME; no plot

Where NAME has folders of experiments in it, as `ablations` has, all their results are in one table, without
a plot. Each method is shown at its best setting, chosen by held-out F1 among these runs, or among those of
the experiment that default.yaml names as `development`. The others' learning is compared with that of the
first, or of the one that it names as `reference`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from run import experiments, read_default

from sparsemem import console
from sparsemem.errors import ConfigError, MissingDependencyError
from sparsemem.study.figures import pareto
from sparsemem.study.results import load_results, method_of
from sparsemem.study.table import comparison, paired, with_block

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Show the results of an experiment.")
    parser.add_argument("name", metavar="NAME", help="folder in experiments/")
    parser.add_argument(
        "--probe", metavar="NAME", help="what the plot shows forgetting of (default: the first)"
    )
    parser.add_argument("--beside", type=Path, metavar="DIR", help="folder of results to compare with these")
    parser.add_argument(
        "--readme", action="store_true", help="write the table into the README.md with its place"
    )
    args = parser.parse_args(argv)
    return console.exit_code(lambda: show(args))


def show(args: argparse.Namespace) -> None:
    if args.beside:
        print(f"{args.beside}:\n\n{comparison(load_results(args.beside)).markdown()}\n{args.name}:\n")
        print(render(args.name), end="")
        return
    print(render(args.name), end="")
    if args.readme:
        path = readme_of(args.name)
        path.write_text(with_table(path.read_text(encoding="utf-8"), args.name), encoding="utf-8")
    if experiments(HERE / args.name) == [HERE / args.name]:
        plot(args.name, args.probe)


def plot(name: str, probe: str | None) -> None:
    try:
        pareto(load_results(HERE / name / "results"), HERE / name / "pareto.png", probe=probe)
    except (ConfigError, MissingDependencyError) as error:
        if probe:  # asked for
            raise
        console.say(f"no plot: {error}")


def readme_of(name: str) -> Path:
    own = HERE / name / "README.md"
    has_place = own.is_file() and f"<!-- {name}:begin -->" in own.read_text(encoding="utf-8")
    return own if has_place else README


def with_table(readme: str, name: str) -> str:
    """Return the README with the table of an experiment made anew."""
    return with_block(readme, name, render(name))


def results_of(name: str) -> dict[str, dict[str, Any]]:
    """Read the results of an experiment, or of all in its folder as FOLDER/RUN.

    Raises:
        MissingFileError: There is none.
    """
    group = HERE / name
    folders = [folder for folder in experiments(group) if folder == group or (folder / "results").is_dir()]
    return {
        (folder.relative_to(group) / run).as_posix(): result
        for folder in folders or [group]
        for run, result in load_results(folder / "results").items()
    }


def render(name: str) -> str:
    default = read_default(HERE / name)
    development, reference = default.get("development"), default.get("reference")
    results = dict(sorted(results_of(name).items(), key=lambda run: method_of(run[0]) != reference))
    chosen_by = load_results(HERE / development / "results") if development else None
    return f"{comparison(results, chosen_by).markdown()}\n{paired(results, chosen_by).markdown()}"


if __name__ == "__main__":
    sys.exit(main())
