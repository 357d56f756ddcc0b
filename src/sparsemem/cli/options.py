"""Command-line options from config dataclasses, so that each is described in one place."""

import argparse
import dataclasses
import types
from collections.abc import Collection
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from sparsemem.config import LoadConfig, field_docs
from sparsemem.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def add_command(commands: Any, name: str, summary: str, example: str, run: Any) -> argparse.ArgumentParser:
    """Add a command with an example in its help, and `--json`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(run=run)
    return parser


def add_folder_command(
    commands: Any, name: str, summary: str, example: str, run: Any
) -> argparse.ArgumentParser:
    """Add a command whose first argument is a memory folder."""
    parser = add_command(commands, name, summary, example, run)
    parser.add_argument("folder", metavar="DIR", help="folder made by attach")
    return parser


def add_loading(parser: argparse.ArgumentParser, title: str = "model") -> None:
    """Add `--device` and `--dtype`."""
    add_config_options(parser, LoadConfig, title)


def add_config_options(
    parser: argparse.ArgumentParser, cls: type, title: str, *, leave_out: Collection[str] = ()
) -> None:
    """Add one option per field of a config dataclass; its help is the text under the field."""
    group = parser.add_argument_group(title)
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        default = "" if field.default in (None, dataclasses.MISSING) else f" (default: {field.default})"
        options: dict[str, Any] = {"help": (docs[field.name] + default).replace("%", "%%")}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is Literal:
            # Checked by the config, whose message says what to do instead.
            options["metavar"] = "{" + ",".join(get_args(field.type)) + "}"
        else:
            options.update(_value_options(field))
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, **options)


def config_from(args: argparse.Namespace, cls: type[ConfigT]) -> ConfigT:
    """Build a config from the options that were given; the others keep their defaults."""
    given = vars(args)
    values = {f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}  # type: ignore[arg-type]
    if isinstance(values.get("peft"), list):
        values["peft"] = dict(_key_value(item) for item in values["peft"])
    if isinstance(values.get("layers"), list):
        values["layers"] = _layers(values["layers"])
    return cls(**values)


def _value_options(field: "dataclasses.Field[Any]") -> dict[str, Any]:
    if field.name == "layers":
        return {"nargs": "+", "metavar": "N"}
    if field.name == "peft":
        return {"nargs": "+", "metavar": "KEY=VALUE"}
    kinds = [field.type]
    if isinstance(field.type, types.UnionType) or get_origin(field.type) is Union:
        kinds = [kind for kind in get_args(field.type) if kind is not type(None)]
    kind = kinds[0]
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}  # type: ignore[arg-type]


def _layers(words: list[str]) -> Any:
    if words == ["auto"]:
        return "auto"
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise ConfigError(f"layers {' '.join(words)!r} are not block numbers; write --layers 4 6") from None


def _key_value(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"peft option {item!r} has no value; write it as r=32")
    for kind in (int, float):
        try:
            return key, kind(text)
        except ValueError:
            continue
    return key, {"true": True, "false": False}.get(text.lower(), text)
