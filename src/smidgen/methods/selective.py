"""Selective tuning: train the most important parameters of the model itself, as a difference beside the untouched base.

    W' = W + D          D is v at the chosen entries of W and zero elsewhere; v starts at zero

Of all N parameters of the model at most budget * N are trained, the best by one of these scores:

    "fisher"     sum of g^2: the empirical diagonal Fisher of a FISH mask    Sung et al. 2021, arXiv:2111.09839
    "gradient"   |sum of g|                                                  Zhang et al. 2023, arXiv:2312.10136
    "magnitude"  |w|, the criterion of pruning                               Han et al. 2015, arXiv:1506.02626
    "last"       the place in the model: the end of the body first           Lee et al. 2019, arXiv:1911.03090

g is dL/dw of a batch, and sums are over batches: gradients of single rows would need a backward each.  With B rows in
a batch g^2 expects F / B + (1 - 1 / B) m^2, F and m being the Fisher and the mean gradient of rows.  Batches of one
row give F itself, as the authors' code does.

Trainable parameters: floor(budget * N) with grain "weights" (or all candidates, if they are fewer), at most that with
others.  Heads are trained whole, and are neither candidates nor part of the budget, though of N.
Memory: the optimiser holds state for v alone.  While training, each changed tensor exists a second time, as W'.
Scoring by gradients holds one copy of the candidates in fp32, and one gradient at a time.
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
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, NonFiniteError, TargetError, require
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Resolution, Targets, _modules, head_modules

By = Literal["fisher", "gradient", "magnitude", "last"]
Grain = Literal["weights", "tensors", "layers"]
Place = tuple[str, str]  # path of the module whose forward reads the parameter, dotted name of the parameter from there
Indices = Tensor | None  # flat, sorted, of the tensor in its stored shape; None: all of it
Score = Callable[[Site], Tensor]  # of every entry of a parameter, flat
Modules = Mapping[str, nn.Module]


@method("selective")
@dataclass(frozen=True, kw_only=True)
class Selective(Method):
    """Train the most important parameters of the model itself.

    budget: the largest share of the model's parameters to train, above 0 and at most 1.
    by: what makes a parameter important.  "fisher" and "gradient" need the task's loss: `choose(model, loss)` first,
        and attach what that returns.  With the others `attach` chooses by itself.
    grain: what is chosen: single "weights" anywhere, whole "tensors", or whole "layers", a layer being a module with
        the parameters of its own.  Tensors and layers are taken by the mean score of their entries while they fit.
    targets: only parameters that these modules own; "auto" is all of them but the head's.
    """

    budget: float = 0.005
    by: By = "fisher"
    grain: Grain = "weights"

    summary = "W' = W + D, where D has few entries, the most important"
    paper = "Sung et al. 2021, arXiv:2111.09839"
    disk = DiskNames("SMIDGEN_SELECTIVE")

    def check(self) -> None:
        require(0 < self.budget <= 1, f"budget is {self.budget}; it is a share above 0 and at most 1, such as 0.005")
        for name, kind in (("by", By), ("grain", Grain)):
            value, known = getattr(self, name), get_args(kind)
            require(value in known, f'{name} is "{value}"; it is one of {", ".join(known)}')

    def accepts(self, site: Site) -> str | None:
        if site.parameter is None:
            return "selective tuning changes parameters, not calls"
        if not site.storage.plain:
            return (
                f"held as {type(site.stored).__name__} of {site.stored.dtype}; only plain floating point can be changed"
            )
        return None

    def limit(self, model: nn.Module) -> int:
        """The most entries that may be chosen in this model: floor(budget * N)."""
        return math.floor(Fraction(str(self.budget)) * _count(model))  # 0.29 of 100 is 29, not 28.999...

    def candidates(self, model: nn.Module) -> tuple[list[Site], dict[str, str]]:
        """The parameters that may be chosen, in the model's order, and those that may not with the reason."""
        modules, auto = dict(_modules(model)), self.targets.is_auto
        named = {} if auto else {site.name: site for site in self.targets.resolve(model, lambda site: None).sites}
        heads = set(head_modules(model)) if auto else set()
        heads |= {path for path in modules if path and self.heads and Targets(*self.heads).matches(path, modules[path])}
        names: dict[int, list[str]] = {}
        for name, _, parameter in _parameters(modules):
            names.setdefault(id(parameter), []).append(name)
        sites: list[Site] = []
        left_out: dict[str, str] = {}
        for name, path, parameter in _parameters(modules):
            if not (auto or name in named or path in named):
                continue
            site = named.get(name) or _site(modules, name, path, lambda path: _has_calls(modules, path))
            if any(path == head or path.startswith(head + ".") for head in heads):
                left_out[name] = "part of the head"
            elif len(names[id(parameter)]) > 1:
                left_out[name] = f"{' and '.join(names[id(parameter)])} are one tied tensor; one cannot change alone"
            elif reason := self.accepts(site):
                left_out[name] = reason
            else:
                sites.append(site)
        return sites, left_out

    def choose(self, model: nn.Module, loss: Callable[[], Tensor] | None = None, batches: int = 8) -> "SelectiveChosen":
        """Find the parameters to train.  The model stays as it was: values, gradients, requires_grad and modes.

        loss: gives the task's loss of the next batch; for "fisher" and "gradient", called `batches` times in eval mode.
        Of entries that score the same, those earlier in the model are taken.
        Raises ConfigError, TargetError, or NonFiniteError if a loss or a gradient is not finite.
        """
        sites, left_out = self.candidates(model)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:5])
        require(
            bool(sites),
            f"{self.targets} leaves no parameter of {type(model).__name__} to choose from. "
            + (reasons or 'Name the modules that own them; those inside a block are "block.*"'),
            TargetError,
        )
        score: Score = _magnitude
        if self.by in ("fisher", "gradient"):
            if loss is None:
                raise ConfigError(
                    f'selective by "{self.by}" needs the loss of the task to choose what to train: '
                    "attach(model, method.choose(model, loss)), where loss() gives the loss of the next batch. "
                    'by="magnitude" and by="last" need no data'
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
            which = f"the {'last' if self.by == 'last' else 'smallest'} of the {self.grain}, {unit[0].name}, has"
            need, total = 1 if self.grain == "weights" else _size(unit), _count(model)
            raise ConfigError(
                f"a budget of {self.budget} of {total:,} parameters allows {limit:,}, and "
                f"{'an entry is' if self.grain == 'weights' else which} {need:,}: "
                f"say budget={need / total * 1.01:.3g} or more"
            )
        return self._chosen({_place(site): found[site.name] for site in sites if site.name in found})

    def with_tensors(self, tensors: Mapping[Site, Mapping[str, Tensor]]) -> "SelectiveChosen":
        """The method with the choice that a saved adapter holds.

        tensors: those of each site, by the adapter's own names; on the meta device they tell sizes and nothing more.
        Raises ConfigError if indices are not sorted, different and inside the tensor that they are of.
        """
        for site, saved in tensors.items():
            if "indices" in saved:
                _check_indices(saved["indices"], site)
        return self._chosen({_place(site): saved.get("indices") for site, saved in tensors.items()})

    def fitted(self, model: nn.Module) -> Method:
        return self.choose(model)

    def resolve(self, model: nn.Module) -> Resolution:
        return self.choose(model).resolve(model)

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(Selective) if f.name not in ("targets", "heads")}

    def _chosen(self, chosen: Mapping[Place, Indices]) -> "SelectiveChosen":
        return SelectiveChosen(targets=self.targets, heads=self.heads, chosen=chosen, **self.settings())


