"""Selective tuning: train the base model's own most important parameters, as a difference beside the untouched base.

    W' = W + D          D is v at the chosen entries of W and zero elsewhere; v starts at zero

Of all N parameters of the model at most budget * N are trained, the best by one of these:

    by           score of an entry                                             source
    "fisher"     sum over batches of (dL/dw)^2, the empirical diagonal Fisher  FISH mask: Sung et al. 2021, arXiv:2111.09839
    "gradient"   |sum over batches of dL/dw|                                   Zhang et al. 2023, arXiv:2312.10136, there per neuron
    "magnitude"  |w|                                                           Han et al. 2015, arXiv:1506.02626, for pruning
    "last"       its place: the end of the body comes first; no score          Lee et al. 2019, arXiv:1911.03090

The gradients are those of whole batches: a loss gives no others without a backward per row.  With B rows in a batch the
square expects F / B + (1 - 1 / B) g^2, where F is the Fisher per row and g the mean gradient; a loss over batches of one
row gives F itself, as the authors' code does.

Trainable parameters: floor(budget * N) for grain "weights" (or all, if the candidates are fewer), at most that for the
others.  Heads, which are trained whole, are neither scored nor counted in the budget.
Memory: the optimiser holds state for v alone.  While training, every changed tensor exists a second time, as W', and the
gradient of one W' at a time.  Choosing by gradients holds one fp32 copy of the candidates and one gradient at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.attach import HELD
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, NonFiniteError, TargetError, require
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Resolution, Targets, head_modules

By = Literal["fisher", "gradient", "magnitude", "last"]
Grain = Literal["weights", "tensors", "layers"]
Place = tuple[
    str, str
]  # path of the module whose forward reads the parameter, and the parameter's dotted name from there
Chosen = Mapping[Place, Tensor | None]  # flat indices into the stored tensor, sorted; None: all of it
Score = Callable[[Site], Tensor]  # of every entry of a parameter, flat


@method("selective")
@dataclass(frozen=True, kw_only=True)
class Selective(Method):
    """Train the most important parameters of the model itself.  `choose` finds them; `attach` does so where no data is needed.

    budget: the largest share of the model's parameters to train, above 0 and at most 1.
    by: what makes a parameter important.  "fisher" and "gradient" need the task's loss: say `choose(model, loss)` first.
    grain: what is chosen: single "weights" anywhere; whole "tensors"; or whole "layers", a layer being a module with all
        the parameters of its own.  Tensors and layers are taken by the mean score of their entries while they fit.
    targets: only parameters that these modules own; "auto" is all of them but the head.
    """

    budget: float = 0.005
    by: By = "fisher"
    grain: Grain = "weights"

    summary = "W' = W + D, D sparse at the most important entries"
    paper = "Sung et al. 2021, arXiv:2111.09839"
    disk = DiskNames("SMIDGEN_SELECTIVE")

    def check(self) -> None:
        require(0 < self.budget <= 1, f"budget is {self.budget}; it is a share above 0 and at most 1, such as 0.005")
        for name, kind in (("by", By), ("grain", Grain)):
            value, known = getattr(self, name), get_args(kind)
            require(value in known, f'{name} is "{value}"; it is one of {", ".join(known)}')

    def limit(self, model: nn.Module) -> int:
        """The most entries that may be chosen in this model: floor(budget * N)."""
        return math.floor(Fraction(str(self.budget)) * _count(model))  # 0.29 of 100 is 29, not 28.999...

    def accepts(self, site: Site) -> str | None:
        if site.parameter is None:
            return "selective tuning changes parameters, not calls"
        if not site.storage.plain:
            held = f"{type(site.stored).__name__} of {str(site.stored.dtype).removeprefix('torch.')}"
            return f"held as {held}; only plain floating-point tensors can be changed entry by entry"
        return None

    def candidates(self, model: nn.Module) -> tuple[list[Site], dict[str, str]]:
        """The parameters that may be chosen, in the order of the model, and those left out with the reason.

        Raises TargetError if there are none.
        """
        modules = _base_modules(model)
        auto = self.targets.is_auto
        named = {} if auto else {site.name: site for site in self.targets.resolve(model, lambda site: None).sites}
        heads = set(head_modules(model)) if auto else set()
        heads |= {path for path in modules if path and self.heads and Targets(*self.heads).matches(path, modules[path])}
        tied: dict[int, list[str]] = {}
        for name, _, parameter in _own_parameters(modules):
            tied.setdefault(id(parameter), []).append(name)
        sites: list[Site] = []
        left_out: dict[str, str] = {}
        for name, path, parameter in _own_parameters(modules):
            if not (auto or name in named or path in named):
                continue
            site = named.get(name) or _site(modules, name, path, lambda path: _can_be_called(modules, path))
            others = [other for other in tied[id(parameter)] if other != name]
            if any(path == head or path.startswith(head + ".") for head in heads):
                left_out[name] = "part of the head"
            elif others:
                left_out[name] = f"one tied tensor with {' and '.join(others)}: it cannot change in one place alone"
            elif reason := self.accepts(site):
                left_out[name] = reason
            else:
                sites.append(site)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:5])
        require(
            bool(sites),
            f"{self.targets} leaves no parameter of {type(model).__name__} to choose from. "
            + (reasons or "These modules own none; name those inside: block.*"),
            TargetError,
        )
        return sites, left_out

    def choose(self, model: nn.Module, loss: Callable[[], Tensor] | None = None, batches: int = 8) -> "SelectiveChosen":
        """Find the parameters to train.  The model is left as it was, gradients, modes and flags included.

        loss: gives the task's loss on the next batch; called `batches` times, in eval mode.  Only "fisher" and "gradient"
        need it.  Equal scores are decided by the order of the model, so the same scores choose the same entries.
        Raises ConfigError, TargetError, or NonFiniteError if a loss or a score is not finite.
        """
        sites, _ = self.candidates(model)
        score: Score = _magnitude
        if self.by in ("fisher", "gradient"):
            if loss is None:
                raise ConfigError(
                    f'selective by "{self.by}" needs the task\'s loss: attach(model, method.choose(model, loss)), where '
                    'loss() gives the loss of the next batch. by="magnitude" and by="last" need no data'
                )
            sites, scores = gradient_scores(model, sites, loss, batches, squared=self.by == "fisher")
            score = lambda site: scores[site.name]  # noqa: E731
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(site.path if self.grain == "layers" else site.name, []).append(site)
        units, limit = list(groups.values()), self.limit(model)
        if self.by == "last":
            found = _last(units, limit, part=self.grain == "weights")
        elif self.grain == "weights":
            found = _largest(sites, score, limit)
        else:
            found = _best(units, score, limit)
        if not found:
            unit = units[-1] if self.by == "last" else min(units, key=_size)
            need, total = 1 if self.grain == "weights" else _size(unit), _count(model)
            raise ConfigError(
                f"a budget of {self.budget} of {total:,} parameters allows {limit:,}; the {'last' if self.by == 'last' else 'smallest'} "
                f"of {self.grain} ({unit[0].name}) needs {need:,}. Say budget={need / total * 1.01:.3g} or more"
            )
        chosen = {_place(site): found[site.name] for site in sites if site.name in found}
        return SelectiveChosen(
            targets=self.targets, heads=self.heads, budget=self.budget, by=self.by, grain=self.grain, chosen=chosen
        )

    def with_tensors(self, tensors: Mapping[Site, Mapping[str, Tensor]]) -> "SelectiveChosen":
        """The method with its choice as a saved adapter has it.   tensors: of each site, by the names of the adapter's."""
        chosen = {_place(site): saved.get("indices") for site, saved in tensors.items()}
        return SelectiveChosen(
            targets=self.targets, heads=self.heads, budget=self.budget, by=self.by, grain=self.grain, chosen=chosen
        )

    def fitted(self, model: nn.Module) -> Method:
        return self.choose(model)

    def resolve(self, model: nn.Module) -> Resolution:
        return self.choose(model).resolve(model)


