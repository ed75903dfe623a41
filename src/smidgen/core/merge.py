"""Merging: write what adapters change into the base weights, in fp32, rounded once, in blocks of rows.

16-bit rounding swallows small updates, so a merge that would lose more than allowed of the update at any site is
refused before anything is written.  Where norms alone say that it cannot, the error is measured while writing;
elsewhere before, in a pass of its own.  One layer of every kind is also run both ways.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from . import attach as mechanism
from .adapter import Adapter, AdditiveAdapter
from .composition import Expression, merged, names_in, plan_for
from .errors import MergeError, NotMergeable
from .quantised_linear import QuantisedLinear
from .quantised_merge import Blocks, requantised
from .site import Site

_BLOCK_ELEMENTS = 1 << 18  # of the weight, per block: 1 MB in fp32, which a processor's cache holds
_MARGIN = 1.01  # on norms taken in 16 bits


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.   errors: site -> norm(rounding) / norm(update), of the weight."""

    errors: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest relative error of the update at any site."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        site = max(self.errors, key=self.errors.__getitem__)
        return f"merged {len(self.errors)} sites; relative error of the update at most {self.worst:.1e} ({site})"


def merge_into_base(model: nn.Module, sites: list[Site], expression: Expression, *, max_error: float) -> MergeReport:
    """Write the expression's changes at these sites into the base.  Raises before anything is written."""
    sites = sorted(sites, key=lambda site: site.parameter is None)  # while running, a call sees changed parameters
    _refuse_unmergeable(sites, expression)
    _refuse_tied(model, sites)
    norms = {site.name: _update_norm(site, expression) for site in sites}
    sure = {site.name for site in sites if _surely_fits(site, expression, norms[site.name], max_error)}
    errors = {site.name: 0.0 if site.name in sure else _error(site, expression, norms[site.name]) for site in sites}
    bad = [name for name, error in errors.items() if not error < float("inf")]
    if bad:
        raise MergeError(f"merging would write values that are not finite at {', '.join(bad[:5])}; nothing was changed")
    above = {name: error for name, error in errors.items() if error > max_error}
    if above:
        worst = max(above, key=above.__getitem__)
        site = next(site for site in sites if site.name == worst)
        held = None if (layer := _quantised(site)) is None else layer.format_name
        otherwise = 'make plain layers with merge(into="dense")' if held else "load the base in float32 to merge"
        raise MergeError(
            f"rounding to {held or str(site.stored.dtype).removeprefix('torch.')} would lose up to {above[worst]:.0%} "
            f"of the update ({worst}; {len(above)} of {len(errors)} sites above max_error={max_error}). Nothing was "
            f"changed. Keep the adapter attached, {otherwise}, or allow it: "
            f"merge(..., max_error={math.ceil(100 * above[worst]) / 100})"
        )
    _compare_with_running(sites, expression)
    for site in sites:
        lost = _write(site, expression, measured=site.name in sure)
        if site.name in sure:
            errors[site.name] = lost / cast(float, norms[site.name])
    return MergeReport(errors)


def _find(site: Site, name: str) -> Adapter | None:
    return mechanism.held(site.layer).get(mechanism.key_of(name, site.parameter))


