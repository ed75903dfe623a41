"""How near what a model wrote is to what the data answer, and tasks judged so.  Sums are over the rows written to.

    exact_match = rows written right / rows            cer = edits of characters / characters of the answers
    rouge_l     = mean F of ROUGE-L                    wer = edits of words / words of the answers

Words are what white space separates, so where a target is a row of symbols, as phonemes are, wer is their error rate.

ROUGE-L, Lin 2004, ROUGE, section 3.1 (sentence level): L = length of the longest common subsequence of words, which are
runs of letters and digits in lower case, of any script; there is no stemming.

    F = 2 P R / (P + R)       P = L / words written       R = L / words of the answer

An edit puts in, takes out or exchanges one (Levenshtein 1966).  The table's differences stand in the bits of a whole
number, a row in one step: Hyyrö 2003, A bit-vector algorithm for computing Levenshtein distance, figure 1.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import Batch
from .likelihood import METRICS, LikelihoodTask
from .pair_tokens import PairTokens

_WORD = re.compile(r"[^\W_]+")

# sums of a row, in this order: is it written to, is it right, edits and length in characters, in words, ROUGE-L
SUMS = 7
_OWN = 3  # numbers of an answer before these: those of its likelihood
RATIOS = {"exact_match": (1, 0), "cer": (2, 3), "wer": (4, 5), "rouge_l": (6, 0)}  # metric -> sum over sum


class WritingTask(LikelihoodTask):
    """A task that also writes when it is judged, where it is to be judged by a metric of what is written.

    Its outputs then have what is "said", ids of the rows that the batch says are "written" to.
    """

    metrics_below = frozenset({*LikelihoodTask.metrics_below, "cer", "wer"})
    tokens: PairTokens
    writes: bool

    def judge_by(self, metric: str | None) -> None:
        self.metrics = (*METRICS, *RATIOS)
        super().judge_by(metric)
        self.writes = self.metric in RATIOS
        if not self.writes:
            self.metrics = METRICS  # writing takes long; it is done where it was asked for

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        """(rows, 3), and where the model writes the sums of each row beside them, zeros where it did not."""
        answers = super().answer(outputs, batch)
        if not self.writes:
            return answers
        sums = answers.new_zeros(len(answers), SUMS)
        if "said" in outputs:
            said, truths = map(self.tokens.texts, (outputs["said"], batch["targets"][batch["written"]]))
            sums[batch["written"]] = sums.new_tensor([*map(sums_of, said, truths)])
        return torch.cat([answers, sums], dim=1)

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        return super().score(answers, targets) | (written(answers[:, _OWN:]) if self.writes else {})

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        if not self.writes:
            return super().parts(answers, targets)
        return answers[:, [_OWN + place for place in RATIOS[self.metric]]]


def sums_of(said: str, answer: str) -> list[float]:
    """The sums of one row."""
    counts: list[float] = []
    for one, other in ((said, answer), (said.split(), answer.split())):
        counts += [edits(one, other), len(other)]
    return [1.0, float(said == answer), *counts, rouge_l(said, answer)]


def written(sums: Tensor) -> dict[str, float]:
    """All metrics of the sums of rows, (rows, SUMS)."""
    total = sums.double().sum(0)
    return {name: float(total[top] / total[bottom]) for name, (top, bottom) in RATIOS.items()}


def edits(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many edits make one of the other."""
    if not one:
        return len(other)
    places: dict[Hashable, int] = defaultdict(int)
    for i, symbol in enumerate(one):
        places[symbol] |= 1 << i
    full = (1 << len(one)) - 1
    up, down, distance = full, 0, len(one)  # bit i: entry i + 1 of the column is one more, one less, than entry i
    for symbol in other:
        same = places.get(symbol, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        right, left = down | (full & ~(diagonal | up)), up & diagonal  # the same from column to column
        distance += (right >> (len(one) - 1) & 1) - (left >> (len(one) - 1) & 1)
        right, left = (right << 1 | 1) & full, left << 1 & full
        up, down = left | (full & ~(diagonal | right)), right & diagonal
    return distance


def rouge_l(said: str, answer: str) -> float:
    """F between 0 and 1; 0 where one of the two has no word."""
    one, other = (_WORD.findall(text.lower()) for text in (said, answer))
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
