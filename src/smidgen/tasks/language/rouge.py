"""ROUGE-L: how much of a text stands in another in the same order.   Lin 2004, ROUGE, section 3.1 (sentence level).

    L = length of the longest common subsequence of words      P = L / words said      R = L / words of the reference
    F = 2 P R / (P + R)

Words are runs of letters and digits in lower case, of any script; there is no stemming.
"""

import re

_WORD = re.compile(r"[^\W_]+")


def rouge_l(said: str, reference: str) -> float:
    """F between 0 and 1; 0 where one of the two has no word."""
    one, other = (_WORD.findall(text.lower()) for text in (said, reference))
    if not one or not other:
        return 0.0
    return 2 * _longest_common(one, other) / (len(one) + len(other))  # = 2 P R / (P + R)


def _longest_common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, row by row of the usual table."""
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for j, candidate in enumerate(other):
            row.append(above[j] + 1 if word == candidate else max(above[j + 1], row[j]))
        above = row
    return above[-1]
