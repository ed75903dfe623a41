"""What embeddings are to do: find their own among all (`Finding`), or be in the order of scores (`Likeness`).

Each has the targets of rows, a loss of a batch's vectors (B, S, D), what is kept of them, and its figures.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.table import Table
from ..base import Example
from ..judging import contrasted
from ..ranking.ranks import mrr_at, recall_at
from .pair_columns import PairColumns
from .similarity import Search, contrastive_loss, cosent_loss

Loss = Literal["contrastive", "cosent", "cosine"]


class Objective(ABC):
    """metrics: the first counts."""

    metrics: ClassVar[tuple[str, ...]]

    @abstractmethod
    def targets(self, columns: PairColumns, table: Table) -> Tensor:
        """What the rows are judged by, a line each."""

    @abstractmethod
    def loss(self, vectors: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """A sum over the rows.   weights: (B,), what each counts."""

    @abstractmethod
    def kept(self, vectors: Tensor) -> Tensor:
        """What the figures need of vectors (B, S, D)."""

    @abstractmethod
    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        """All metrics."""

    def values(self, answers: Tensor, targets: Tensor) -> dict[str, Tensor] | None:
        """The metrics of each row (N,), where they are means over rows."""
        return None

    def contrasts(self, texts: list[list[str]], targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        """Rows that only one of two models has right.   texts: of each side."""
        return []


@dataclass(frozen=True, kw_only=True)
class Finding(Objective):
    """Queries look for their document among the different documents of all rows."""

    temperature: float
    symmetric: bool

    metrics = ("mrr@10", "recall@1", "recall@5", "recall@10")

    def targets(self, columns: PairColumns, table: Table) -> Tensor:
        return columns.numbers(table)

    def loss(self, vectors: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return contrastive_loss(vectors, targets, self.temperature, symmetric=self.symmetric, weights=weights)

    def kept(self, vectors: Tensor) -> Tensor:
        return vectors

    def values(self, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
        ranks = Search.of(answers, targets).ranks()
        return {"mrr@10": mrr_at(ranks, 10), **{f"recall@{k}": recall_at(ranks, k) for k in (1, 5, 10)}}

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.values(answers, targets).items()}

    def contrasts(self, texts: list[list[str]], targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        """Queries whose document only one of two models finds first."""
        searches = [Search.of(answers, targets) for answers in (base, tuned)]
        queries, documents = texts[0], [text for side in texts[1:] for text in side]

        def words(i: int) -> tuple[str, str, str, str]:
            by_base, by_tuned = (documents[search.best(i)] for search in searches)
            return queries[i], documents[i], by_base, by_tuned

        first = [search.ranks() == 1 for search in searches]
        return contrasted(first[0], first[1], words)


@dataclass(frozen=True, kw_only=True)
class Likeness(Objective):
    """Pairs whose cosines are to be in the order of their scores; or, `squared`, to be the scores.

    scores: those that stand for the cosines 0 and 1.
    """

    temperature: float
    squared: bool
    scores: tuple[float, float]

    metrics = ("spearman", "pearson")

    def targets(self, columns: PairColumns, table: Table) -> Tensor:
        return columns.scores(table)

    def loss(self, vectors: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """CoSENT has one number for the batch, which counts for each of its rows, or as much as they do."""
        if not self.squared:
            count = len(vectors) if weights is None else weights.sum()
            return cosent_loss(cosines(vectors), targets, self.temperature, weights=weights) * count
        low, high = self.scores
        losses = F.mse_loss(cosines(vectors), (targets - low) / (high - low), reduction="none")
        return (losses if weights is None else losses * weights).sum()

    def kept(self, vectors: Tensor) -> Tensor:
        """The similarity of the pair; of a text alone its vector."""
        return vectors if vectors.shape[1] == 1 else cosines(vectors)

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

        if len(answers) < 2 or not answers.std() or not targets.std():  # what is all the same ranks nothing
            return {"spearman": 0.0, "pearson": 0.0}
        return {
            "spearman": float(spearman_corrcoef(answers, targets)),
            "pearson": float(pearson_corrcoef(answers, targets)),
        }


def objective_for(loss: Loss, *, temperature: float, symmetric: bool, scores: tuple[float, float]) -> Objective:
    """What is learned by this loss.   symmetric: contrastive alone; scores: the others; temperature: all but cosine."""
    if loss == "contrastive":
        return Finding(temperature=temperature, symmetric=symmetric)
    return Likeness(temperature=temperature, squared=loss == "cosine", scores=scores)


def shown(answers: Tensor) -> list[dict[str, Any]]:
    """What is shown of each answer: the vector of a text alone, else how similar the first two texts of a row are."""
    if answers.ndim == 3 and answers.shape[1] == 1:
        return [{"embedding": vector.tolist()} for vector in answers[:, 0]]
    likeness = cosines(answers) if answers.ndim == 3 else answers
    return [{"similarity": round(float(cosine), 4)} for cosine in likeness]


def cosines(vectors: Tensor) -> Tensor:
    """Of the first two texts of each row, (B,)."""
    return torch.sum(vectors[:, 0] * vectors[:, 1], dim=-1)
