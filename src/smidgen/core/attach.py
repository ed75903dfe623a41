"""The one mechanism: put adapters on a live model, take them off.

The layer object stays where it is and takes a subclass of its own class, made on demand, whose forward runs the base
forward through the layer's plan.  PyTorch's own `fully_shard` and `register_parametrization` do the same.  Base keys,
object identity, `isinstance`, attributes and references stay; taking adapters off gives back the class it had.

    layer.smidgen          Held: the adapters that live here, a submodule: their tensors move and save with the model
    layer._smidgen_plan    what acts on the call now: an adapter, a plan of several, or None for the base layer
    layer._smidgen_values  parameter name -> what acts on that parameter's value during the call

Why not hooks, wrappers, parametrisations, tensor subclasses, functional_call: docs/decisions/0002-class-substitution.md
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapter import HELD, Adapter, Call, Held
from .composition import Expression, Plan, Rows, merged, names_in, plan_for
from .kernels import linear_by_making
from .low_rank import is_bare_linear
from .row_slots import Slots
from .site import Site

LEAN_OF = "lean_of"  # attribute of a class that core/lean.py made: the class that the module had
PLAN, VALUES, LIFTED = "_smidgen_plan", "_smidgen_values", "_smidgen_lifted_forward"


@functools.cache
def adapted(base: Any) -> Any:
    """The subclass of `base` whose forward runs through the layer's plan; one per layer class, with its name."""

    @functools.wraps(base.forward)  # inspect.signature(model.forward) keeps telling the truth
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call: Call = self.__dict__.get(LIFTED) or base.forward.__get__(self)  # now: others patch classes too
        if self._smidgen_values:
            call = functools.partial(_with_values, self, call)
        plan = self._smidgen_plan
        return call(*args, **kwargs) if plan is None else plan(call, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # pickled and copied by the base class: the made class has no name to import
        return _restored, (base,), cast(Any, self).__getstate__()

    def extra_repr(self: Any) -> str:
        held = ", ".join(f"{name}: {type(a).__name__}" for name, a in self.smidgen._modules.items())
        return ", ".join(part for part in (base.extra_repr(self), f"adapters=({held})") if part)

    body = {"forward": forward, "__reduce_ex__": __reduce_ex__, "extra_repr": extra_repr, "base_class": base}
    if issubclass(base, nn.Sequential):  # it runs and counts what it holds; the adapters are not part of that
        body["__iter__"] = lambda self: iter([m for name, m in self._modules.items() if name != HELD])
        body["__len__"] = lambda self: len(self._modules) - 1
    for copied in ("__module__", "__qualname__", "__doc__"):
        body[copied] = getattr(base, copied)
    return type(base)(base.__name__, (base,), body)


def _restored(base: Any) -> nn.Module:
    cls = adapted(base)
    return cast(nn.Module, cls.__new__(cls))


def is_adapted(layer: nn.Module) -> bool:
    """True if adapters live at this layer."""
    return HELD in layer._modules and isinstance(layer._modules[HELD], Held)


def held(layer: nn.Module) -> Held:
    """The adapters that live at an adapted layer."""
    return cast(Held, layer._modules[HELD])


def key_of(name: str, parameter: str | None) -> str:
    """Under which key the adapter `name` of a module, or of one of its parameters, is held."""
    return name if parameter is None else f"{name}@{parameter.replace('.', '/')}"


def substitute(layer: nn.Module) -> None:
    """Give a layer the class whose forward runs through a plan; nothing if it has it already."""
    if is_adapted(layer):
        return
    layer.__class__ = cast(Any, getattr(type(layer), LEAN_OF, type(layer)))  # a place with adapters is not lean
    layer.add_module(HELD, Held().train(layer.training))
    set_plans(layer, None, {})
    if "forward" in layer.__dict__:  # accelerate and others patch the instance: keep theirs inside ours
        layer.__dict__[LIFTED] = layer.__dict__.pop("forward")
    layer.__class__ = adapted(cast(Any, type(layer)))


def restore(layer: nn.Module) -> None:
    """Give a layer its own class back if no adapter lives there any more."""
    if not is_adapted(layer) or len(held(layer)):
        return
    layer.__class__ = cast(Any, type(layer)).base_class
    del layer._modules[HELD], layer.__dict__[PLAN], layer.__dict__[VALUES]
    if LIFTED in layer.__dict__:
        layer.__dict__["forward"] = layer.__dict__.pop(LIFTED)


def put_on(site: Site, name: str, adapter: Adapter) -> None:
    """Let an adapter live at its site, inactive."""
    substitute(site.layer)
    adapter.train(site.layer.training)
    held(site.layer).put(key_of(name, site.parameter), adapter)


def take_off(site: Site, name: str) -> None:
    """Remove an adapter from its site; the last one gives the layer its class back."""
    held(site.layer).drop(key_of(name, site.parameter))
    set_plans(site.layer, None, {})
    restore(site.layer)


def adapter_at(site: Site, name: str) -> Adapter:
    """The adapter `name` at its site."""
    return cast(Adapter, held(site.layer).get(key_of(name, site.parameter)))


def plans_at(
    layer: nn.Module, parameters: tuple[str, ...], expression: Expression
) -> "tuple[Plan | None, dict[str, ValuePlan]]":
    """What an expression makes of this layer: the plan of its call, and of each of its parameters that are sites."""
    values: dict[str, ValuePlan] = {}
    for parameter in parameters:
        keys = {name: key_of(name, parameter) for name in names_in(expression)}
        adapters = {name: adapter for name, key in keys.items() if (adapter := held(layer).get(key)) is not None}
        if adapters:
            values[parameter] = ValuePlan(expression, adapters)
    return plan_for(expression, held(layer).get, _slots(layer, expression)), values


def _slots(layer: nn.Module, expression: Expression) -> Slots | None:
    """The layer's copies of adapters for mixed rows.  What acts otherwise may be trained, so it is copied again."""
    holder = held(layer)
    if isinstance(expression, Rows):
        holder.slots = holder.slots or Slots()
    elif holder.slots is not None:
        for name in names_in(expression):
            holder.slots.distrust(holder.get(name))
    return cast("Slots | None", holder.slots)


def set_plans(layer: nn.Module, plan: Plan | None, values: "dict[str, ValuePlan]") -> None:
    """Make these plans what acts at the layer from now on.  Straight into __dict__: a plan is no submodule."""
    layer.__dict__[PLAN], layer.__dict__[VALUES] = plan, values


class ValuePlan:
    """What acts on the value of one parameter while its module's forward runs."""

    def __init__(self, expression: Expression, adapters: dict[str, Adapter]) -> None:
        self.expression, self.adapters = expression, adapters
        self.site = next(iter(adapters.values())).site
        self.storage = self.site.storage

    def trained_tensors(self) -> list[Tensor]:
        """What the value is made of and is trained."""
        base = [self.site.stored] if self.site.stored.requires_grad else []
        return base + [parameter for adapter in self.adapters.values() for parameter in adapter.trained_tensors()]

    def value(self) -> Tensor:
        """The parameter with the active changes in it, in its stored shape and dtype; differentiable."""
        site = self.site
        stored = self.storage.read(site.stored)
        W = site.linear.read_rows(stored, slice(None))
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        changed, _ = merged(self.expression, self.adapters.get, W, None, slice(None))
        return site.linear.as_stored(stored, changed).to(stored.dtype)


def bare_call(layer: nn.Module) -> Call:
    """What the layer does without adapters."""
    return cast(Call, layer.__dict__.get(LIFTED) or cast(Any, type(layer)).base_class.forward.__get__(layer))


@contextmanager
def replaced(owner: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Parameters of a module, by dotted name, replaced while the context lasts.

    An entry in a module's `__dict__` is found before its parameters, which are left alone.
    """
    placed: list[tuple[nn.Module, str, Any]] = []
    try:
        for dotted, value in values.items():
            path, _, name = dotted.rpartition(".")
            module = owner.get_submodule(path)
            placed.append((module, name, module.__dict__.get(name)))  # there already where contexts are nested
            module.__dict__[name] = value
        for module in {id(module): module for module, _, _ in placed if isinstance(module, nn.RNNBase)}.values():
            # it reads this list and not its parameters, and makes the list anew where the references disagree
            own: list[Tensor] = [getattr(module, name) for name in cast(Any, module)._flat_weights_names]
            for name, kept in (("_flat_weights", own), ("_flat_weight_refs", [weakref.ref(w) for w in own])):
                placed.append((module, name, module.__dict__[name]))
                module.__dict__[name] = kept
        yield
    finally:
        for module, name, before in placed:
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before


def planned_call(layer: nn.Module, call: Call) -> Call:
    """A call of the adapted layer with what acts there now around it."""
    if layer.__dict__[VALUES]:
        call = functools.partial(_with_values, layer, call)
    plan = layer.__dict__[PLAN]
    return call if plan is None else functools.partial(plan, call)


def _with_values(layer: nn.Module, call: Call, *args: Any, **kwargs: Any) -> Any:
    plans: dict[str, ValuePlan] = layer.__dict__[VALUES]
    is_bare = len(args) == 1 and is_bare_linear(call) and not torch.is_autocast_enabled(args[0].device.type)
    weight = plans.get("weight") if is_bare else None
    with replaced(layer, {dotted: plan.value() for dotted, plan in plans.items() if plan is not weight}):
        if weight is None:
            return call(*args, **kwargs)
        return linear_by_making(args[0], cast(Any, layer).bias, weight.value, weight.trained_tensors())
