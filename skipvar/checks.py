"""Checks of a configuration's values, each with one sentence for what it refuses; and what of a value may be shown."""

import math
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from skipvar.errors import ConfigError

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
MAX_SECONDS = 1e9
"""About thirty years: longer waits than the system's clocks take."""
SHOWN_CHARACTERS = 100
MESSAGE_CHARACTERS = 600
"""A sentence of three lines in most terminals; of a longer one the middle is left out."""
_SECRETS = (
    (re.compile(r"://\S*@"), "://...@"),  # a user and a password before a host
    # the same without a scheme, also where that was taken for a relative path
    (re.compile(r"((?<![\w/])|(?<=[^/:]/))[^\s/:@'\"(]+:[^\s@]+@(?=\w)"), "...@"),
    (
        re.compile(r"(://[^\s/:@\[]+):(?!(?:port|\d*)(?![^\s/'\"?;,.)]))[^\s/'\";,]*"),
        r"\1:...",
    ),  # no port
    (re.compile(r"\?(?=[^\s?=]*=)[^\s'\"]*"), "?..."),  # the query of a signed URL
    (re.compile(r"(://[^\s'\"]*#)[^\s'\"]*"), r"\1..."),
)


def shown(value: Any) -> str:
    """A value as it may stand in a message: one line, not long, without credentials.

    What comes before an `@`, and what follows `?` or `#` in a URL, may be a secret and is left out.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    text = re.sub(r"^(.*?://)?.*@", r"\1...@", text)
    text = re.sub(r"(://[^?#]*[?#]).*|(\?)[^?]*=.*", r"\1\2...", text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def message_of(error: BaseException | str) -> str:
    """What may be shown and logged of an error: one line, of bounded length, without what could be a credential in an
    address (user and password, query, fragment)."""
    text = " ".join(str(error).split())
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    if len(text) > MESSAGE_CHARACTERS:
        text = f"{text[: MESSAGE_CHARACTERS // 2 - 3]} ... {text[-MESSAGE_CHARACTERS // 2 + 2 :]}"
    return text.encode("utf-8", "replace").decode()


def require(is_accepted: bool, key: str, value: Any, accepted: str) -> None:
    """Raise `ConfigError` with the key, its value and what is accepted, unless it is."""
    if not is_accepted:
        raise ConfigError(f"{key}: {shown(value)} is not usable; accepted: {accepted}.")


def check_one_of(key: str, value: str, accepted: Iterable[str]) -> None:
    """Raise `ConfigError` unless the key's value is one of the names accepted."""
    names = list(accepted)
    require(value in names, key, value, f"one of {', '.join(names)}")


def check_scheme(key: str, path: str) -> None:
    """Refuse what is neither a local path nor `s3://bucket[/prefix]`, and what holds credentials or options."""
    scheme, separator, rest = path.partition("://")
    require(not separator or scheme == "s3", key, path, "a local path or s3://bucket/prefix")
    require(not separator or bool(rest.split("/")[0]), key, path, "s3:// followed by a bucket's name")
    has_options = bool(separator) and ("@" in rest.split("/")[0] or re.search(r"\?[^/=]*=", rest) is not None)
    require(not has_options, key, path, "s3://bucket/prefix without keys or options in it")


def check_http(key: str, url: str, or_else: str = "") -> None:
    """Refuse what is no address of a server, and one with credentials in it."""
    try:
        parts = urlsplit(url)
        url_ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        url_ok = url_ok and not parts.query and not parts.fragment and url.isprintable()
    except ValueError:  # a bracket that does not close, a port that is no number
        parts, url_ok = urlsplit(""), False
    if parts.username or parts.password or (not url_ok and "@" in url):
        raise ConfigError(f"{key}: holds a user or password; give credentials by the environment instead.")
    require(url_ok, key, url, f"http://host:port or https://host{or_else}")


def check_whole(
    key: str, value: Any, low: int, high: int, *, or_else: str | None = None, accepted: str | None = None
) -> None:
    """Refuse what is no whole number from `low` to `high`."""
    if accepted is None:
        accepted = f"a whole number of {low}{' (off)' if low == 0 else ''} or more"
        accepted = f"{or_else}, or {accepted}" if or_else else accepted
        if is_whole(value) and value > high:
            accepted += f", up to {high}"
    require(is_whole(value) and low <= value <= high, key, value, accepted)


def check_seconds(key: str, value: Any, *, can_be_zero: bool = False, or_else: str = "") -> None:
    """Refuse what is no number above 0 (with `can_be_zero`, of 0 or more) and up to `MAX_SECONDS`."""
    is_ok = is_within(value, 0, MAX_SECONDS) and (can_be_zero or value > 0)
    lowest = "of 0 or more" if can_be_zero else "above 0"
    require(is_ok, key, value, f"a number {lowest} (up to {MAX_SECONDS:.0e}){or_else}")


def is_text(value: Any) -> bool:
    """Whether it is a string that holds more than white space."""
    return isinstance(value, str) and bool(value.strip())


def is_whole(value: Any) -> bool:
    """Whether it is an int; a bool is none here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is an int or float within a float's range: no bool, no infinity, no NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def is_within(value: Any, low: float, high: float) -> bool:
    """Whether it is a finite number from `low` to `high`, both included."""
    return is_finite(value) and low <= value <= high
