"""Settings as frozen dataclasses: each field says what it means, what it may hold, and its default, in one place.

A dataclass whose fields come from :func:`option` is a *table* of settings; it calls :func:`check` when it is made. A
:class:`Settings` also holds whole tables, in fields from :func:`table`. Names are unique over all tables, so a setting
has one name everywhere: a keyword, an option of the command line (``--qat-lr``), a key of ``run.json``, and a key of
TOML, where the tables are the nesting.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeVar


class ConfigError(ValueError):
    """A setting cannot be used; the message names it, its value and what is allowed."""


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may hold: from ``low`` to ``high``, with the ends unless they are open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is inside."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def words(self, whole: bool) -> str:
        """Say what is allowed; ``whole`` is for settings that hold integers."""
        if self.high < math.inf:
            return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        if self.open_low and self.low == 0:
            return "positive and finite"
        return f"at least {self.low:g}" + ("" if whole else " and finite")


AT_LEAST_0, AT_LEAST_1 = Range(0), Range(1)
POSITIVE, SHARE = Range(0, open_low=True), Range(0, 1)


def option(
    default: Any, help: str, within: Range | None = None, *, parse: Callable[[str], Any] | None = None,
    resumable: bool = False, metavar: str | None = None, positional: bool = False,
) -> Any:  # fmt: skip
    """Return a field that is a setting.

    Args:
        default: its default; ``dataclasses.MISSING`` if it has to be given.
        help: what it means, in one line.
        within: the numbers that it may hold.
        parse: makes a value of text; by default what the annotation says.
        resumable: whether a resumed run may change it.
        metavar: how the command line's help calls its value.
        positional: whether the command line takes it without its name.
    """
    metadata = {
        "help": help, "within": within, "parse": parse, "resumable": resumable, "metavar": metavar,
        "positional": positional,
    }  # fmt: skip
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def table(kind: type, name: str | None = None) -> Any:
    """Return a field that holds a table of settings.

    Args:
        kind: its dataclass.
        name: what TOML and the help call the table; the name of the field if None.
    """
    return field(default_factory=kind, metadata={"table": kind, "name": name})


class Setting(NamedTuple):
    """A setting of a configuration.

    Attributes:
        field: of the dataclass that holds it.
        hint: its annotation.
        table: name of its table; that of the configuration itself for a setting that is in none.
        holder: the field of the configuration that holds its table; None if it is in none.
    """

    field: Field[Any]
    hint: Any
    table: str
    holder: str | None


def settings_of(cls: type) -> dict[str, Setting]:
    """Return the settings of a dataclass and of the tables in it, by name, in the order of its fields."""
    found: dict[str, Setting] = {}
    own = getattr(cls, "own_table", "settings")
    hints = typing.get_type_hints(cls)
    for entry in fields(cls):
        if (kind := entry.metadata.get("table")) is not None:
            inner = typing.get_type_hints(kind)
            title = entry.metadata["name"] or entry.name
            for one in fields(kind):
                if "help" in one.metadata:
                    found[one.name] = Setting(one, inner[one.name], title, entry.name)
        elif "help" in entry.metadata:
            found[entry.name] = Setting(entry, hints[entry.name], own, None)
    return found


def flag(name: str) -> str:
    """Return the option of the command line for a setting."""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """Return the end of a message about an unknown name: the known name that is most like it, if there is one."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {show(near[0].replace('_', '-'))}?" if near else ""


def check(settings: Any) -> None:
    """Check the type and the range of each setting of a dataclass itself; its tables check themselves.

    Raises:
        ConfigError: if one cannot hold its value.
    """
    for name, setting in settings_of(type(settings)).items():
        if setting.holder is None:
            value = getattr(settings, name)
            check_type(name, setting, value)
            _check_range(name, setting, value)


def check_type(name: str, setting: Setting, value: Any) -> None:
    """Raise ConfigError if a value is not of a type that a setting may hold. True is no number."""
    kinds = _kinds(setting.hint)
    if not any(kind.right(value) for kind in kinds):
        words = " or ".join(kind.words for kind in kinds if kind.words)
        raise ConfigError(f"{flag(name)} is {value!r}, must be {words}")


