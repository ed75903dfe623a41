"""Subspaces of a weight by clusters of its rows, and which of them go on learning: what AdaMSS is made of."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import MissingDependency


@dataclass(frozen=True)
class Subspaces:
    """The decomposition of a matrix W (O, I) into K clusters of rows.

    V: (R, I), right singular vectors.   places: (O,), where a row of W stands among the rows cluster by cluster.
    sizes: (O_k, R_k) of each cluster.   starts: (R_k, R) of each, the main directions of its rows.
    """

    V: Tensor
    places: Tensor
    sizes: tuple[tuple[int, int], ...]
    starts: tuple[Tensor, ...]


@torch.no_grad()
def decomposed(
    W: Tensor, rank: int, clusters: int, cluster_rank: int, seed: int, *, threshold: float | None
) -> Subspaces:
    """The decomposition of W (O, I), fp32 on the CPU, in the steps and with the seeds of Hugging Face PEFT.

    threshold: of the squared singular values, relative to the first, below which a direction does not count.
    Raises MissingDependency without scikit-learn.
    """
    with torch.random.fork_rng(devices=[]):  # svd_lowrank takes no generator
        torch.default_generator.manual_seed(seed)
        U, _, V = torch.svd_lowrank(W, q=min(rank, *W.shape), niter=2)  # (O, R), (I, R)
    labels = _clusters(U, min(clusters, len(W)))
    sizes, starts = [], []
    for k in range(int(labels.max()) + 1):
        _, singular, directions = torch.linalg.svd(U[labels == k], full_matrices=False)
        squares, R_k = singular.square(), min(cluster_rank, int((labels == k).sum()))
        if threshold is not None:
            R_k = max(1, min(R_k, int((squares > threshold * squares[0]).sum())))
        sizes.append((int((labels == k).sum()), R_k))
        starts.append(directions[:R_k])
    places = torch.empty(len(W), dtype=torch.long)
    places[labels.argsort(stable=True)] = torch.arange(len(W))
    return Subspaces(V.T, places, tuple(sizes), tuple(starts))


def _clusters(points: Tensor, count: int) -> Tensor:
    """The cluster of each point (N, D) by k-means: (N,)."""
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependency("AdaMSS finds its clusters with scikit-learn: pip install scikit-learn") from error
    # a cluster has to come out as it does at Hugging Face PEFT, which keeps none of them in its files
    found = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
    return torch.from_numpy(found.fit_predict(points.numpy())).long()


class Importance(nn.Module):
    """How much each pair (A_k, B_k) matters: its sensitivity |w dL/dw| times the uncertainty of that, both smoothed.

    learns: (K,), which still learn.   The others stand still: whatever the optimiser does to them is undone.
    """

    learns: Tensor

    def __init__(self, A: nn.ParameterList, B: nn.ParameterList) -> None:
        super().__init__()
        self.lists = (A, B)  # in a tuple, for they belong to the adapter
        self.register_buffer("learns", torch.ones(len(A), dtype=torch.bool, device=A[0].device), persistent=False)
        for name, parameter in self._named():
            for kind in ("sensitivity", "uncertainty", "stopped"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(parameter).detach(), persistent=False)

    def observe(self, smooth_sensitivity: float, smooth_uncertainty: float) -> None:
        """One step's gradients."""
        for name, parameter in self._named():
            sensitivity, uncertainty = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")
            if parameter.grad is not None:
                now = (parameter * parameter.grad).abs()
                uncertainty.lerp_((now - sensitivity).abs(), 1 - smooth_uncertainty)
                sensitivity.lerp_(now, 1 - smooth_sensitivity)

    def scores(self) -> Tensor:
        """Of each pair (K,); -inf of those that learn no more."""
        products = [self.get_buffer(f"sensitivity_{n}") * self.get_buffer(f"uncertainty_{n}") for n, _ in self._named()]
        of_each = torch.stack([product.mean() for product in products])  # A_0, B_0, A_1, ...
        return of_each.view(-1, 2).sum(1).masked_fill(~self.learns, -torch.inf)

    def choose(self, learn: Tensor) -> None:
        """Only these (K,) learn from now on; what was observed is forgotten."""
        self.learns.copy_(learn)
        for name, parameter in self._named():
            self.get_buffer(f"sensitivity_{name}").zero_()
            self.get_buffer(f"uncertainty_{name}").zero_()
            self.get_buffer(f"stopped_{name}").copy_(parameter)

    def hold_still(self) -> None:
        """Undo what an optimiser's momentum or decay did to those that learn no more."""
        for number, (name, parameter) in enumerate(self._named()):
            parameter.copy_(torch.where(self.learns[number // 2], parameter, self.get_buffer(f"stopped_{name}")))

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        both = zip(*self.lists, strict=True)
        return [(f"{letter}{k}", p) for k, pair in enumerate(both) for letter, p in zip("AB", pair, strict=True)]