@dataclass(frozen=True, kw_only=True)
class SelectiveChosen(Selective):
    """Selective tuning that knows its entries: what `Selective.choose` returns."""

    chosen: Chosen = field(default_factory=dict, compare=False, repr=False)

    def fitted(self, model: nn.Module) -> Method:
        return self

    def resolve(self, model: nn.Module) -> Resolution:
        sites, left_out = self.candidates(model)
        modules, names = _base_modules(model), {site.name for site in sites}
        missing = [f"{path}.{parameter}" for path, parameter in self.chosen if _join(path, parameter) not in names]
        require(
            not missing,
            f"{len(missing)} of {len(self.chosen)} chosen parameters cannot be changed in this {type(model).__name__}: "
            f"{', '.join(missing[:5])}. Choose again for this model: method.choose(model, loss)",
            TargetError,
        )
        found = (Site.at(path, modules[path], parameter) for path, parameter in self.chosen)
        return Resolution(model, tuple(found), tuple(left_out.items()))

    def build(self, site: Site) -> "SelectiveAdapter":
        reason = self.accepts(site)
        require(reason is None, f"{site.name}: {reason}", TargetError)
        require(_place(site) in self.chosen, f"nothing was chosen at {site.name}: choose again for this model")
        return SelectiveAdapter(site, self.chosen[_place(site)])

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(Selective) if f.name not in ("targets", "heads")}


