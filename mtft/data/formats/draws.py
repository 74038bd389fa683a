"""Draws that hang on a seed and a row alone: the same in every process, in any order of work, on any machine.

h(i) = first 8 bytes of SHA-256(seed, what, place, i)      draw: h(0) mod size;  order: Fisher-Yates by h(1), h(2), ...
"""

from __future__ import annotations

from collections.abc import Iterator

from mtft.common.fingerprint import hash_number


def draw(seed: int, what: str, place: str, size: int) -> int:
    """A number below `size`. what: the purpose, so that draws for two of them are independent; place: of the row."""
    return _hash(seed, what, place, 0) % size


def drawn_order(seed: int, what: str, place: str, size: int) -> Iterator[int]:
    """All numbers below `size` in a random order, as many as are asked for: k of them take k draws."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = i + _hash(seed, what, place, i + 1) % (size - i)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)


def _hash(seed: int, what: str, place: str, i: int) -> int:
    return hash_number(f"{seed}\0{what}\0{i}\0{place}", "big")
