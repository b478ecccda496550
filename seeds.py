"""Where random numbers come from: each is a function of the seed and a position.

So neither the number of processes nor that of workers changes the data, and a resumed run needs no random state.
"""
import hashlib
import random
from contextlib import contextmanager


def item_seed(*parts: int | str) -> int:
    """63-bit seed from any parts, the same on every machine and in every process (unlike hash())."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


@contextmanager
def seeded(seed: int):
    """Runs a block on Python's global generator, seeded, and puts its state back. The views draw from no other."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
