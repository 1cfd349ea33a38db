"""Names and seeds that nobody meets twice.

Not from the operating system, as ``uuid4`` would have it: that lets the interpreter go, and a request then waits until
the engine's thread gives it back.
"""

import random

_source = random.Random()


def new_id(prefix: str, digits: int = 32) -> str:
    """The prefix and so many random hexadecimal digits."""
    return f"{prefix}{_source.getrandbits(4 * digits):0{digits}x}"


def new_seed() -> int:
    """Any integer of 64 bits."""
    return _source.getrandbits(64)