@dataclass(frozen=True, kw_only=True)
class SelectiveChosen(Selective):
    """Selective tuning that knows its entries: what `Selective.choose` returns, to be attached."""

    chosen: Mapping[Place, Indices] = field(default_factory=dict, compare=False, repr=False)  # tensors do not compare

    def fitted(self, model: nn.Module) -> Method:
        return self

    def resolve(self, model: nn.Module) -> Resolution:
        modules = dict(_modules(model))
        missing = [
            _join(path, parameter)
            for path, parameter in self.chosen
            if path not in modules or parameter not in dict(modules[path].named_parameters())
        ]
        require(
            not missing,
            f"{len(missing)} of the {len(self.chosen)} chosen parameters are not in this "
            f"{type(model).__name__}: {', '.join(missing[:5])}. Choose again, for this model",
            TargetError,
        )
        sites = tuple(Site.at(path, modules[path], parameter) for path, parameter in self.chosen)
        return Resolution(model, sites, tuple(self.candidates(model)[1].items()))

    def build(self, site: Site) -> "SelectiveAdapter":
        reason = self.accepts(site)
        require(reason is None, f"{site.name}: {reason}", TargetError)
        require(_place(site) in self.chosen, f"nothing was chosen at {site.name}: choose again, for this model")
        return SelectiveAdapter(site, self.chosen[_place(site)])


