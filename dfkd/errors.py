"""The exceptions that end a command with a line to read, and how such a line shows a value and the nearest match."""

import difflib
import json
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input, told in one line: what was given, what is allowed, what to do; the command exits with code 2."""


class Paused(Exception):
    """A run stopped in time, with a whole checkpoint (runtime.minutes): in one line how far it is."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the allowed word that is like the given one; empty where none is."""
    return "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(given, list(allowed), n=1))


def shown(value: Any) -> str:
    """A value of a recipe as it may be written in one."""
    return json.dumps(value, ensure_ascii=False, default=str)


def in_a_line(error: BaseException) -> str:
    """What an exception says, in one line of 300 characters at most; its kind where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
