"""A YAML file, then flags that override it, into dataclasses; and which options the user set."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints, overload

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..config import DPOConfig
from ..registry import did_you_mean
from .arguments import ModelArguments, ScriptArguments, check_together
from .values import fit

NOT_GIVEN = object()
DPO, TRAINING = "DPO", "training (transformers.TrainingArguments)"
T = TypeVar("T")
C = TypeVar("C", bound=DPOConfig)


@overload
def parse_args(
    argv: Sequence[str] | None = None,
) -> tuple[ScriptArguments, ModelArguments, DPOConfig, set[str]]: ...
@overload
def parse_args(
    argv: Sequence[str] | None, config_kind: type[C]
) -> tuple[ScriptArguments, ModelArguments, C, set[str]]: ...
def parse_args(
    argv: Sequence[str] | None = None, config_kind: type[Any] = DPOConfig
) -> tuple[ScriptArguments, ModelArguments, Any, set[str]]:
    """The arguments of a script, and the names of those that the user set in the file or by a flag.

    `argv` is `[config.yaml] [--config config.yaml] [--flag value ...]`, that of the process when None. Flags override the
    file. An unknown name, in either, is an error. `config_kind`: which trainer's options.
    """
    kinds = (ScriptArguments, ModelArguments, config_kind)
    known = _known_options(kinds)
    flags, file = _parse_flags(sys.argv[1:] if argv is None else list(argv), OptionParser(kinds), known)
    values = (_read_file(file, known) if file else {}) | flags
    _check_json(values, known)
    script, model = _build(ScriptArguments, values), _build(ModelArguments, values)
    config = _build(config_kind, values)
    given = set(values)
    check_together(script, model, config, given)
    return script, model, config, given


def _build(kind: type[T], values: dict[str, Any]) -> T:
    return kind(**{name: value for name, value in values.items() if name in get_type_hints(kind)})


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` that shows DPO's own options apart from the Trainer's in --help."""

    def __init__(self, kinds: Sequence[type]):
        self.sections: dict[str, Any] = {}
        self.options = {option.name for option in fields(kinds[-1])}
        ours = [kind for kind in kinds[-1].__mro__ if kind not in TrainingArguments.__mro__]
        own = {name for kind in ours for name in kind.__annotations__}
        self.own = own  # the others are the Trainer's
        super().__init__(
            kinds,
            allow_abbrev=False,
            usage="%(prog)s [config.yaml] [--option value ...]",
            description="Train on preferences with DPO. Flags override the file.",
        )
        self.add_argument("file", nargs="?", metavar="config.yaml", help="A YAML file of options, by name.")
        self.add_argument("--config", metavar="config.yaml", help="The same as a flag.")

    def add_argument(self, *names, **kwargs):
        """Called for the options of the config, which names no section of its own, unlike the other two."""
        option = names[0].lstrip("-").removeprefix("no_")
        if option not in self.options:
            return super().add_argument(*names, **kwargs)
        if kwargs.get("type") is string_to_bool:  # so that `--flag` means `--flag true` for `bool | None` too
            kwargs |= {"nargs": "?", "const": True}
        if get_origin(kwargs.get("type")) is dict:
            kwargs["type"] = json.loads
        self.sections = self.sections or {title: self.add_argument_group(title) for title in (DPO, TRAINING)}
        title = DPO if option in self.own else TRAINING
        return self.sections[title].add_argument(*names, **kwargs)


def _parse_flags(argv: list[str], parser: OptionParser, names: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """{option: value} of the flags alone, and the file that is named among them."""
    # argparse leaves an attribute that is there already alone, unless its flag is on the command line.
    parsed, unknown = parser.parse_known_args(argv, Namespace(**dict.fromkeys(names, NOT_GIVEN)))
    for word in unknown:
        name = word.split("=")[0]
        known = [f"--{option}" for option in names]
        raise ValueError(
            f"Unknown argument {name!r}.{did_you_mean(name.replace('-', '_').replace('__', '--', 1), known)}"
        )
    if parsed.file and parsed.config:
        raise ValueError(f"Two files of options, {parsed.file!r} and --config {parsed.config!r}: give one.")
    return {
        name: value for name in names if (value := getattr(parsed, name)) is not NOT_GIVEN
    }, parsed.file or parsed.config


def _known_options(kinds: Sequence[type]) -> dict[str, Any]:
    """{option: type hint} over all kinds of arguments."""
    return {
        option.name: hints[option.name]
        for kind in kinds
        if (hints := get_type_hints(kind))
        for option in fields(kind)
        if option.init
    }


def _read_file(file: str, known: dict[str, Any]) -> dict[str, Any]:
    """{option: value} of a YAML file, every value fitted to the type of its option."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no file of options {file!r}. Options start with --, a file is YAML.")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(read or {}, dict):
        raise ValueError(f"{file} must hold `option: value` lines, got a {type(read).__name__}.")
    values = {}
    for name, value in (read or {}).items():
        if name not in known:
            raise ValueError(f"{file}: unknown option {name!r}.{did_you_mean(str(name), known)}")
        try:
            values[name] = fit(value, known[name])
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}.") from error
    return values


def _check_json(values: dict[str, Any], known: dict[str, Any]) -> None:
    """Options that are mappings come as JSON from the command line."""
    for name, hint in known.items():
        takes_mapping = any((get_origin(kind) or kind) is dict for kind in get_args(hint))
        value = values.get(name)
        if takes_mapping and isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"--{name} {value!r} is not valid JSON: {error}.") from error
