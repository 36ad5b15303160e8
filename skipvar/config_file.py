"""Reads a configuration: a YAML file that states differences from the defaults, then `key=value` overrides.

Unknown keys, wrong types and impossible values are refused with one sentence (`ConfigError`). What a user typed under a
key that is not known is never shown: it may be a secret in the wrong place.
"""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skipvar.checks import shown
from skipvar.config import RunConfig
from skipvar.errors import ConfigError, first_line

UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OverflowError, RecursionError)
"""What reading or converting a value raises: besides YAML's own errors, those of the numbers and dates in it."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked, frozen configuration in the YAML file `path`, with `key=value` overrides applied in order.

    Raises `ConfigError` with one sentence that names the file or the key, what is wrong, and what is accepted.
    """
    config: Any = OmegaConf.structured(RunConfig)
    for origin, tree in [(str(path), _read_yaml(Path(path))), *map(_parse_override, overrides)]:
        for key, value, hint in _leaves(tree, RunConfig, origin):
            _check_characters(key, value)
            try:
                config = OmegaConf.merge(config, _nested(key, value))
            except UNREADABLE as error:
                raise ConfigError(f"{key}: expected {_in_words(hint)}, found {_found(value)}.") from error
    try:
        return cast(RunConfig, OmegaConf.to_object(config))
    except UNREADABLE as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{getattr(error, 'full_key', None) or path}: {first_line(error)}.") from error


def to_yaml(config: RunConfig) -> str:
    """All keys and values, as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> Any:
    try:
        if path.is_char_device() or path.is_block_device():  # some have no end; a pipe is what `<(...)` gives
            raise ConfigError(f"Configuration file {path} is a device; give a YAML file such as conf/emoji.yaml.")
        return OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise ConfigError(
            f"Configuration file {path} does not exist; give a YAML file such as conf/emoji.yaml."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration file {path} cannot be read: {first_line(error)}.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line} is not valid YAML: {error.problem}.") from error
    except RecursionError:
        raise ConfigError(f"{path} is not valid YAML: it is nested too deeply.") from None
    except UNREADABLE as error:
        raise ConfigError(f"{path} is not valid YAML: {first_line(error)}.") from error


def _parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """`a.b=value` as its key (for messages) and `{"a": {"b": value}}`; a value that is no YAML is taken as text."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not all(part.strip() for part in key.split(".")):
        is_name = re.fullmatch(r"[a-z_.]+", key) is not None and bool(_nearest(key))  # else it may be a secret
        which = repr(shown(key)) if is_name else f"of {len(text)} characters, without a key and '=',"
        raise ConfigError(f"An override {which} is not understood; write key=value, for example input.limit=10.")
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {value_text}"))["value"]  # type: ignore[index, call-overload]
    except UNREADABLE:
        value = value_text
    return shown(key), _nested(key, value)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as `{"a": {"b": value}}`."""
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return cast(dict[str, Any], tree)


def _leaves(tree: Any, section: type, origin: str, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, value and accepted type of every key in the tree.

    Refuses keys that `section` lacks, and anything but a mapping where a section stands.
    """
    hints = get_type_hints(section)
    if not isinstance(tree, dict):
        where = f"{prefix.rstrip('.')}: expected a section with" if prefix else f"{origin} must hold"
        found = {type(None): "null", str: "a text", list: "a list"}.get(type(tree), "a value")
        raise ConfigError(f"{where} keys and values ({', '.join(hints)}), found {found}.")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(f"{origin}: unknown key {shown(key)}; {_suggest(key)}")
        if is_dataclass(hints[name]):
            yield from _leaves(value, cast(type, hints[name]), origin, f"{key}.")
        else:
            yield key, value, hints[name]


def _suggest(key: str) -> str:
    nearest = _nearest(key)
    return f"did you mean {nearest[0]}?" if nearest else "--print-config shows all keys."


def _nearest(key: str) -> list[str]:
    """The keys there are with this last name, else the one that is most alike, if any is."""
    known = list(_all_keys(RunConfig))
    by_name = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return by_name or difflib.get_close_matches(key[:100], known, n=1, cutoff=0.5)


def _found(value: Any) -> str:
    """A value in a message. A mapping is not shown: its keys are as unknown as other ones."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        return "keys and values"
    return shown(value)


def _all_keys(section: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _all_keys(cast(type, hint), f"{prefix}{name}.")
        yield f"{prefix}{name}"


def _check_characters(key: str, value: Any) -> None:
    """Refuse texts that no file name, column or log can hold."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)):
            raise ConfigError(f"{key}: holds a character that no text may have (NUL, or half of a surrogate pair).")


def _in_words(hint: Any) -> str:
    """What a field of this type takes."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not int or float not in get_args(hint)]
        first = [_in_words(part) for part in parts if get_origin(part) is Literal]
        return ", ".join([*first, " or ".join(_in_words(part) for part in parts if get_origin(part) is not Literal)])
    if get_origin(hint) is Literal:
        names = [str(name) for name in get_args(hint)]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if get_origin(hint) is list:
        return f"a list of which each is {_in_words(get_args(hint)[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(hint, "another value")
