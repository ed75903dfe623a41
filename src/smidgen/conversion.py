"""Turn adapters of one method into another: what any of them does to weights, as a plain LoRA.

    D = W' - W          for a low-rank method s B A as it stands, and nothing is lost
                        else its best approximation of rank R, U S V^T cut at R (Eckart & Young 1936)

So a server that knows LoRA alone runs OFT, LoHa, a Stack or a Weighted mix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import AdapterSet
from .core import attach as mechanism
from .core.adapter import Adapter
from .core.composition import Expression, merged, names_in
from .core.errors import AttachError, NotMergeable
from .core.layers import ConvKind
from .core.low_rank import LowRankAdapter
from .core.site import Site
from .core.targets import Targets
from .methods.lora import LoRA

_EXACT = 1e-6  # of the change's norm: what fp32 rounds
_DIRECT = 1 << 24  # entries of a matrix up to which all singular values are computed


@dataclass(frozen=True)
class Conversion:
    """What a conversion came to.   errors: site -> norm(D - B A) / norm(D).   ranks: site -> R."""

    errors: dict[str, float]
    ranks: dict[str, int]

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return f"{len(self.ranks)} sites as LoRA of {ranks}; relative error at most {self.errors[worst]:.1e} ({worst})"


@torch.no_grad()
def to_lora(
    adapters: AdapterSet, expression: Expression = None, name: str = "lora", *, rank: int | None = None
) -> Conversion:
    """Add to the model, not activated, a LoRA `name` that does what an expression does, by default what is active.

    rank: R at most; by default as many as it takes to lose nothing but rounding.
    Raises NotMergeable where activations are changed, or a bias is, which LoRA has no room for; nothing is added then.
    """
    expression = adapters.active if expression is None else expression
    names = list(dict.fromkeys(names_in(expression)))
    if not names:
        raise AttachError("nothing to convert: nothing is active. Say which adapter")
    _refuse_heads(adapters, names)
    sites = {site.name: site for each in names for site in adapters.sites(each)}
    found: dict[str, tuple[Site, Tensor, Tensor, float]] = {}
    for site in sites.values():
        A, B, error = _factors(site, expression, rank)
        if len(A):  # else nothing changes here
            place = _called(site)
            found[place.name] = place, A, B, error
    if not found:
        raise AttachError(f"{expression!r} changes nothing yet: there is nothing to convert")
    ranks = {site_name: len(A) for site_name, (_, A, _, _) in found.items()}
    most = max(ranks.values())
    pattern = {site_name: R for site_name, R in ranks.items() if most != R}
    method = LoRA(
        rank=most,
        alpha=float(most),
        rank_pattern=pattern,
        alpha_pattern={site_name: float(R) for site_name, R in pattern.items()},
        targets=Targets.at(site for site, _, _, _ in found.values()),
    )
    adapters.add(method, name)
    for site_name, part in adapters.parts(name).items():
        _, A, B, _ = found[site_name]
        part.get_parameter("A").copy_(A)
        part.get_parameter("B").copy_(B)
    return Conversion({site_name: error for site_name, (_, _, _, error) in found.items()}, ranks)


def _refuse_heads(adapters: AdapterSet, names: list[str]) -> None:
    whole = [name for name in names if adapters.method(name).heads or adapters.method(name).name == "head"]
    if whole:
        raise NotMergeable(
            f'"{whole[0]}" trains modules whole (heads), which a LoRA does not replace. Keep the folder as it is, or '
            "merge it into the model"
        )


def _factors(site: Site, expression: Expression, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """A (R, I), B (O, R) of the change at one site, and what they miss of it."""
    D, size = _change(site, expression)
    only = _at(site, expression) if isinstance(expression, str) else None
    if isinstance(only, LowRankAdapter) and site.linear.stack == 1:
        A, B = only.factors()
        is_product = (B.double() @ A.double() * only.scale - D).norm() <= _EXACT * size
        if is_product and (rank is None or len(A) <= rank):  # not of one that does more with them, such as DoRA
            return A, B * only.scale, 0.0
    return _approximation(D, rank)


def _at(site: Site, name: str) -> Adapter | None:
    return mechanism.held(site.layer).get(mechanism.key_of(name, site.parameter))


def _change(site: Site, expression: Expression) -> tuple[Tensor, float]:
    """D (O, I) in fp64, where W + D - W loses nothing, and norm(W) + norm(D)."""
    reason = None
    if site.kind is None or not site.kind.low_rank or site.kind.stack > 1:
        reason = f"{type(site.layer).__name__} has no single matrix that a LoRA could change"
    elif any(part is not None and not part.mergeable for part in (_at(site, n) for n in names_in(expression))):
        reason = "its adapter changes activations, not weights"
    if reason:
        raise NotMergeable(f"{site.name or 'the model'}: {reason}. Convert without it, or keep the adapter as it is")
    W = site.weight().double()
    b = None if site.bias is None else site.bias.detach().flatten().double()
    changed, b_changed = merged(expression, lambda name: _at(site, name), W, b, slice(None))
    if b is not None and b_changed is not None and not torch.allclose(b, b_changed, rtol=1e-7, atol=1e-7):
        raise NotMergeable(f"{site.name}: the bias is changed too, and LoRA has no room for that. Merge instead")
    return changed - W, float(W.norm() + (changed - W).norm())


def _approximation(D: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    norm = float(D.norm())
    if norm == 0:
        return D.new_empty(0, D.shape[1]), D.new_empty(D.shape[0], 0), 0.0
    if rank is not None and D.numel() > _DIRECT and 4 * rank < min(D.shape):
        U, S, V = torch.svd_lowrank(D, q=rank + 16, niter=4)  # Halko et al. 2011, arXiv:0909.4061
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    missing = S.flip(0).square().cumsum(0).flip(0).sqrt()  # of all from here on
    exact = int((missing > _EXACT * norm).sum())
    R = max(1, exact if rank is None else min(rank, exact))
    A, B = S[:R, None] * Vh[:R], U[:, :R]
    balance = S[:R].sqrt()
    A, B = A / balance[:, None], B * balance
    return A, B, float((D - B @ A).norm()) / norm


def _called(site: Site) -> Site:
    """The layer whose call a LoRA changes, where the method changes its weight's value."""
    is_weight = site.parameter == "weight" and isinstance(site.kind, ConvKind)
    return Site.at(site.path, site.layer) if is_weight else site