class SelectiveAdapter(Adapter):
    """What is added to one parameter.

    values: (n,) at the flat `indices` (n,) of the stored tensor; without indices, in the stored tensor's own shape.
    """

    indices: Tensor | None

    def __init__(self, site: Site, indices: Indices) -> None:
        super().__init__(site)
        held = None
        if indices is not None:
            _check_indices(indices, site)
            dtype = torch.int32 if site.stored.numel() <= 2**31 else torch.int64
            held = torch.empty(len(indices), dtype=dtype, device=site.stored.device).copy_(indices)
        self.register_buffer("indices", held)
        self.values = site.empty(*(site.stored.shape if indices is None else indices.shape))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.values)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        if self.indices is None:
            return W + self.site.linear.read_rows(self.values, rows).to(W.dtype), b
        indices, values = self.indices, cast(Tensor, self.values)
        if rows != slice(None):  # while running it is all rows, and no shape depends on the indices: that compiles
            first = (rows.start or 0) * W.shape[1]
            here = (indices >= first) & (indices < first + W.numel())
            indices, values = indices[here] - first, values[here]
        return W.flatten().index_add(0, indices, values.to(W.dtype)).view(W.shape), b


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

    modules, parameters = dict(_modules(model)), [cast(nn.Parameter, site.stored) for site in sites]
    with _scoring(model, parameters):
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
        reached = [_site(modules, s.name, s.path, lambda path: id(modules[path]) in called) for s in reached]
    return reached, scores


@contextmanager
def _scoring(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
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


def _magnitude(site: Site) -> Tensor:
    W = site.stored.detach()
    require(not W.is_meta, f"{site.name} is on the meta device: load the model before choosing by magnitude")
    return W.to(torch.promote_types(W.dtype, torch.float32)).abs().flatten()


def _largest(sites: list[Site], score: Score, limit: int) -> dict[str, Indices]:
    """The `limit` largest entries of all, of equal ones the first."""
    count = min(limit, _size(sites))
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


def _best(units: list[list[Site]], score: Score, limit: int) -> dict[str, Indices]:
    """Whole units by the mean score of their entries, as long as they fit; of equal ones the first."""
    means = [sum(float(score(site).sum(dtype=torch.float64)) for site in unit) / _size(unit) for unit in units]
    found: dict[str, Indices] = {}
    for i in sorted(range(len(units)), key=lambda i: -means[i]):
        if _size(units[i]) <= limit:
            limit -= _size(units[i])
            found.update({site.name: None for site in units[i]})
    return found


def _last(units: list[list[Site]], limit: int, *, part: bool) -> dict[str, Indices]:
    """Whole units from the end up to the first that does not fit; of that the last entries, if a part may be taken."""
    found: dict[str, Indices] = {}
    for unit in reversed(units):
        size = _size(unit)
        if size > limit:
            return found | ({unit[0].name: torch.arange(size - limit, size)} if part and limit else {})
        limit -= size
        found.update({site.name: None for site in unit})
    return found


def _check_indices(indices: Tensor, site: Site) -> None:
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


def _parameters(modules: Modules) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(dotted name, path of the owner, parameter) in the model's order; a tied tensor under each of its names."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                yield _join(path, name), path, parameter


def _site(modules: Modules, name: str, path: str, is_called: Callable[[str], bool]) -> Site:
    """The parameter `name` as a site of the nearest module, at `path` or above, that is called."""
    while path and not is_called(path):
        path = path.rpartition(".")[0]
    return Site.at(path, modules[path], name.removeprefix(path).lstrip("."))


def _has_calls(modules: Modules, path: str) -> bool:
    """False for lists of parameters, which have no forward, and inside MultiheadAttention, which calls nothing."""
    within = modules.get(path.rpartition(".")[0])
    return type(modules[path]).forward is not nn.Module.forward and not isinstance(within, nn.MultiheadAttention)


def _count(model: nn.Module) -> int:
    """N: the parameters of the base model, tied ones once."""
    return sum({id(p): p.numel() for _, _, p in _parameters(dict(_modules(model)))}.values())


def _size(sites: list[Site]) -> int:
    return sum(site.stored.numel() for site in sites)


def _place(site: Site) -> Place:
    return site.path, cast(str, site.parameter)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
