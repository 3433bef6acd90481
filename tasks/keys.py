"""Counter-based randomness: a stream of random numbers is named by a key, not by what was drawn before it.

Owns: the map from a key such as ``(run seed, incarnation, worker, window)`` to a ``torch.Generator``.
Must never touch torch's global generator, the clock or the operating system's randomness.
"""

from __future__ import annotations

import hashlib

import torch

_WORDS = 624  # words of a Mersenne Twister's state
_HEADER = 3  # int64 words before them in torch's CPU generator state: seed, (left, seeded), next


def encode(key: tuple[int | str, ...]) -> bytes:
    """An injective and prefix-free encoding: every part carries its type and its length, the whole its part count."""
    parts = [b"%d:" % len(key)]
    for part in key:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"key part {part!r}: expected an int or a str, not {type(part).__name__}")
        kind = b"i" if isinstance(part, int) else b"s"
        data = str(part).encode()
        parts.append(b"%s%d:%s" % (kind, len(data), data))
    return b"".join(parts)


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on the whole key and on nothing else.

    ``initial_seed()`` of the result is the 64-bit BLAKE2b hash of the key. ``manual_seed`` alone would use only 32
    of those bits (two of 65,000 keys would likely share a stream), so the Mersenne Twister's whole state is filled
    from SHAKE-256 of the key. Raises TypeError for parts that are neither int nor str.
    """
    code = encode(key)
    seed = int.from_bytes(hashlib.blake2b(code, digest_size=8).digest(), "little")
    stream = torch.Generator().manual_seed(seed)
    state = stream.get_state()
    words = torch.frombuffer(bytearray(hashlib.shake_256(code).digest(4 * _WORDS)), dtype=torch.uint32)
    state.view(torch.int64)[_HEADER : _HEADER + _WORDS] = words.to(torch.int64)
    stream.set_state(state)
    return stream
