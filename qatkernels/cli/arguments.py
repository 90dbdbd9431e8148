"""Turns a dataclass of settings (`qatkernels.options`) into command-line options, and parsed options into settings."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any, NoReturn, TypeVar

from ..options import Setting, flag, nearest, plain_type, settings_of

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser that leaves out options that were not given, and whose errors suggest the nearest option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            **{"formatter_class": argparse.RawDescriptionHelpFormatter, "argument_default": argparse.SUPPRESS, **kwargs}
        )

    def unknown(self, arguments: list[str]) -> NoReturn:
        """Exit with an error about arguments that no option takes."""
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        first = arguments[0]
        hint = nearest(first[2:].partition("=")[0], known, flag) if first.startswith("--") else ""
        self.error(f"unrecognized arguments: {' '.join(arguments)}{hint}")


def add_options(parser: argparse.ArgumentParser, cls: type, *, title: str | None = None) -> None:
    """Add an option, or a positional argument, for each setting of a dataclass. Each table is a group in the help.

    Args:
        parser: parser of the command.
        cls: the dataclass.
        title: title of the group for settings that are in no table; the parser's default group if None.
    """
    groups: dict[str, Any] = {}
    for name, setting in settings_of(cls).items():
        has_group = setting.holder is not None or title is not None
        heading = setting.table if setting.holder is not None else title
        if has_group and heading not in groups:
            groups[str(heading)] = parser.add_argument_group(heading)
        _add(groups[str(heading)] if has_group else parser, name, setting)


def _add(group: Any, name: str, setting: Setting) -> None:
    """Add the option, or positional argument, of one setting to a parser or a group of one."""
    metadata, default, kind = setting.field.metadata, setting.field.default, plain_type(setting.hint)
    takes_several = typing.get_origin(setting.hint) is tuple
    default_text = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = metadata["help"]
    if default is not MISSING and default is not None and default is not False and default != ():
        text += f" (default: {default_text})"
    text = text.replace("%", "%%")
    if kind is bool:
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
        return
    parse: Callable[[str], Any] = metadata["parse"] or kind
    metavar = metadata["metavar"] or {int: "N", float: "X"}.get(kind, name.upper())
    if metadata["positional"]:
        nargs = {"nargs": "+"} if takes_several else {} if default is MISSING else {"nargs": "?"}
        group.add_argument(name, type=parse, metavar=metavar, help=text, **nargs)
        return
    nargs_of_option = "+" if takes_several else None
    group.add_argument(
        flag(name), type=parse, nargs=nargs_of_option, metavar=metavar, help=text, required=default is MISSING
    )


def settings_in(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the settings that were given on the command line, by name."""
    given = {name: value for name, value in vars(args).items() if name in settings_of(cls)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def from_arguments(args: argparse.Namespace, cls: type[T]) -> T:
    """Return the dataclass with the settings that were given on the command line.

    Raises:
        ConfigError: if a value is not allowed.
    """
    return cls(**settings_in(args, cls))
