"""From a dataclass of settings (`qatkernels.options`) to options of a command line, and back."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any, NoReturn, TypeVar

from ..options import Setting, flag, nearest, plain_type, settings_of

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose options without a default are left out, and whose errors say the nearest option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            **{"formatter_class": argparse.RawDescriptionHelpFormatter, "argument_default": argparse.SUPPRESS, **kwargs}
        )

    def unknown(self, arguments: list[str]) -> NoReturn:
        """End with an error about arguments that no option takes."""
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        first = arguments[0]
        hint = nearest(first[2:].partition("=")[0], known, flag) if first.startswith("--") else ""
        self.error(f"unrecognized arguments: {' '.join(arguments)}{hint}")


def add_options(parser: argparse.ArgumentParser, cls: type, *, title: str | None = None) -> None:
    """Add an option, or a positional argument, for each setting of a dataclass; each table is a group of the help.

    Args:
        parser: of the command.
        cls: the dataclass.
        title: of the group of settings that are in no table; the parser's own group if None.
    """
    groups: dict[str, Any] = {}
    for name, setting in settings_of(cls).items():
        inside = setting.holder is not None or title is not None
        heading = setting.table if setting.holder is not None else title
        if inside and heading not in groups:
            groups[str(heading)] = parser.add_argument_group(heading)
        _add(groups[str(heading)] if inside else parser, name, setting)


def _add(group: Any, name: str, setting: Setting) -> None:
    about, default, kind = setting.field.metadata, setting.field.default, plain_type(setting.hint)
    several = typing.get_origin(setting.hint) is tuple
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = about["help"]
    if default is not MISSING and default is not None and default is not False and default != ():
        text += f" (default: {shown})"
    text = text.replace("%", "%%")
    if kind is bool:
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
        return
    parse: Callable[[str], Any] = about["parse"] or kind
    metavar = about["metavar"] or {int: "N", float: "X"}.get(kind, name.upper())
    if about["positional"]:
        count = {"nargs": "+"} if several else {} if default is MISSING else {"nargs": "?"}
        group.add_argument(name, type=parse, metavar=metavar, help=text, **count)
        return
    group.add_argument(
        flag(name), type=parse, nargs="+" if several else None, metavar=metavar, help=text, required=default is MISSING
    )


def settings_in(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the settings of a dataclass that a command line gave, by name."""
    given = {name: value for name, value in vars(args).items() if name in settings_of(cls)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def made(args: argparse.Namespace, cls: type[T]) -> T:
    """Return the dataclass that a command line asks for.

    Raises:
        ConfigError: if a value cannot be used.
    """
    return cls(**settings_in(args, cls))
