"""What language models of all kinds are judged by: how likely they find the tokens that are to be learned.

    perplexity = exp(sum of losses / tokens)

Answers: per row (summed loss, tokens to be learned, those of them that the model finds likeliest), and what else a
task adds.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Task

METRICS = ("perplexity", "loss", "token_accuracy")


class LikelihoodTask(Task):
    """A task whose outputs are its answers: (rows, 3 or more), as above."""

    metrics_below = frozenset({"perplexity", "loss"})

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        return outputs[:, 0].sum(), int(outputs[:, 1].sum())

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        loss, tokens, right = answers[:, :3].double().sum(0)
        mean = loss / tokens
        return {"perplexity": float(mean.exp()), "loss": float(mean), "token_accuracy": float(right / tokens)}

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        return answers[:, [2, 1]] if self.metric == "token_accuracy" else answers[:, :2]

    def value_of(self, sums: Tensor) -> Tensor:
        mean = sums[..., 0] / sums[..., 1]
        return mean.exp() if self.metric == "perplexity" else mean
