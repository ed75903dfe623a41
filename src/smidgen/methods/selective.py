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
Memory: the optimiser holds state for v alone.  While training, each changed tensor exists a second time, as W'; that of
a linear layer only while it is multiplied with.
Scoring by gradients holds one copy of the candidates in fp32, and one gradient at a time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..core import importance
from ..core.adapter import Adapter
from ..core.checks import require_one_of
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, TargetError, require
from ..core.importance import Indices, Score
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Resolution, Targets, head_modules, modules_of

By = Literal["fisher", "gradient", "magnitude", "last"]
Grain = Literal["weights", "tensors", "layers"]
Place = tuple[str, str]  # path of the module whose forward reads the parameter, dotted name of the parameter from there


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
        require_one_of(self, "by", get_args(By))
        require_one_of(self, "grain", get_args(Grain))

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
        budget = Fraction(str(self.budget))  # 0.29 of 100 is 29, not 28.999...
        return math.floor(budget * importance.count_parameters(model))

    def candidates(self, model: nn.Module) -> tuple[list[Site], dict[str, str]]:
        """The parameters that may be chosen, in the model's order, and those that may not with the reason."""
        modules, auto = dict(modules_of(model)), self.targets.is_auto
        named = {} if auto else {site.name: site for site in self.targets.resolve(model, lambda site: None).sites}
        heads = set(head_modules(model)) if auto else set()
        heads |= {path for path in modules if path and self.heads and Targets(*self.heads).matches(path, modules[path])}
        names: dict[int, list[str]] = {}
        for name, _, parameter in importance.owned_parameters(modules):
            names.setdefault(id(parameter), []).append(name)
        sites: list[Site] = []
        left_out: dict[str, str] = {}
        for name, path, parameter in importance.owned_parameters(modules):
            if not (auto or name in named or path in named):
                continue
            site = named.get(name) or importance.calling_site(
                modules, name, path, partial(importance.has_calls, modules)
            )
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
        score: Score = importance.magnitude
        if self.by in ("fisher", "gradient"):
            if loss is None:
                raise ConfigError(
                    f'selective by "{self.by}" needs the loss of the task to choose what to train: '
                    "attach(model, method.choose(model, loss)), where loss() gives the loss of the next batch. "
                    'by="magnitude" and by="last" need no data'
                )
            sites, scores = importance.gradient_scores(model, sites, loss, batches, squared=self.by == "fisher")
            score = lambda site: scores[site.name]  # noqa: E731
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(site.path if self.grain == "layers" else site.name, []).append(site)
        units, limit = list(groups.values()), self.limit(model)
        if self.by == "last":
            found = importance.last_units(units, limit, part=self.grain == "weights")
        elif self.grain == "weights":
            found = importance.largest(sites, score, limit)
        else:
            found = importance.best_units(units, score, limit)
        if not found:
            unit = units[-1] if self.by == "last" else min(units, key=importance.entries)
            which = f"the {'last' if self.by == 'last' else 'smallest'} of the {self.grain}, {unit[0].name}, has"
            need, total = 1 if self.grain == "weights" else importance.entries(unit), importance.count_parameters(model)
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
                importance.check_indices(saved["indices"], site)
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
        modules = dict(modules_of(model))
        missing = [
            importance.dotted(path, parameter)
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
            importance.check_indices(indices, site)
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


def _place(site: Site) -> Place:
    return site.path, cast(str, site.parameter)