class SelectiveAdapter(Adapter):
    """What is added to one parameter.

    values: (n,) at the flat `indices` (n,) of the stored tensor; without indices, in the stored tensor's own shape.
    """

    indices: Tensor | None

    def __init__(self, site: Site, indices: Tensor | None) -> None:
        super().__init__(site)
        if indices is not None:
            _check_indices(indices, site)
            dtype = torch.int32 if site.stored.numel() <= 2**31 else torch.int64
            indices = indices.to(site.stored.device, dtype, copy=True)
        self.register_buffer("indices", indices)
        self.values = site.empty(*(site.stored.shape if indices is None else indices.shape))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.values)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        if self.indices is None:
            return W + self.site.linear.read_rows(self.values, rows).to(W.dtype), b
        indices, values = self.indices, self.values
        if rows != slice(None):  # while running all rows are asked for at once, and nothing depends on the indices
            first = (rows.start or 0) * W.shape[1]
            here = (indices >= first) & (indices < first + W.numel())
            indices, values = indices[here] - first, values[here]
        return W.flatten().index_add(0, indices, values.to(W.dtype)).view(W.shape), b


def gradient_scores(
    model: nn.Module, sites: list[Site], loss: Callable[[], Tensor], batches: int, *, squared: bool
) -> tuple[list[Site], dict[str, Tensor]]:
    """The sites that the loss reaches, each at the module that was seen to be called, and the scores of their entries.

    Scores are flat, in fp32 or better, by site name: the sum over batches of squared gradients, or the absolute value of
    the sum.  A gradient is added to its score and dropped as soon as the backward has it.
    """
    scores: dict[str, Tensor] = {}
    called: set[int] = set()

    def add_to(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            gradient = cast(Tensor, parameter.grad).to_dense().flatten()  # dense: embeddings may have sparse gradients
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            parameter.grad = None
            scores.setdefault(name, torch.zeros_like(gradient)).add_(gradient.square() if squared else gradient)

        return add

    def note_call(module: nn.Module, args: Any) -> None:
        called.add(id(module))

    modules, parameters = _base_modules(model), [cast(nn.Parameter, site.stored) for site in sites]
    with _scoring(model, parameters):
        hooks = [m.register_forward_pre_hook(note_call) for m in modules.values()]
        hooks += [p.register_post_accumulate_grad_hook(add_to(s.name)) for s, p in zip(sites, parameters, strict=True)]
        try:
            for batch in range(batches):
                value = loss()
                require(value.requires_grad, "loss() gave a value without a gradient; call the model without no_grad")
                require(bool(value.isfinite()), f"the loss of batch {batch} is {float(value)}", NonFiniteError)
                value.backward(inputs=parameters)
        finally:
            for hook in hooks:
                hook.remove()
    broken = [name for name, score in scores.items() if not score.isfinite().all()]
    require(not broken, f"gradients are not finite at {', '.join(broken[:5])}", NonFiniteError)
    require(
        any(score.any() for score in scores.values()), "the loss depends on none of the candidates: nothing to choose"
    )
    if not squared:
        scores = {name: score.abs_() for name, score in scores.items()}
    reached = [site for site in sites if site.name in scores]
    if id(model) in called:
        reached = [_site(modules, s.name, s.path, lambda path: id(modules[path]) in called) for s in reached]
    return reached, scores


@contextmanager
def _scoring(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients for these parameters, uncompiled so that hooks run; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        model.eval()
        for p in parameters:
            p.requires_grad_(True)
            p.grad = None
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad
        for module, training in modes:
            module.training = training


def _magnitude(site: Site) -> Tensor:
    W = site.stored.detach()
    require(not W.is_meta, f"{site.name} is on the meta device: load the model before choosing by magnitude")
    return W.to(torch.promote_types(W.dtype, torch.float32)).abs().flatten()


def _largest(sites: list[Site], score: Score, limit: int) -> dict[str, Tensor | None]:
    """The `limit` largest entries; of equal ones those of earlier tensors, then those of lower index.

    One tensor after another is held against the best so far: nothing is sorted, and no copy of all scores is made.
    """
    count = min(limit, _size(sites))
    if not count:
        return {}
    best = score(sites[0]).new_empty(0, dtype=torch.float64)
    for site in sites:
        values = score(site)
        if len(best) == count:
            values = values[values.to(best.device) > best.min()]
        best = torch.cat([best, values.to(best)])
        if len(best) > count:
            best = best.topk(count, sorted=False).values
    threshold = best.min()
    ties_left = count - int((best > threshold).sum())
    found: dict[str, Tensor | None] = {}
    for site in sites:
        values = score(site).to(threshold.device)
        ties = (values == threshold).nonzero().flatten()[:ties_left]
        ties_left -= len(ties)
        take = values > threshold
        take[ties] = True
        indices = take.nonzero().flatten().cpu()
        if len(indices):
            found[site.name] = None if len(indices) == len(values) else indices
    return found


def _best(units: list[list[Site]], score: Score, limit: int) -> dict[str, Tensor | None]:
    """Whole units by the mean score of their entries, as long as they fit; of equal ones the earlier."""
    means = [sum(float(score(site).sum(dtype=torch.float64)) for site in unit) / _size(unit) for unit in units]
    found: dict[str, Tensor | None] = {}
    for i in sorted(range(len(units)), key=lambda i: -means[i]):
        if _size(units[i]) <= limit:
            limit -= _size(units[i])
            found.update({site.name: None for site in units[i]})
    return found


def _last(units: list[list[Site]], limit: int, *, part: bool) -> dict[str, Tensor | None]:
    """Whole units from the end, up to the first that does not fit; of that one the last entries, if a part may be taken."""
    found: dict[str, Tensor | None] = {}
    for unit in reversed(units):
        size = _size(unit)
        if size > limit:
            if part and limit:
                found[unit[0].name] = torch.arange(size - limit, size)
            break
        limit -= size
        found.update({site.name: None for site in unit})
    return found


def _check_indices(indices: Tensor, site: Site) -> None:
    """Raise ConfigError unless the indices are sorted, different and inside the tensor, as a foreign file's may not be."""
    size = site.stored.numel()
    whole = indices.ndim == 1 and indices.dtype in (torch.int32, torch.int64) and len(indices) > 0
    require(
        whole,
        f"indices at {site.name} are {indices.dtype} of shape {tuple(indices.shape)}; they are whole numbers (n,)",
    )
    inside = int(indices.min()) >= 0 and int(indices.max()) < size
    require(
        inside and bool((indices[1:] > indices[:-1]).all()),
        f"indices at {site.name} run from {int(indices.min())} to {int(indices.max())}; they must be sorted, different and within "
        f"the {size:,} entries of {tuple(site.stored.shape)}. The adapter was made for another model, or its file is damaged",
    )


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if HELD not in path.split(".")}


def _own_parameters(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(dotted name, path of the owner, parameter) in the order of the model; a tied tensor at each of its names."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                yield _join(path, name), path, parameter


def _site(modules: dict[str, nn.Module], name: str, path: str, is_called: Callable[[str], bool]) -> Site:
    """The parameter `name` as a site of the nearest module, at or above `path`, that is called."""
    while path and not is_called(path):
        path = path.rpartition(".")[0]
    return Site.at(path, modules[path], name.removeprefix(path).lstrip("."))


def _can_be_called(modules: dict[str, nn.Module], path: str) -> bool:
    """False for lists of parameters, which have no forward, and within MultiheadAttention, which calls nothing."""
    parent = modules.get(path.rpartition(".")[0])
    return type(modules[path]).forward is not nn.Module.forward and not isinstance(parent, nn.MultiheadAttention)


def _count(model: nn.Module) -> int:
    """N: the parameters of the base model, tied ones once."""
    owned = _own_parameters(_base_modules(model))
    return sum({id(parameter): parameter.numel() for _, _, parameter in owned}.values())


def _size(sites: list[Site]) -> int:
    return sum(site.stored.numel() for site in sites)


def _place(site: Site) -> Place:
    return site.path, cast(str, site.parameter)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