def _own_blocks(site: Site, expression: Expression) -> Blocks:
    """Blocks of rows as they are: (rows, W (rows, I) in its own dtype, bias in fp32 or better)."""
    stored, bias = site.storage.read(site.stored), site.bias
    height, width = site.linear.stack * site.fan_out, site.fan_in
    found = [_find(site, name) for name in names_in(expression)]
    in_blocks = all(adapter is None or adapter.in_blocks for adapter in found)
    step = max(1, _BLOCK_ELEMENTS // max(width, 1)) if in_blocks else height
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        W = site.linear.read_rows(stored, rows)
        yield rows, W, None if bias is None else bias.detach().flatten()[rows].to(_wide(W.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _adding(site: Site, expression: Expression) -> AdditiveAdapter | None:
    """The one adapter that is to be merged here, if it does no more than add to the weight and the bias."""
    adapter = _find(site, expression) if isinstance(expression, str) else None
    return adapter if isinstance(adapter, AdditiveAdapter) and adapter.merges_by_adding else None


def _merged_rows(
    site: Site, expression: Expression, own: Tensor, b: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """These rows of the weight, and of the bias, with the changes in them, in fp32 or better."""
    W, adding = own.to(_wide(own.dtype), copy=True), _adding(site, expression)
    if adding is None:
        return merged(expression, lambda name: _find(site, name), W, b, rows)
    adding.add_weight_delta(W, rows)
    return W, adding.merged_bias(b, rows)


def _blocks(site: Site, expression: Expression) -> Blocks:
    """Blocks of rows: (rows, new, new bias), new (rows, I) in fp32 or better."""
    for rows, own, b in _own_blocks(site, expression):
        yield rows, *_merged_rows(site, expression, own, b, rows)


def _update_norm(site: Site, expression: Expression) -> float | None:
    """The norm of what is added to the weight, where it is known without its entries."""
    adding = _adding(site, expression)
    return None if adding is None or _quantised(site) is not None else adding.weight_delta_norm()


@torch.no_grad()
def _surely_fits(site: Site, expression: Expression, update: float | None, max_error: float) -> bool:
    """Whether norms alone show that the merge may be written.   update: the norm of what is added to the weight.

    |round(x) - x| <= eps / 2 (|x| + tiny), so rounding loses at most eps / 2 (|W| + |update| + tiny sqrt(n)).
    """
    if not update or not site.storage.plain:
        return False
    W, bias = site.storage.writable(site.stored), site.bias
    about, wide = torch.finfo(W.dtype), _wide(W.dtype)
    if about.bits < 16:  # of 8 bits no norm is to be had
        return False
    norm = _MARGIN * (_norm(W) + update)
    lost = 0.0 if W.dtype == wide else about.eps / 2 * (norm + about.tiny * W.numel() ** 0.5)
    if not (norm < about.max and lost <= max_error * update):
        return False
    if bias is None:
        return True
    b = cast(AdditiveAdapter, _adding(site, expression)).merged_bias(bias.detach().flatten().to(wide), slice(None))
    return bool(torch.isfinite(cast(Tensor, b).to(bias.dtype)).all())


@torch.no_grad()
def _error(site: Site, expression: Expression, known: float | None) -> float:
    """norm(round(W + update) - (W + update)) / norm(update); infinite if a merged value is not finite.

    known: the norm of the update, where it is.
    """
    if (layer := _quantised(site)) is not None:
        return requantised(layer, lambda: _blocks(site, expression))[1]
    dtype, update, lost = site.storage.writable(site.stored).dtype, 0.0, 0.0
    for rows, own, b in _own_blocks(site, expression):
        new, b = _merged_rows(site, expression, own, b, rows)
        if b is not None and not torch.isfinite(b.to(cast(Tensor, site.bias).dtype)).all():
            return float("inf")
        if known is None:
            difference = new - own
            update += _squares(difference)
            lost += _squares(difference.copy_(new.to(dtype)).sub_(new))
        else:
            lost += _squares(new.sub_(new.to(dtype)))
    update = update**0.5 if known is None else known
    if not math.isfinite(lost):  # one value that is not finite makes the norm so
        return float("inf")
    return lost**0.5 / update if update else 0.0


def _quantised(site: Site) -> QuantisedLinear | None:
    """The layer whose weight is the site and is held in few bits; its bias is an ordinary tensor."""
    return site.layer if site.parameter is None and isinstance(site.layer, QuantisedLinear) else None


def _squares(x: Tensor) -> float:
    x = x.flatten()
    return float(torch.dot(x, x))


def _norm(W: Tensor) -> float:
    """The Frobenius norm, row by row: one sum over a large weight in 16 bits stops growing."""
    return float(torch.linalg.vector_norm(W, dim=tuple(range(1, W.dim()))).cpu().double().norm())


def _write(site: Site, expression: Expression, *, measured: bool) -> float:
    """Write what is merged into the layer.   Returns the norm of what rounding lost of the weight, if `measured`."""
    layer, bias = _quantised(site), None if site.bias is None else site.bias.data
    if layer is None:
        return _write_into(site.storage.writable(site.stored), bias, site, expression, measured=measured)
    pieces, _ = requantised(layer, lambda: _blocks(site, expression))
    _write_into(None, bias, site, expression)
    layer.take(pieces)
    return 0.0


@torch.no_grad()
def _write_into(
    weight: Tensor | None, bias: Tensor | None, site: Site, expression: Expression, *, measured: bool = False
) -> float:
    """Write the merged weight, in its stored shape, and the merged bias."""
    lost = 0.0
    for rows, new, b in _blocks(site, expression):
        if weight is not None:
            site.linear.write_rows(weight, rows, new)
            if measured:
                lost += _squares(new.sub_(site.linear.read_rows(weight, rows)))
        if bias is not None and b is not None:
            bias.view(-1)[rows] = b.to(bias.dtype)
    return math.sqrt(lost)


def _refuse_unmergeable(sites: list[Site], expression: Expression) -> None:
    for site in sites:
        for name in names_in(expression):
            adapter = _find(site, name)
            if adapter is not None and (not adapter.mergeable or site.kind is None):
                raise NotMergeable(
                    f'"{name}" ({type(adapter).__name__} at {site.name or "the model"}) changes activations, not '
                    "weights, so it cannot be merged. Keep it attached, and merge the others by name."
                )


def _refuse_tied(model: nn.Module, sites: list[Site]) -> None:
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(f"{path}.{name}")
    for site in sites:
        tied = places.get(id(site.stored), [])
        if len(tied) > 1:
            raise MergeError(
                f"{' and '.join(tied)} are one tied tensor: merging at {site.name} would change all of them. Nothing "
                "was changed. Untie them first (give the layer its own copy of the weight) or keep the adapter attached"
            )


@torch.no_grad()
def _compare_with_running(sites: list[Site], expression: Expression) -> None:
    """Run one layer of each kind, the smallest, with the adapters and with the merged weight; MergeError if they
    differ.
    """
    smallest: dict[tuple[object, ...], Site] = {}
    for site in sorted(sites, key=lambda site: site.stored.numel()):
        if site.parameter is None:  # a parameter runs by the same arithmetic that merges it
            kind = (type(site.layer), tuple(type(_find(site, name)) for name in names_in(expression)))
            smallest.setdefault(kind, site)
    generator = torch.Generator().manual_seed(0)
    for site in smallest.values():
        layer, training = site.layer, site.layer.training
        layer.eval()
        x = site.linear.probe(layer, generator)
        base = mechanism.bare_call(layer)
        plan = plan_for(expression, mechanism.held(layer).get)
        running = base(x) if plan is None else plan(base, x)
        with mechanism.replaced(layer, _merged_copies(site, expression)):
            merged_out = base(x)
        layer.train(training)
        tolerance = 1e-4 if running.dtype in (torch.float32, torch.float64) else 3e-2
        gap = float((merged_out - running).norm() / running.norm().clamp_min(1e-12))
        if not gap <= tolerance:
            raise MergeError(
                f"at {site.name} the merged {type(layer).__name__} differs from the running one by {gap:.1e} of its "
                "output; nothing was changed. Its forward does more with the weight than a plain layer of its kind: "
                "keep the adapter attached"
            )


def _merged_copies(site: Site, expression: Expression) -> dict[str, Tensor]:
    """The weight and the bias that `_write` would leave at a site."""
    copies = {"weight": torch.empty_like(site.storage.read(site.stored), dtype=site.stored.dtype)}
    if site.bias is not None:
        copies["bias"] = site.bias.detach().clone()
    _write_into(copies["weight"], copies.get("bias"), site, expression)
    return copies
