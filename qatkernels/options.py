"""Settings as frozen dataclasses. The field of a setting has its help text, its allowed values and its default.

A dataclass whose fields come from :func:`option` is a *table* of settings. It calls :func:`check` in
``__post_init__``. A :class:`Settings` also holds tables, in fields from :func:`table`. Names of settings are unique
over all tables. So a setting has the same name as a keyword argument, as a command-line option (``--qat-lr``), as a key
of ``run.json``, and as a key of TOML, where the tables are TOML tables.
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
    """The value of a setting is not allowed; the message names the setting, its value and what is allowed."""


@dataclass(frozen=True)
class Range:
    """A range of allowed numbers, from ``low`` to ``high``. An end is allowed unless it is open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def words(self, whole: bool) -> str:
        """Return a phrase for error messages; ``whole`` is True for settings that hold integers."""
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
        default: default value; ``dataclasses.MISSING`` if the setting is required.
        help: what the setting means, in one line.
        within: the allowed numbers.
        parse: converts text to a value; if None, the annotation decides.
        resumable: whether a resumed run may change the setting.
        metavar: name of the value in the command-line help.
        positional: whether it is a positional argument on the command line.
    """
    metadata = {
        "help": help, "within": within, "parse": parse, "resumable": resumable, "metavar": metavar,
        "positional": positional,
    }  # fmt: skip
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def table(kind: type, name: str | None = None) -> Any:
    """Return a field that holds a table of settings.

    Args:
        kind: dataclass of the table.
        name: name of the table in TOML and in the help; the name of the field if None.
    """
    return field(default_factory=kind, metadata={"table": kind, "name": name})


class Setting(NamedTuple):
    """A setting of a configuration.

    Attributes:
        field: its dataclass field.
        hint: its annotation.
        table: name of its table; ``own_table`` of the configuration if it is in no table.
        holder: name of the field of the configuration that holds its table; None if it is in no table.
    """

    field: Field[Any]
    hint: Any
    table: str
    holder: str | None


def settings_of(cls: type) -> dict[str, Setting]:
    """Return the settings of a dataclass and of its tables, by name, in the order of the fields."""
    settings: dict[str, Setting] = {}
    own_table = getattr(cls, "own_table", "settings")
    hints = typing.get_type_hints(cls)
    for entry in fields(cls):
        if (kind := entry.metadata.get("table")) is not None:
            table_hints = typing.get_type_hints(kind)
            title = entry.metadata["name"] or entry.name
            for table_field in fields(kind):
                if "help" in table_field.metadata:
                    name = table_field.name
                    settings[name] = Setting(table_field, table_hints[name], title, entry.name)
        elif "help" in entry.metadata:
            settings[entry.name] = Setting(entry, hints[entry.name], own_table, None)
    return settings


def flag(name: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """Return "; did you mean ...?" with the most similar known name, or an empty string if none is similar.

    Args:
        name: the unknown name.
        known: the known names.
        show: formats a name for the message.
    """
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {show(near[0].replace('_', '-'))}?" if near else ""


def check(settings: Any) -> None:
    """Check type and range of each setting of a dataclass. Settings in its tables are not checked: tables do that.

    Raises:
        ConfigError: if a value is not allowed.
    """
    for name, setting in settings_of(type(settings)).items():
        if setting.holder is None:
            value = getattr(settings, name)
            check_type(name, setting, value)
            _check_range(name, setting, value)


def check_type(name: str, setting: Setting, value: Any) -> None:
    """Raise ConfigError if a setting does not allow the type of a value. A bool is not a number."""
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
    except OverflowError:  # an integer above the largest float64
        size = math.inf
    if not within.holds(value) or math.isinf(size) or math.isnan(size):
        whole = isinstance(value, int) and math.isfinite(size)
        raise ConfigError(f"{flag(name)} is {value}, must be {within.words(whole)}")


class _Kind(NamedTuple):
    """An allowed type: a phrase for error messages (empty for None), and a test of a value."""

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
    """Return the types that an annotation allows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for argument in arguments for kind in _kinds(argument)]
    if origin is Literal:
        words = str(arguments[0]) if len(arguments) == 1 else f"one of {', '.join(map(str, arguments))}"
        return [_Kind(words, lambda value: isinstance(value, str) and value in arguments)]
    if origin is tuple:
        element = _KINDS[arguments[0]]
        words = {"a number": "numbers", "a string": "strings"}[element.words]
        return [_Kind(words, lambda value: isinstance(value, tuple) and all(map(element.right, value)))]
    return [_KINDS[hint]]


def plain_type(hint: Any) -> Any:
    """Return the type that text is converted to for an annotation: int, float, bool or str.

    For a tuple it is the type of the elements; for an optional type, the type that is not None.
    """
    arguments = [argument for argument in typing.get_args(hint) if argument not in (type(None), ...)]
    if typing.get_origin(hint) is Literal:
        return str
    return plain_type(arguments[0]) if arguments else hint


S = TypeVar("S", bound="Settings")


class Settings:
    """A base for frozen dataclasses (``init=False``) that hold tables. The constructor takes settings by name.

        TrainConfig(out="runs/x", lr=1e-3)                   # in whatever table they are
        TrainConfig(out="runs/x", winq=WinQConfig(samples=2))
        config.changed(lr=1e-3)

    Raises:
        ConfigError: if a value is not allowed.
        TypeError: if there is no setting of a given name.
    """

    #: Name of the table for settings that are in no table.
    own_table = "settings"

    def __init__(self, **settings: Any) -> None:
        known = settings_of(type(self))
        tables = self._tables()
        in_tables: dict[str, dict[str, Any]] = {name: {} for name in tables}
        in_no_table: dict[str, Any] = {}
        for name in sorted(settings, key=lambda name: name not in tables):  # tables first, so single settings override
            value = settings[name]
            if name in tables and (isinstance(value, Mapping) or is_dataclass(value)):
                in_tables[name].update(value if isinstance(value, Mapping) else vars(value))
            elif name in known:
                holder = known[name].holder
                (in_no_table if holder is None else in_tables[holder])[name] = value
            elif name in tables:
                raise TypeError(f"{name} is {value!r}, must be a {tables[name].__name__}: it is a table of settings")
            else:
                raise TypeError(f"{type(self).__name__} has no setting {name!r}")
        for name, kind in tables.items():
            object.__setattr__(self, name, kind(**in_tables[name]))
        for name, setting in known.items():
            if setting.holder is None:
                object.__setattr__(self, name, in_no_table.get(name, setting.field.default))
        self.__post_init__()

    @classmethod
    def _tables(cls) -> dict[str, type]:
        """Return the dataclasses of the tables, by the name of the field that holds each."""
        return {entry.name: entry.metadata["table"] for entry in fields(cls) if "table" in entry.metadata}  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        """Check the settings that are in no table. Subclasses add checks of combinations of settings."""
        check(self)

    def changed(self: S, **settings: Any) -> S:
        """Return a copy with some settings changed."""
        in_no_table = [name for name, setting in settings_of(type(self)).items() if setting.holder is None]
        return type(self)(**{**{name: getattr(self, name) for name in (*self._tables(), *in_no_table)}, **settings})

    def settings(self) -> dict[str, Any]:
        """Return the value of every setting by name, in one flat dictionary."""
        return {
            name: getattr(self if setting.holder is None else getattr(self, setting.holder), name)
            for name, setting in settings_of(type(self)).items()
        }
