"""Where a low-rank change B A may start, found by running the model on a few batches.

    EVA        A: the directions in which the layer's inputs vary most; ranks go where they explain most; B = 0
               Paischer et al. 2024, arXiv:2410.07170, section 3
    CorDA      A, B: the top (instruction-previewed) or the bottom (knowledge-preserved) of W C, where C = x^T x
               Yang et al. 2024, arXiv:2406.05223, equations 3-8
    LoRA-GA    A, B: the top of the gradient of W;  `starts.gradient_aligned`

    x: (N, I), the rows that a layer reads in all batches.   A: (R, I)   B: (O, R)   W: (O, I)

The model is run in eval mode and stays as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import NonFiniteError, require
from .importance import scoring
from .site import Site
from .starts import Factors, balanced, gradient_aligned
from .storage import master_dtype

Loss = Callable[[], Tensor]
RHO = 2  # EVA: a site gets at most RHO times the rank it was asked for


def found(
    start: str,
    model: nn.Module,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    loss: Loss,
    batches: int,
) -> dict[str, Factors]:
    """A and B by site: "eva", "corda_ipm", "corda_kpm" or "lora_ga"."""
    if start == "eva":
        return eva(model, sites, ranks, loss, batches)
    if start == "lora_ga":
        return lora_ga(model, sites, ranks, loss, batches)
    return corda(model, sites, ranks, scales, loss, batches, top=start == "corda_ipm")


class Components:
    """The principal components of rows that come in batches: incremental, Ross et al. 2008, section 3.

    V: (k, I), orthonormal rows, most variance first.   share: (k,), of the variance of all rows, each one's.
    """

    def __init__(self, count: int) -> None:
        self.count, self.rows = count, 0
        self.mean = self.V = self.S = self.total = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """x: (N, I)."""
        n, mean = len(x), x.mean(0)
        x = x - mean
        total = x.square().sum(0)
        if self.rows:
            all_rows = self.rows + n
            shift = (self.rows * n / all_rows) ** 0.5 * (self.mean - mean)
            x = torch.cat([self.S[:, None] * self.V, x, shift[None]])
            total = total + self.total + shift.square()
            mean = (self.rows * self.mean + n * mean) / all_rows
        self.rows, self.mean, self.total = self.rows + n, mean, total
        _, S, V = torch.linalg.svd(x, full_matrices=False)
        self.S, self.V = S[: self.count], V[: self.count]

    @property
    def share(self) -> Tensor:
        return self.S.square() / self.total.sum().clamp_min(torch.finfo(self.S.dtype).tiny)


def eva(
    model: nn.Module, sites: Sequence[Site], ranks: Mapping[str, int], loss: Loss, batches: int
) -> dict[str, Factors]:
    """A and B = 0 of every site that gets any rank: the components that explain most, as many in all as `ranks` has.

    Each is compared by the share of its own site's variance.
    """
    found = {site.name: Components(RHO * ranks[site.name]) for site in sites}
    _run(model, sites, loss, batches, lambda site, x: found[site.name].add(x))
    usable = {name: min(len(c.S), c.rows - 1) for name, c in found.items()}  # N rows about their mean span N - 1
    shares = torch.cat([c.share[: usable[name]].cpu() for name, c in found.items()])
    owners = [name for name, count in usable.items() for _ in range(count)]
    taken = shares.sort(descending=True, stable=True).indices[: sum(ranks.values())].tolist()
    require(
        len(taken) == sum(ranks.values()),
        f"the rows of {batches} batches have {len(taken)} components, and the ranks come to {sum(ranks.values())}: "
        "say more batches, or a smaller rank",
    )
    counts = dict.fromkeys(found, 0)
    for place in taken:
        counts[owners[place]] += 1
    A = {site: found[site.name].V[: counts[site.name]] for site in sites if counts[site.name]}
    return {site.name: (V, V.new_zeros(site.fan_out, len(V))) for site, V in A.items()}


def corda(
    model: nn.Module,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    loss: Loss,
    batches: int,
    *,
    top: bool,
) -> dict[str, Factors]:
    """A and B of every site.   top: its instruction-previewed mode; else the knowledge-preserved one.

    Holds C (I, I) of every site.  As the authors do, rows are divided by the largest entry of their batch.
    """
    C: dict[str, Tensor] = {}

    def add(site: Site, x: Tensor) -> None:
        x = x / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
        C[site.name] = C.get(site.name, 0) + x.T @ x

    _run(model, sites, loss, batches, add)
    found = {}
    for site in sites:
        covariance, inverse = _invertible(C[site.name] / batches)
        U, S, Vh = torch.linalg.svd(site.weight().to(covariance.dtype) @ covariance, full_matrices=False)
        part = slice(None, ranks[site.name]) if top else slice(len(S) - ranks[site.name], None)
        found[site.name] = balanced(U[:, part], S[part], Vh[part] @ inverse, scales[site.name])
    return found


def lora_ga(
    model: nn.Module, sites: Sequence[Site], ranks: Mapping[str, int], loss: Loss, batches: int
) -> dict[str, Factors]:
    """A and B of every site, (E R, I) and (E O, R) on stacked experts.   Holds the gradient of every site's weight."""
    parameters = [cast(nn.Parameter, site.stored) for site in sites]
    sums: dict[str, Tensor] = {}

    def add_to(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None  # let go as soon as it is there
            sums[name] = sums.get(name, 0) + gradient.to_dense().to(master_dtype(gradient))

        return add

    with scoring(model, parameters):
        hooks = []
        for site, p in zip(sites, parameters, strict=True):
            hooks.append(p.register_post_accumulate_grad_hook(add_to(site.name)))  # type: ignore[no-untyped-call]
        try:
            for _ in range(batches):
                value = loss()
                require(value.requires_grad, "loss() gave a number without a gradient: is the model called in no_grad?")
                torch.autograd.backward(value, inputs=parameters)
        finally:
            for hook in hooks:
                hook.remove()
    _refuse_unseen(sites, sums)
    _refuse_broken(sums)
    found = {}
    for site in sites:
        G = site.linear.read_rows(sums[site.name], slice(None))
        A, B = gradient_aligned(G.reshape(site.linear.stack, -1, G.shape[1]), ranks[site.name])
        found[site.name] = A.flatten(0, 1), B.flatten(0, 1)
    return found


@torch.no_grad()
def _run(
    model: nn.Module, sites: Sequence[Site], loss: Loss, batches: int, see: Callable[[Site, Tensor], None]
) -> None:
    """Let `see` have the rows (N, I) that each site's layer reads, batch by batch."""
    seen: dict[str, Tensor] = {}

    def hook(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            x = x.detach().reshape(-1, site.fan_in).to(master_dtype(x))
            seen[site.name] = x.abs().amax()
            _refuse_broken({site.name: seen[site.name]})
            see(site, x)

        return read

    with scoring(model, []), torch.no_grad():
        hooks = [site.layer.register_forward_pre_hook(hook(site), with_kwargs=True) for site in sites]
        try:
            for _ in range(batches):
                loss()
        finally:
            for handle in hooks:
                handle.remove()
    _refuse_unseen(sites, seen)


def _invertible(C: Tensor) -> Factors:
    """C with as little of the identity added as its inverse needs to be one, and that inverse; as the authors do."""
    damp, eye = 0.01, torch.eye(len(C), dtype=C.dtype, device=C.device)
    while True:
        damped = C + damp * C.diagonal().mean() * eye
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and float(torch.dist(damped @ inverse, eye)) < 0.05:
            return damped, inverse
        require(damp < 1e6, "the inputs of a layer are all zero, so there is nothing to start from")
        damp *= 2


def _refuse_unseen(sites: Sequence[Site], seen: Mapping[str, Tensor]) -> None:
    missing = [site.name for site in sites if site.name not in seen]
    require(
        not missing,
        f"{len(missing)} of {len(sites)} targets play no part in the loss, so their start cannot be found: "
        f"{', '.join(missing[:5])}. Leave them out of targets",
    )


def _refuse_broken(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    require(not broken, f"inputs or gradients are not finite at {', '.join(broken[:5])}", NonFiniteError)
