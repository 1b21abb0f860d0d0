"""Student's t distribution, by which the interval of a mean over few latents is wider than a normal one.

The formulas are those of Abramowitz and Stegun, 26.7.3 to 26.7.5; scipy, which has them too, is for scaling laws alone.
"""

import math

NORMAL = 1.959963984540054  # what 2.5 % of a normal distribution exceed
MANY = 200  # degrees of freedom, beyond which the first terms about the normal distribution are right to six digits


def quantile(freedom: int) -> float:
    """Between minus and plus this lie 95 % of Student's t with `freedom` degrees of freedom, 1 or more."""
    if freedom > MANY:
        z = NORMAL
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the angle down to the last digit
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def share_within(angle: float, freedom: int) -> float:
    """The share of Student's t that lies within plus and minus sqrt(freedom) tan(angle): a finite sum of powers."""
    odd, cosine = freedom % 2, math.cos(angle)
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(1 + odd, freedom - 2, 2):
        term *= cosine**2 * k / (k + 1)
        total += term
    within = math.sin(angle) * total
    return 2 / math.pi * (angle + within) if odd else within
