"""Bytes that a model wrote as text: as many valid characters as they hold (Wang et al. 2019, arXiv:1909.03341)."""

from __future__ import annotations

LONGEST = 4  # bytes of a character in UTF-8


def most_characters(written: bytes) -> str:
    """The text of most characters that can be read from `written` in order, bytes between them left out.

    f(k) = max over t = 1 .. 4 of f(k - t) + g(k - t + 1, k), f(0) = 0 and f(k) >= f(k - 1), with g = 1 where those t
    bytes are one character; then back from the end. Valid UTF-8 is returned as it is; time grows with the length only.
    """
    best = [0] * (len(written) + 1)
    taken = [0] * (len(written) + 1)  # bytes of the character that ends here; 0 where this byte is left out
    for end in range(1, len(written) + 1):
        best[end] = best[end - 1]
        for size in range(1, min(LONGEST, end) + 1):
            if best[end - size] + 1 > best[end] and _is_character(written[end - size : end]):
                best[end], taken[end] = best[end - size] + 1, size
    characters, end = [], len(written)
    while end:
        if taken[end]:
            characters.append(written[end - taken[end] : end].decode("utf-8"))
        end -= taken[end] or 1
    return "".join(reversed(characters))


def _is_character(some: bytes) -> bool:
    try:
        return len(some.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False
