"""AdapterSet: all adapters that live in one model; the handle a user holds.  Got by attach, load and adapters_of."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from .core import attach as mechanism
from .core import lean, lora_plus
from .core.adapter import HELD, Adapter
from .core.composition import Expression, Rows, Stack, Weighted, names_in, weighted_in
from .core.errors import AttachError, PreflightError, TargetError, nearest, require
from .core.merge import MergeReport, merge_into_base
from .core.method import Method
from .core.quantised_merge import made_dense
from .core.rows_apart import run_apart
from .core.site import Site
from .core.targets import Resolution
from .methods.head import Head, head_sites

if TYPE_CHECKING:
    from .formats.read import Loaded

_SET = "_smidgen_set"


def attach(model: nn.Module, method: Method, name: str = "default", *, seed: int | None = None) -> "AdapterSet":
    """Put a new adapter on the model, freeze the base, and return the handle of all adapters in it.

    The first adapter of a model acts at once; a further one waits for `activate`.
    seed: of the adapter's random start; None draws from torch's global generator.
    Raises TargetError or AttachError, and then has changed nothing.
    """
    adapters = adapters_of(model) or AdapterSet(model)
    adapters.add(method, name=name, seed=seed)
    return adapters


def load(model: nn.Module, folder: str | Path, name: str | None = None, *, check_base: bool = True) -> "AdapterSet":
    """Put the adapters of a folder on the model: of one that `save` wrote, or Hugging Face PEFT.

    If the model had none, what was active when they were saved acts at once; else they wait for `activate`.
    name: what to call the one adapter of a folder; of several, which one to load.
    check_base: refuse an adapter that was trained on other weights than the model has.
    Raises FolderError or AttachError, and then has changed nothing.
    """
    from .formats.read import read_folder  # here: what never loads or saves need not wait for half of the package

    adapters = adapters_of(model) or AdapterSet(model)
    empty = not adapters.names
    content = read_folder(folder, model, name, check_base=check_base, head_sites=adapters._head_sites)
    for loaded in content.adapters:
        adapters._check_name(loaded.name)
    added: list[str] = []
    try:
        for loaded in content.adapters:
            adapters._put(loaded.method, loaded.name, loaded.resolution, None, saved=loaded)
            added.append(loaded.name)
            loaded.fill(adapters.parts(loaded.name))
    except BaseException:
        for done in added:
            adapters.delete(done)
        raise
    if empty and content.active is not None:
        active: Expression = content.active
        for loaded in content.adapters:
            active = _renamed(active, loaded.saved_as, loaded.name)
        adapters.activate(active)
    return adapters


def adapters_of(model: nn.Module) -> "AdapterSet | None":
    """The handle of the adapters that live in this model (also after deepcopy or unpickling), or None."""
    return cast("AdapterSet | None", model.__dict__.get(_SET))


@dataclass(frozen=True)
class Entry:
    """One adapter: its method and where its parts live."""

    method: Method
    resolution: Resolution
    sites: tuple[Site, ...]  # the method's, then the heads'


class AdapterSet:
    """All adapters in one model.  The model stays what it was: same object, same keys, same class names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._entries: dict[str, Entry] = {}
        self._active: Expression = None
        self._trained_before: dict[str, bool] = {}
        self._kept_places: dict[nn.Module, tuple[str, ...]] | None = None
        self._nesting_before: list[nn.TransformerEncoder] = []
        self._following: tuple[Any, ...] = ()  # hooks of an optimiser
        self._done = self._steps = 0

    # -- what is there

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order they came."""
        return list(self._entries)

    @property
    def active(self) -> Expression:
        """What acts now: a name, a Stack, Weighted or Rows of names, or None for the base model."""
        return self._active

    def method(self, name: str) -> Method:
        """The method of an adapter, with the settings it has."""
        return self._entry(name).method

    def sites(self, name: str) -> tuple[Site, ...]:
        """Where an adapter lives, heads included."""
        return self._entry(name).sites

    def parts(self, name: str) -> dict[str, Adapter]:
        """The adapter's parts by the name of their site."""
        return {site.name: mechanism.adapter_at(site, name) for site in self.sites(name)}

    def named_parameters(self, *names: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of these adapters, by default of those that are active, under "<site>.<tensor>"."""
        for name in names or dict.fromkeys(names_in(self._active)):
            for site_name, part in self.parts(name).items():
                for tensor_name, parameter in part.named_parameters():
                    yield f"{site_name}.{tensor_name}".lstrip("."), parameter

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """What an optimiser should train: the parameters of these adapters, by default of those that are active."""
        return [parameter for _, parameter in self.named_parameters(*names)]

    def parameter_groups(
        self,
        learning_rate: float,
        *,
        weight_decay: float = 0.0,
        ratio: float = 16.0,
        embedding_learning_rate: float = 1e-6,
    ) -> list[dict[str, Any]]:
        """LoRA+'s groups for an optimiser, of what is active and trained: B learns `ratio` times faster than A.

        AdamW(adapters.parameter_groups(1e-4)).   Hayou et al. 2024, arXiv:2402.12354; core/lora_plus.py.
        Raises ConfigError where no active method has a B.
        """
        parts = [
            (mechanism.adapter_at(site, name), entry.method.faster if number < len(entry.resolution.sites) else ())
            for name, entry in self._entries.items()
            if name in names_in(self._active)
            for number, site in enumerate(entry.sites)
        ]
        return lora_plus.groups(parts, learning_rate, weight_decay, ratio, embedding_learning_rate)

    def report(self, name: str | None = None) -> str:
        """Which sites were adapted, which share of the model's weights they hold, what was left out and why."""
        return "\n".join(
            f'"{n}": {self._entry(n).method.name}, {sum(p.numel() for p in self.parameters(n)):,} parameters, '
            f"{self._entry(n).resolution.report()}"
            for n in ([name] if name else self.names)
        )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {entry.method.name}" for name, entry in self._entries.items())
        return f"AdapterSet({type(self.model).__name__}; {parts}; active: {self._active!r})"

    # -- adding and removing

    def add(self, method: Method, name: str = "default", *, seed: int | None = None) -> "AdapterSet":
        """Put a further adapter on the model; `activate` makes it act.  See `attach`."""
        method = method.fitted(self.model)
        resolution = method.resolve(self.model)
        return self._put(method, name, resolution, seed)

    def _put(
        self, method: Method, name: str, resolution: Resolution, seed: int | None, *, saved: "Loaded | None" = None
    ) -> "AdapterSet":
        self._check_name(name)
        sites = (*resolution.sites, *self._head_sites(method))
        self._refuse_foreign(sites)
        twice = [site_name for site_name, count in Counter(site.name for site in sites).items() if count > 1]
        if twice:
            raise AttachError(
                f'adapter "{name}" would live twice at {", ".join(twice)}: it is both a target and a head'
            )
        if saved is not None and saved.parts is not None:
            parts, shared = list(saved.parts.values()), None
        else:
            parts = [method.build(site) for site in resolution.sites]
            parts += [Head().build(site) for site in sites[len(resolution.sites) :]]
            shared = method.shared(resolution.sites)
        if shared is not None:
            parts[0].add_module("shared", shared)  # held once
            for part in parts[1 : len(resolution.sites)]:
                part.__dict__["shared"] = shared  # and only referred to elsewhere
            shared.prepare()
        for part in parts:
            part.prepare()
        if saved is None:
            generators = {}
            for part in parts:
                device = next((p.device for p in part.parameters()), torch.device("cpu"))
                if seed is not None and device.type != "meta" and device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(seed)
                part.reset(generators.get(device))
                if isinstance(part._modules.get("shared"), nn.Module):
                    shared.reset(generators.get(device))  # type: ignore[union-attr]
        if not self._entries:
            self.freeze_base()
            self._keep_encoders_from_nesting()
            self.model.__dict__[_SET] = self
        for site, part in zip(sites, parts, strict=True):
            mechanism.put_on(site, name, part)
        self._entries[name] = Entry(method, resolution, sites)
        _add_places(self._places(), sites)
        if len(self._entries) == 1:
            self.activate(name)
        return self

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; what is active stays active."""
        entry = self._entry(old)
        self._check_name(new)
        for site in entry.sites:
            part = mechanism.adapter_at(site, old)
            mechanism.put_on(site, new, part)
            mechanism.held(site.layer).drop(mechanism.key_of(old, site.parameter))
        self._entries = {new if name == old else name: e for name, e in self._entries.items()}
        self.activate(_renamed(self._active, old, new))

    def delete(self, name: str) -> None:
        """Remove an adapter for good.  Raises AttachError while it is active in a composition of several."""
        entry = self._entry(name)
        if name in names_in(self._active) and self._active != name:
            raise AttachError(f'"{name}" acts in {self._active!r}: activate something without it first')
        if self._active == name:
            self.activate(None)
        for site in entry.sites:
            mechanism.take_off(site, name)
        del self._entries[name]
        self._kept_places = None
        if self._entries:
            self.activate(self._active)
        else:
            self._unfreeze()

    def detach(self) -> nn.Module:
        """Take all adapters off: the model is bit for bit what it was, class, keys and requires_grad included."""
        self.activate(None)
        for name in self.names:
            self.delete(name)
        return self.model

    def freeze_base(self) -> None:
        """Set requires_grad to False on every parameter of the base; `detach` gives back what it was."""
        for name, parameter in self._base_parameters():
            self._trained_before.setdefault(name, parameter.requires_grad)
            parameter.requires_grad_(False)

    def _unfreeze(self) -> None:
        lean.take_off(self.model)
        for name, parameter in self._base_parameters():
            parameter.requires_grad_(self._trained_before.get(name, parameter.requires_grad))
        self._trained_before = {}
        for encoder in self._nesting_before:
            encoder.use_nested_tensor = True
        self._nesting_before = []
        self.model.__dict__.pop(_SET, None)

    def lean(self) -> list[str]:
        """Let frozen norms and feed-forwards keep less for backward, with the same output; returns their paths.

        Those whose form is recognised, and whose output and gradients agree with it when they are tried, get a backward
        that is written by hand.  See core/lean.py.  `detach` gives back what was.
        """
        return lean.put_on(self.model)

    def _keep_encoders_from_nesting(self) -> None:
        """nn.TransformerEncoder packs a padded batch into a nested tensor, which only its fused layers can read."""
        self._nesting_before = [
            m for m in self.model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor
        ]
        for encoder in self._nesting_before:
            encoder.use_nested_tensor = False

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if HELD not in name.split("."):
                yield name, parameter

    # -- what acts

    def activate(self, expression: Expression) -> None:
        """Choose what acts: a name, Stack, Weighted or Rows of names, or None for the base model.

        requires_grad is left alone.
        """
        for name in names_in(expression):
            self._entry(name)
        for name in weighted_in(expression):
            if not all(part.weightable for part in self.parts(name).values()):
                raise AttachError(
                    f'"{name}" ({self.method(name).name}) changes what the model reads; a share of that means nothing, '
                    "so it cannot be weighted. Activate it alone, or in a Stack"
                )
        if isinstance(self._active, Rows):
            mechanism.restore(self.model)  # it may have been taken for rows run apart
        if isinstance(expression, Rows) and not self._all_by_row(expression):
            mechanism.substitute(self.model)
            run_apart(self.model, expression, self._set_plans)
        else:
            self._set_plans(expression)
        self._active = expression

    def _set_plans(self, expression: Expression) -> None:
        for layer, parameters in self._places().items():
            mechanism.set_plans(layer, *mechanism.plans_at(layer, parameters, expression))

    def _all_by_row(self, expression: Expression) -> bool:
        """True if every layer can give each row of a batch its own adapter; else the rows have to run apart."""
        return all(
            part.by_row and part.site.parameter is None
            for name in dict.fromkeys(names_in(expression))
            for part in self.parts(name).values()
        )

    def rows(self, parts: Sequence[Expression]) -> AbstractContextManager[None]:
        """A mixed batch: within this context row i of every batch runs with parts[i], or with the base where None."""
        return self._acting(Rows(*parts))

    def off(self) -> AbstractContextManager[None]:
        """Within this context nothing acts: the model is the base."""
        return self._acting(None)

    @contextmanager
    def _acting(self, expression: Expression) -> Iterator[None]:
        """Within this context this acts, and afterwards what did before."""
        before = self._active
        self.activate(expression)
        try:
            yield
        finally:
            self.activate(before)

    def check_gradients(self) -> None:
        """After a backward and before the step: raise PreflightError if a trainable adapter tensor got no gradient."""
        idle = [name for name, p in self.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            raise PreflightError(
                f"{len(idle)} adapter parameters got no gradient, so they would never learn: {', '.join(idle[:5])}"
                f"{' ...' if len(idle) > 5 else ''}. The model reads these weights without calling the layer, or the "
                "loss does not depend on them. Reach them as parameters: "
                'Targets("*.attn").parameter("in_proj_weight")'
            )

    def follow(self, optimizer: torch.optim.Optimizer, steps: int, *, done: int = 0) -> None:
        """Let methods that change while training (a rank budget, a penalty) see every step of this optimiser.

        Once, before the first of `steps`; `done` are behind already.   optimizer: torch's, or accelerate's around it.
        Methods whose ranks or masks change refuse to train without; a penalty is left out then.  Others need no call.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        for handle in self._following:
            handle.remove()
        self._done, self._steps = done, steps
        before = optimizer.register_step_pre_hook(lambda *_: self._before_step())
        after = optimizer.register_step_post_hook(lambda *_: self._after_step())
        self._following = (before, after)
        for name in self.names:
            for part in self.parts(name).values():
                part.followed = True

    def _before_step(self) -> None:
        for name, entry in self._entries.items():
            trained = [p for p in self.parameters(name) if p.requires_grad]
            with torch.enable_grad():
                penalty = entry.method.penalty(self.parts(name)) if trained else None
            if penalty is None:
                continue
            for parameter, gradient in zip(
                trained, torch.autograd.grad(penalty, trained, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    @torch.no_grad()
    def _after_step(self) -> None:
        self._done += 1
        for name, entry in self._entries.items():
            entry.method.after_step(self.parts(name), self._done, self._steps)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_following": ()}  # a copy follows no optimiser

    # -- saving

    def save(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        base_model: str | None = None,
        task_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        """Write adapters into a folder that `load` reads, and Hugging Face PEFT where it has the method.

        By default all: a single one at the folder's root, several in sub-folders by name with their composition.
        base_model: path or name of the base, by default what its config remembers.   task_type: HF PEFT's, "CAUSAL_LM".
        extra: numbers, texts, lists and mappings to keep with them.   replace: an adapter folder that is there goes.
        Raises FolderError, and then what was there is still there.
        """
        from .formats.write import About, Placed, write_folder  # here: as in `load`

        names = self.names if name is None else [name]
        if not names:
            raise AttachError("nothing to save: the model has no adapters")
        placed = []
        for each in names:
            entry, count = self._entry(each), len(self._entry(each).resolution.sites)
            sites, heads = entry.sites[:count], entry.sites[count:]
            placed.append(Placed(name=each, method=entry.method, sites=sites, heads=heads, parts=self.parts(each)))
        about = About(base_model=base_model, task_type=task_type, extra=extra)
        write_folder(folder, self.model, placed, self._active, about, replace=replace)

    # -- merging

    def merge(
        self,
        expression: Expression = None,
        *,
        max_error: float = 0.05,
        into: Literal["same", "dense"] = "same",
        dtype: torch.dtype | None = None,
    ) -> MergeReport:
        """Write what an expression changes (by default what is active) into the base weights and remove those adapters.

        Computed in fp32 and rounded once, in blocks of rows.  max_error: the largest relative error of the update that
        rounding to the weight's dtype may cause at any site; above it nothing is changed and MergeError says where.
        into: "same" keeps weights as they are held, and quantises anew what is held in few bits; "dense" first makes
        plain nn.Linear layers of all that are, in `dtype`, which the whole model then has; by default in their own.
        Raises NotMergeable or MergeError before anything is written.  There is no unmerge: rounding is not undone.
        """
        expression = self._active if expression is None else expression
        names = list(dict.fromkeys(names_in(expression)))
        if not names:
            raise AttachError(
                f"nothing to merge: nothing is active. The model has {', '.join(self._entries) or 'no adapters'}"
            )
        sites = {site.name: site for name in names for site in self._entry(name).sites}
        require(into in ("same", "dense"), f'into is "{into}"; it is "same" or "dense"', AttachError)
        require(
            into == "dense" or dtype is None, 'dtype is of plain layers: merge(into="dense", dtype=...)', AttachError
        )
        with made_dense(self.model, dtype) if into == "dense" else nullcontext():
            report = merge_into_base(self.model, list(sites.values()), expression, max_error=max_error)
        if dtype is not None:
            self.model.to(dtype)
        rest = self._active if not set(names_in(self._active)) & set(names) else None
        self.activate(None)
        for name in names:
            self.delete(name)
        if self._entries:
            self.activate(rest)
        return report

    # -- helpers

    def _refuse_foreign(self, sites: Sequence[Site]) -> None:
        """Raise AttachError where adapters live that were put on through a part of this model, or a model around it."""
        ours = self._places()
        adapted = [site for site in sites if mechanism.is_adapted(site.layer) and site.layer not in ours]
        foreign = [site.name for site in adapted if len(mechanism.held(site.layer))]
        if foreign:
            raise AttachError(
                f"{', '.join(foreign[:5])}: adapters live there that were attached to another model, of which this is "
                "a part, or that is a part of this. Use that handle, adapters_of(that_model), or detach it first"
            )

    def _head_sites(self, method: Method) -> list[Site]:
        if not method.heads:
            return []
        sites = head_sites(self.model, method.heads, [name for name, _ in self._base_parameters()])
        refused = [f"{site.name}: {reason}" for site in sites if (reason := Head().accepts(site))]
        if refused:
            raise TargetError(f"heads={method.heads} cannot be trained. {'; '.join(refused[:5])}")
        return sites

    def _places(self) -> dict[nn.Module, tuple[str, ...]]:
        """Every adapted layer, with those of its parameters that are sites; kept until adapters go."""
        if self._kept_places is None:
            self._kept_places = {}
            for entry in self._entries.values():
                _add_places(self._kept_places, entry.sites)
        return self._kept_places

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            near = nearest(name, self._entries)
            raise AttachError(
                f'there is no adapter "{name}" in this model; it has {", ".join(self._entries) or "none"}.'
                + (f' Did you mean "{near[0]}"?' if near else "")
            )
        return self._entries[name]

    def _check_name(self, name: str) -> None:
        if name in self._entries:
            raise AttachError(
                f'the model has an adapter "{name}" already: choose another name, or adapters.delete("{name}") first'
            )
        if not name or any(mark in name for mark in "./@\\") or name != name.strip():
            raise AttachError(f'"{name}" is no name for an adapter: it may not be empty or contain . / @ \\')


def _add_places(places: dict[nn.Module, tuple[str, ...]], sites: Sequence[Site]) -> None:
    for site in sites:
        parameters = places.setdefault(site.layer, ())
        if site.parameter is not None and site.parameter not in parameters:
            places[site.layer] = (*parameters, site.parameter)


def _renamed(expression: Expression, old: str, new: str) -> Expression:
    if isinstance(expression, str):
        return new if expression == old else expression
    if isinstance(expression, Weighted):
        return Weighted({cast(str, _renamed(part, old, new)): weight for part, weight in expression.parts})
    if isinstance(expression, Stack | Rows):
        return type(expression)(*(_renamed(part, old, new) for part in expression.parts))
    return None
