"""Kinds of values that options take. ``argparse`` names the option where one of them refuses what was given."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

LARGEST = (1 << 31) - 1


def integer(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """Integers of a range."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch("[+-]?[0-9]{1,20}", text) else None
        if value is None or not least <= value <= most:
            raise ArgumentTypeError(f"expected an integer from {least} to {most}, found {text}")
        return value

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """Finite numbers of a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise ArgumentTypeError(f"expected a number from {least:g} to {most:g}, found {text}")
        return value

    return parse


def some_name(text: str) -> str:
    """A name; an empty one, as an unset variable leaves it, names nothing."""
    if not text.strip():
        raise ArgumentTypeError("expected a name, found nothing")
    return text


def some_path(text: str) -> Path:
    """A file or folder; an empty name, as an unset variable leaves it, is not the current folder."""
    if not text:
        raise ArgumentTypeError("expected a path, found nothing; the current folder is .")
    return Path(text)
