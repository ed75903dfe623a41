"""How well the relevant one of many candidates is ranked: recall, reciprocal rank and NDCG over all candidates.

    rank     = 1 + candidates scored higher + half of the others scored the same        (N,), 1.0 is best
    recall@k = 1 if rank <= k                MRR@k = 1 / rank if rank <= k              NDCG@k = 1 / log2(1 + rank) ...

One candidate is relevant in each row, so the ideal DCG is 1 and recall@k is also called the hit rate.  No candidate is
sampled away: sampled metrics order models differently (Krichene & Rendle 2020, KDD).  The rank of a tie is the one
expected if equal scores were put in a random order: a model that scores everything the same is not first everywhere.
All values are per row, so their mean is the metric and rows can be drawn again for intervals.
"""

import torch
from torch import Tensor

_BLOCK = 1 << 24  # scores held at a time: 64 MB in fp32


def ranks(scores: Tensor, relevant: Tensor, exclude: Tensor | None = None) -> Tensor:
    """The rank of the relevant candidate of each row, (N,) in fp32; 1.0 is best, ties count half.

    scores: (N, C), higher is better; NaN counts as the lowest.   relevant: (N,), index of the candidate.
    exclude: (N, C) bool, candidates that do not compete (known, also right); the relevant one always does.
    """
    lowest = torch.tensor(-torch.inf, device=scores.device)
    scores = torch.where(scores.isnan(), lowest, scores.float())
    own = scores.gather(1, relevant[:, None])  # (N, 1)
    competes = torch.ones_like(scores, dtype=torch.bool) if exclude is None else ~exclude
    competes = competes.scatter(1, relevant[:, None], torch.zeros_like(relevant[:, None], dtype=torch.bool))
    higher = ((scores > own) & competes).sum(1)
    equal = ((scores == own) & competes).sum(1)
    return 1 + higher + equal / 2


def ranks_of_vectors(queries: Tensor, candidates: Tensor, relevant: Tensor, exclude: Tensor | None = None) -> Tensor:
    """`ranks` for scores that are inner products, computed in blocks of rows so that (N, C) is never held.

    queries: (N, D).   candidates: (C, D).   relevant: (N,).   exclude: (M, 2), pairs of row and candidate.
    """
    size = max(1, _BLOCK // max(1, len(candidates)))
    found = []
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ candidates.T
        left_out = torch.zeros_like(scores, dtype=torch.bool)
        if exclude is not None:
            here = exclude[(exclude[:, 0] >= start) & (exclude[:, 0] < start + size)]
            left_out[here[:, 0] - start, here[:, 1]] = True
        found.append(ranks(scores, relevant[start : start + size], left_out))
    return torch.cat(found) if found else queries.new_zeros(0)


def recall_at(ranks: Tensor, k: int) -> Tensor:
    """Per row 1.0 if the relevant candidate is among the first k, (N,)."""
    return (ranks <= k).float()


def mrr_at(ranks: Tensor, k: int) -> Tensor:
    """Per row the reciprocal rank, 0 behind place k, (N,)."""
    return torch.where(ranks <= k, 1 / ranks, torch.zeros_like(ranks))


def ndcg_at(ranks: Tensor, k: int) -> Tensor:
    """Per row the discounted gain, 1 / log2(1 + rank) and 0 behind place k, (N,).  Järvelin & Kekäläinen 2002."""
    return torch.where(ranks <= k, 1 / torch.log2(1 + ranks), torch.zeros_like(ranks))
