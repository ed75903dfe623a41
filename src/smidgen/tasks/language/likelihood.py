"""What language models of all kinds are judged by: how likely they find the tokens that are to be learned.

    perplexity = exp(sum of losses / tokens)

A column "weight" says what rows count in the loss that is learned from, and in no figure.

Answers: per row (summed loss, tokens to be learned, those of them that the model finds likeliest), and what else a
task adds.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..base import Batch
from ..row_roles import TaskWithRoles

METRICS = ("perplexity", "loss", "token_accuracy")


class LikelihoodTask(TaskWithRoles):
    """A task whose outputs are "loss", "tokens" and "right" of each row, (rows,) each.

    "tokens" and "right" are whole numbers: where two tokens are all but equally likely, rounding alone may turn them,
    and pre-flight is not to take that for a change of the model.
    """

    metrics_below = frozenset({"perplexity", "loss"})

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        losses = outputs["loss"] * batch["weights"] if "weights" in batch else outputs["loss"]
        return losses.sum(), int(outputs["tokens"].sum())

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        """(rows, 3), as above."""
        return torch.stack([outputs[name].float() for name in ("loss", "tokens", "right")], dim=1)

    def likelihood(self, answer: Tensor) -> dict[str, Any]:
        """What is shown of one row's answer; nothing where no token was to be learned."""
        loss, tokens = answer[:2].tolist()
        return {"perplexity": round(math.exp(loss / tokens), 4), "tokens": int(tokens)} if tokens else {}

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        loss, tokens, right = answers[:, :3].double().sum(0)
        mean = loss / tokens
        return {"perplexity": float(mean.exp()), "loss": float(mean), "token_accuracy": float(right / tokens)}

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        return answers[:, [2, 1]] if self.metric == "token_accuracy" else answers[:, :2]

    def value_of(self, sums: Tensor) -> Tensor:
        mean = sums[..., 0] / sums[..., 1]
        return mean.exp() if self.metric == "perplexity" else mean
