"""A random order of N rows that is a function of an index: no list, no state, the same on every machine and version.

pi is a 6-round Feistel network on b bits (b even, 2^b >= N) with cycle walking: apply it again while the result is
>= N. The round function is SplitMix64's finaliser (Steele, Lea & Flood 2014). Own integers, because numpy does not
promise that its generators give the same stream in the next version.

    (L, R) -> (R, L ^ (mix(R ^ key_r) & mask)),    key_r = mix(mix(mix(mix(seed) ^ task) ^ epoch) + r),    r = 0..5
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6
Words = NDArray[np.uint64]


def mix_bits(x: ArrayLike) -> Words:
    """SplitMix64 of each word, modulo 2^64."""
    z = np.array(x, dtype=np.uint64, ndmin=1, copy=True)
    z += np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def task_word(name: str) -> int:
    """The integer that stands for a task: first 8 bytes of SHA-256 of its name. Adding a task moves no other."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")


def round_keys(seed: int, task: ArrayLike, epoch: ArrayLike) -> Words:
    """Keys [6, n] for n pairs (task word, epoch)."""
    a = mix_bits(seed)
    a = mix_bits(a ^ np.atleast_1d(np.array(task, dtype=np.uint64)))
    a = mix_bits(a ^ np.atleast_1d(np.array(epoch, dtype=np.uint64)))
    return np.stack([mix_bits(a + np.uint64(r)) for r in range(ROUNDS)])


def half_bits(size: ArrayLike) -> Words:
    """b/2 for each N: b = bit length of N - 1, rounded up to even, at least 2."""
    bits = np.array([max(2, (int(n) - 1).bit_length()) for n in np.atleast_1d(np.asarray(size))])
    return ((bits + 1) // 2).astype(np.uint64)


def permute(position: ArrayLike, size: ArrayLike, half: Words, keys_6n: Words) -> NDArray[np.int64]:
    """pi(position) for n elements, each with its own N (`size` [n]), half width [n], keys [6, n] (or one)."""
    x = np.array(position, dtype=np.uint64, ndmin=1, copy=True)
    size = np.broadcast_to(np.asarray(size, dtype=np.uint64), x.shape)
    half = np.broadcast_to(half, x.shape)
    keys_6n = np.broadcast_to(keys_6n, (ROUNDS, len(x)))
    todo: NDArray[np.intp] | slice = slice(None)
    while True:
        h, now = half[todo], x[todo]
        mask = (np.uint64(1) << h) - np.uint64(1)
        left, right = now >> h, now & mask
        for r in range(ROUNDS):
            left, right = right, left ^ (mix_bits(right ^ keys_6n[r][todo]) & mask)
        x[todo] = (left << h) | right
        outside = x[todo] >= size[todo]
        if not outside.any():
            return x.astype(np.int64)
        todo = np.flatnonzero(outside) if isinstance(todo, slice) else todo[outside]
