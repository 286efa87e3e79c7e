"""Sequences whose answer's last element depends on all of the question: long addition, sums of prefixes."""

import numpy as np

DIGITS = "0123456789"


def addition(digits: int, rng: np.random.Generator) -> tuple[str, str]:
    """`a+b=` and the sum, units first, as one adds by hand; a and b have so many digits, and the sum one more."""
    a, b = (rng.integers(0, 10, digits) for _ in range(2))
    total, carry, places = [], 0, zip(a[::-1].tolist(), b[::-1].tolist())
    for x, y in places:
        carry, digit = divmod(x + y + carry, 10)
        total.append(digit)
    return f"{text(a)}+{text(b)}=", text([*total, carry])


def prefix_sums(length: int, modulus: int, rng: np.random.Generator) -> tuple[str, str]:
    """Digits below `modulus`, and the sum of each prefix modulo that; of bits it is the parity."""
    values = rng.integers(0, modulus, length)
    return text(values), text(np.cumsum(values) % modulus)


def text(digits) -> str:
    return "".join(DIGITS[digit] for digit in digits)