def _check_range(name: str, setting: Setting, value: Any) -> None:
    within = setting.field.metadata["within"]
    if within is None or not _is_number(value):
        return
    try:
        size = float(value)
    except OverflowError:  # an integer of hundreds of digits
        size = math.inf
    if not within.holds(value) or math.isinf(size) or math.isnan(size):
        whole = isinstance(value, int) and math.isfinite(size)
        raise ConfigError(f"{flag(name)} is {value}, must be {within.words(whole)}")


class _Kind(NamedTuple):
    """What a value may be: in words, which are empty for None, and as a test."""

    words: str
    right: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[Any, _Kind] = {
    str: _Kind("a string", lambda value: isinstance(value, str)),
    bool: _Kind("true or false", lambda value: isinstance(value, bool)),
    int: _Kind("a whole number", _is_whole),
    float: _Kind("a number", _is_number),
    type(None): _Kind("", lambda value: value is None),
}


def _kinds(hint: Any) -> list[_Kind]:
    """Return what an annotation allows."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for one in inner for kind in _kinds(one)]
    if origin is Literal:
        words = str(inner[0]) if len(inner) == 1 else f"one of {', '.join(map(str, inner))}"
        return [_Kind(words, lambda value: isinstance(value, str) and value in inner)]
    if origin is tuple:
        of = _KINDS[inner[0]]
        words = {"a number": "numbers", "a string": "strings"}[of.words]
        return [_Kind(words, lambda value: isinstance(value, tuple) and all(map(of.right, value)))]
    return [_KINDS[hint]]


def plain_type(hint: Any) -> Any:
    """Return what text is made into for an annotation: int, float, bool or str; of a tuple, what its elements are."""
    inner = [one for one in typing.get_args(hint) if one not in (type(None), ...)]
    if typing.get_origin(hint) is Literal:
        return str
    return plain_type(inner[0]) if inner else hint


S = TypeVar("S", bound="Settings")


class Settings:
    """A base for frozen dataclasses (``init=False``) whose settings are in tables; made from settings by name.

        TrainConfig(out="runs/x", lr=1e-3)                   # whatever table they are in
        TrainConfig(out="runs/x", winq=WinQConfig(samples=2))
        replace(config, lr=1e-3)

    Raises:
        ConfigError: if a value cannot be used.
        TypeError: if a name is not known.
    """

    #: Name of the table of what is in no other.
    own_table = "settings"

    def __init__(self, **settings: Any) -> None:
        known = settings_of(type(self))
        tables = self._tables()
        inside: dict[str, dict[str, Any]] = {name: {} for name in tables}
        own: dict[str, Any] = {}
        for name in sorted(settings, key=lambda name: name not in tables):  # whole tables first
            value = settings[name]
            if name in tables and (isinstance(value, Mapping) or is_dataclass(value)):
                inside[name].update(value if isinstance(value, Mapping) else vars(value))
            elif name in known:
                holder = known[name].holder
                (own if holder is None else inside[holder])[name] = value
            elif name in tables:
                raise TypeError(f"{name} is {value!r}, must be a {tables[name].__name__}: it is a table of settings")
            else:
                raise TypeError(f"{type(self).__name__} has no setting {name!r}")
        for name, kind in tables.items():
            object.__setattr__(self, name, kind(**inside[name]))
        for name, setting in known.items():
            if setting.holder is None:
                object.__setattr__(self, name, own.get(name, setting.field.default))
        self.__post_init__()

    @classmethod
    def _tables(cls) -> dict[str, type]:
        """Return the tables by the field that holds each."""
        return {entry.name: entry.metadata["table"] for entry in fields(cls) if "table" in entry.metadata}  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        """Check the settings that are in no table, and what holds between several."""
        check(self)

    def changed(self: S, **settings: Any) -> S:
        """Return a copy with other values of some settings."""
        own = [name for name, setting in settings_of(type(self)).items() if setting.holder is None]
        return type(self)(**{**{name: getattr(self, name) for name in (*self._tables(), *own)}, **settings})

    def settings(self) -> dict[str, Any]:
        """Return every setting by name, without the tables."""
        return {
            name: getattr(self if setting.holder is None else getattr(self, setting.holder), name)
            for name, setting in settings_of(type(self)).items()
        }
