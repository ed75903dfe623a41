"""Importance: how much each entry of a model's parameters matters, and the choice of the best within a limit.

Scores are of every entry of a parameter in its stored shape, flat, not negative, in fp32 or better.  A choice maps the
name of a site to the chosen entries: their flat indices, sorted, or None for all of the parameter.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from .errors import NonFiniteError, require
from .site import Site
from .targets import modules_of

Indices = Tensor | None
Score = Callable[[Site], Tensor]
Modules = Mapping[str, nn.Module]


def gradient_scores(
    model: nn.Module, sites: list[Site], loss: Callable[[], Tensor], batches: int, *, squared: bool
) -> tuple[list[Site], dict[str, Tensor]]:
    """The sites that the loss depends on, each at the module that was seen to be called, and scores of their entries.

    Scores are flat, in fp32 or better, by the name of the site: the sum over batches of squared gradients, or the
    absolute value of the sum.  A gradient is added to its score, and let go, as soon as the backward has made it.
    """
    scores: dict[str, Tensor] = {}
    called: set[int] = set()

    def add_to(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            gradient = cast(Tensor, parameter.grad).to_dense().flatten()  # those of embeddings may be sparse
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            parameter.grad = None
            scores.setdefault(name, torch.zeros_like(gradient)).add_(gradient.square() if squared else gradient)

        return add

    modules, parameters = dict(modules_of(model)), [cast(nn.Parameter, site.stored) for site in sites]
    with scoring(model, parameters):
        hooks = [m.register_forward_pre_hook(lambda m, args: called.add(id(m))) for m in modules.values()]
        for site, p in zip(sites, parameters, strict=True):
            hooks.append(p.register_post_accumulate_grad_hook(add_to(site.name)))  # type: ignore[no-untyped-call]
        try:
            for batch in range(batches):
                value = loss()
                require(value.requires_grad, "loss() gave a number without a gradient: is the model called in no_grad?")
                require(bool(value.isfinite()), f"the loss of batch {batch} is {value.detach()}", NonFiniteError)
                torch.autograd.backward(value, inputs=parameters)
        finally:
            for hook in hooks:
                hook.remove()
    broken = [name for name, score in scores.items() if not score.isfinite().all()]
    require(not broken, f"gradients are not finite at {', '.join(broken[:5])}", NonFiniteError)
    require(
        any(score.any() for score in scores.values()), "the loss depends on no candidate: there is nothing to choose"
    )
    if not squared:
        scores = {name: score.abs_() for name, score in scores.items()}
    reached = [site for site in sites if site.name in scores]
    if id(model) in called:
        reached = [calling_site(modules, s.name, s.path, lambda path: id(modules[path]) in called) for s in reached]
    return reached, scores


@contextmanager
def scoring(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients for these parameters, and not compiled, so that hooks run; then all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        model.eval()
        for p in parameters:
            p.requires_grad_(True).grad = None
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad).grad = grad
        for module, training in modes:
            module.training = training


def magnitude(site: Site) -> Tensor:
    """|w| of every entry.  Raises ConfigError on the meta device, where there are no values."""
    W = site.stored.detach()
    require(not W.is_meta, f"{site.name} is on the meta device: load the model before choosing by magnitude")
    return W.to(torch.promote_types(W.dtype, torch.float32)).abs().flatten()


def largest(sites: list[Site], score: Score, limit: int) -> dict[str, Indices]:
    """The `limit` largest entries of all, of equal ones the first."""
    count = min(limit, entries(sites))
    if not count:
        return {}
    double = any(site.stored.dtype == torch.float64 for site in sites)

    def bits(site: Site) -> Tensor:  # numbers that are not negative have the order of their bits
        return score(site).double().view(torch.int64) if double else score(site).view(torch.int32)

    threshold, ties_left = _nth_largest(lambda: map(bits, sites), 64 if double else 32, count)
    found: dict[str, Indices] = {}
    for site in sites:
        values = bits(site)
        take = values > threshold
        ties = (values == threshold).nonzero().flatten()[:ties_left]
        take[ties], ties_left = True, ties_left - len(ties)
        indices = take.nonzero().flatten().cpu()
        if len(indices):
            found[site.name] = None if len(indices) == len(values) else indices
    return found


def _nth_largest(values: Callable[[], Iterator[Tensor]], width: int, n: int) -> tuple[int, int]:
    """The n-th largest of all values, integers from 0 of `width` bits, and how many that equal it are among the n.

    Radix selection: 16 bits at a time, from a histogram.  Nothing is sorted, and no more is held than one tensor's own.
    """
    found = 0
    for shift in range(width - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for part in values():
            if shift < width - 16:
                part = part[part >> (shift + 16) == found]
            histogram += torch.bincount(part >> shift & 0xFFFF, minlength=1 << 16).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0)  # entries in this bin and above
        digit = int((at_least >= n).nonzero()[-1])
        n -= int(at_least[digit] - histogram[digit])
        found = found << 16 | digit
    return found, n


def best_units(units: list[list[Site]], score: Score, limit: int) -> dict[str, Indices]:
    """Whole units by the mean score of their entries, as long as they fit; of equal ones the first."""
    means = [sum(float(score(site).sum(dtype=torch.float64)) for site in unit) / entries(unit) for unit in units]
    found: dict[str, Indices] = {}
    for i in sorted(range(len(units)), key=lambda i: -means[i]):
        if entries(units[i]) <= limit:
            limit -= entries(units[i])
            found.update({site.name: None for site in units[i]})
    return found


def last_units(units: list[list[Site]], limit: int, *, part: bool) -> dict[str, Indices]:
    """Whole units from the end up to the first that does not fit; of that the last entries, if a part may be taken."""
    found: dict[str, Indices] = {}
    for unit in reversed(units):
        size = entries(unit)
        if size > limit:
            return found | ({unit[0].name: torch.arange(size - limit, size)} if part and limit else {})
        limit -= size
        found.update({site.name: None for site in unit})
    return found


def check_indices(indices: Tensor, site: Site) -> None:
    """Raise ConfigError unless the indices are sorted, different and inside the tensor; those of a file may not be."""
    size, whole = site.stored.numel(), indices.dtype in (torch.int32, torch.int64)
    fine = whole and indices.ndim == 1 and 0 < len(indices) <= size
    if fine and not indices.is_meta:
        fine = int(indices[0]) >= 0 and int(indices[-1]) < size and bool((indices[1:] > indices[:-1]).all())
    require(
        fine,
        f"the indices at {site.name} are not sorted, different whole numbers below {size:,}, the entries of "
        f"{tuple(site.stored.shape)}. They are of another model, or the file is damaged",
    )


def owned_parameters(modules: Modules) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(dotted name, path of the owner, parameter) in the model's order; a tied tensor under each of its names."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                yield dotted(path, name), path, parameter


def calling_site(modules: Modules, name: str, path: str, is_called: Callable[[str], bool]) -> Site:
    """The parameter `name` as a site of the nearest module, at `path` or above, that is called."""
    while path and not is_called(path):
        path = path.rpartition(".")[0]
    return Site.at(path, modules[path], name.removeprefix(path).lstrip("."))


def has_calls(modules: Modules, path: str) -> bool:
    """False for lists of parameters, which have no forward, and inside MultiheadAttention, which calls nothing."""
    within = modules.get(path.rpartition(".")[0])
    return type(modules[path]).forward is not nn.Module.forward and not isinstance(within, nn.MultiheadAttention)


def count_parameters(model: nn.Module) -> int:
    """N: the parameters of the base model, tied ones once."""
    return sum({id(p): p.numel() for _, _, p in owned_parameters(dict(modules_of(model)))}.values())


def entries(sites: list[Site]) -> int:
    """How many entries the parameters at these sites have together."""
    return sum(site.stored.numel() for site in sites)


def dotted(path: str, name: str) -> str:
    """The name of a parameter from its owner's path and its own name there."""
    return f"{path}.{name}" if path else name
