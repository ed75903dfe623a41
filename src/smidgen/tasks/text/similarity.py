"""Losses on embeddings, and what their search finds.  Rows are groups of texts: a query, its document, a wrong one.

    contrastive   - sum_i log( exp(q_i d_i / tau) / sum_j exp(q_i d_j / tau) )      j: documents of the batch that are
                                                                                    wrong for query i, and d_i
    CoSENT        log(1 + sum over s_i > s_j of exp((cos_j - cos_i) / tau))         s: scores of the pairs

Contrastive: InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) with the other documents of the batch for negatives
(Henderson et al. 2017, arXiv:1705.00652, section 4).   CoSENT: Su 2022, kexue.fm/archives/8847.   Where no text comes
twice, both are the numbers of sentence-transformers 6.2 (MultipleNegativesRankingLoss, CoSENTLoss).

Where rows have weights w, row i of the contrastive loss counts w_i times, a pair i, j of CoSENT w_i w_j times: so a row
of weight 2 is to CoSENT what the row twice would be.

Texts are known by number: equal numbers, equal texts.  A document that stands with the same query elsewhere, and one
that is the query itself, are no negatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ranking.ranks import ranks_of_vectors


def contrastive_loss(
    vectors: Tensor, ids: Tensor, temperature: float, *, symmetric: bool = False, weights: Tensor | None = None
) -> Tensor:
    """The loss summed over the rows, a number.

    vectors: (B, S, D), normalised; query, document and, if S = 3, a wrong document of each row.
    ids: (B, S), the numbers of the texts.   symmetric: the mean with the loss of finding the query of each document.
    weights: (B,), what each row counts; all are negatives of others as before.
    """
    count = len(vectors)
    documents = vectors[:, 1:].transpose(0, 1).flatten(0, 1)  # (C, D), C = B (S - 1); the right ones first
    with torch.autocast(vectors.device.type, enabled=False):  # in bf16 a similarity over tau is off by a tenth
        logits = vectors[:, 0].float() @ documents.float().T / temperature  # (B, C)
    logits = logits.masked_fill(_also_right(ids), -torch.inf)
    own = torch.arange(count, device=ids.device)
    losses = F.cross_entropy(logits, own, reduction="none")  # (B,)
    if symmetric:
        losses = (losses + F.cross_entropy(logits[:, :count].T, own, reduction="none")) / 2
    return (losses if weights is None else losses * weights).sum()


def cosent_loss(cosines: Tensor, scores: Tensor, temperature: float, *, weights: Tensor | None = None) -> Tensor:
    """The loss of a batch, a number: every pair of rows is to be in the order of its scores.   All (B,)."""
    wrong_by = (cosines[None, :] - cosines[:, None]) / temperature  # (i, j): how far j is above i
    if weights is not None:
        wrong_by = wrong_by + weights.log()[:, None] + weights.log()[None, :]
    wrong_by = wrong_by.masked_fill(scores[:, None] <= scores[None, :], -torch.inf)
    return F.pad(wrong_by.flatten(), (1, 0)).logsumexp(0)


def _also_right(ids: Tensor) -> Tensor:
    """(B, C) bool: which documents of the batch are right for a row's query, but for the row's own."""
    queries, right, all_documents = ids[:, 0], ids[:, 1], ids[:, 1:].T.flatten()
    same_query = queries[:, None] == queries[None, :]  # (B, B)
    is_right = right[:, None] == all_documents[None, :]  # (B, C)
    also = (same_query.float() @ is_right.float() > 0) | (queries[:, None] == all_documents[None, :])
    return also & ~torch.eye(*also.shape, dtype=torch.bool, device=ids.device)


@dataclass(frozen=True)
class Search:
    """Every query of some rows against all their different documents.

    queries: (N, D).   documents: (C, D).   places: (C,), where a document first stands in the rows, counted through
    the right documents of all rows and then the wrong ones.   relevant: (N,), which document is right.
    exclude: (M, 2), pairs of query and document that are right too, or the same text.
    """

    queries: Tensor
    documents: Tensor
    places: Tensor
    relevant: Tensor
    exclude: Tensor

    @classmethod
    def of(cls, vectors: Tensor, ids: Tensor) -> Self:
        """vectors: (N, S, D) and ids: (N, S) as `contrastive_loss` takes them."""
        flat, count = vectors[:, 1:].transpose(0, 1).flatten(0, 1), len(vectors)
        numbers, column = ids[:, 1:].T.flatten().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        order = torch.arange(len(column))
        places = torch.full_like(numbers, len(column)).scatter_reduce_(0, column, order, "amin")
        relevant = column[:count]
        column_of = {number: c for c, number in enumerate(numbers.tolist())}
        right: dict[int, set[int]] = {q: {column_of[q]} if q in column_of else set() for q in ids[:, 0].tolist()}
        for query, document in zip(ids[:, 0].tolist(), relevant.tolist(), strict=True):
            right[query].add(document)
        own = relevant.tolist()
        pairs = [(i, c) for i, query in enumerate(ids[:, 0].tolist()) for c in right[query] if c != own[i]]
        return cls(vectors[:, 0], flat[places], places, relevant, torch.tensor(pairs, dtype=torch.int64).view(-1, 2))

    def ranks(self) -> Tensor:
        """The rank of each query's document, (N,)."""
        return ranks_of_vectors(self.queries, self.documents, self.relevant, self.exclude)

    def best(self, query: int) -> int:
        """The place of the document that is nearest to a query, of those that compete."""
        scores = self.documents @ self.queries[query]
        scores[self.exclude[self.exclude[:, 0] == query, 1]] = -torch.inf
        return int(self.places[scores.argmax()])


def connected(pairs: Sequence[Sequence[int]]) -> list[int]:
    """Per pair of numbers the group it is in: pairs that share a number are in one, and so on from pair to pair."""
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while parent.setdefault(number, number) != number:
            parent[number] = number = parent[parent[number]]
        return number

    for pair in pairs:
        for number in pair[1:]:
            parent[root(number)] = root(pair[0])
    return [root(pair[0]) for pair in pairs]
