"""Lean: frozen parts of the model that keep less for backward than torch's graph of their own forward would.

    RMSNorm         y = w * x / r, r = sqrt(mean(x^2) + eps): x is kept in its own dtype, and no copy of it in fp32
    feed-forward    out(act(gate(x)) * up(x)), or out(act(up(x))): what stands in the brackets is made again in backward

The module's own forward gives the output, to the last bit; the backward is ours.  A module is recognised by what it
has, not by its name, and then tried: where output or gradient differ from the module's own it is left alone.  So is one
with hooks, with a forward patched onto it, or with adapters of its own.

As in core/attach.py the object stays and takes a subclass of its class.  Where a graph is not being recorded, where
torch.compile is at work (it decides itself what to keep), and where the norm's weight is trained, the own forward runs.
Why it is asked for and not part of `attach`: docs/decisions/0011-lean-is-asked-for.md
"""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attach import LEAN_OF, PLAN, VALUES, bare_call, is_adapted
from .blocks import FeedForward, feedforwards
from .kernels import remade
from .low_rank import LowRankAdapter
from .targets import modules_of

_EPS = ("variance_epsilon", "eps", "epsilon")


def put_on(model: nn.Module) -> list[str]:
    """Make lean what can be, and return the paths; what is lean already stays so."""
    wholes = {part.path: part for part in feedforwards(model) if part.whole}
    found = []
    with torch.random.fork_rng(devices=[]):  # what is tried may draw
        for path, module in modules_of(model):
            if hasattr(type(module), LEAN_OF):
                found.append(path)
            elif _is_plain(module):
                made = _norm_of(module) or (_feedforward_of(module, wholes[path]) if path in wholes else None)
                if made is not None:
                    module.__class__ = made
                    found.append(path)
    return found


def take_off(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        module.__class__ = cast(Any, getattr(type(module), LEAN_OF, type(module)))


# -- norms


class _FrozenRMSNorm(torch.autograd.Function):
    """run(x) for a run that computes y = (w + shift) * x / r.

    g  = (w + shift) * dy       (..., C)
    dx = g / r - x mean(g x) / r^3
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, run: Callable[[Tensor], Tensor], eps: float, shift: float) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.eps, ctx.shift = eps, shift
        return run(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, g = x.to(wide), dy.to(wide) * (w.to(wide) + ctx.shift)
        r = torch.rsqrt(rows.square().mean(-1, keepdim=True) + ctx.eps)  # 1 / r of the formula
        along = (g * rows).mean(-1, keepdim=True) * r**3
        return torch.addcmul(g * r, rows, along, value=-1).to(x.dtype), None, None, None, None


@functools.cache
def _lean_norm(base: Any, eps: str, shift: float) -> Any:
    own = base.forward

    @functools.wraps(own)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        w = self.weight
        if args or kwargs or base.forward is not own or w.requires_grad or not _is_recorded(x):
            return cast(Tensor, base.forward(self, x, *args, **kwargs))
        run = functools.partial(own, self)
        return cast(Tensor, _FrozenRMSNorm.apply(x, w, run, getattr(self, eps), shift))  # type: ignore[no-untyped-call]

    return _subclass(base, forward, (_lean_norm, eps, shift))


def _norm_of(module: nn.Module) -> Any:
    """The lean class for an RMSNorm with a frozen weight, or None."""
    names = [name for name, _ in module.named_parameters()]
    eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    if names != ["weight"] or eps is None or any(True for _ in module.children()):
        return None
    w = cast(Tensor, module.weight)
    if w.dim() != 1 or w.is_meta or not w.is_floating_point() or w.requires_grad:
        return None
    probe = copy.deepcopy(module).float()
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[1.0], [1e-2], [1e-4]])  # small rows show eps
    x = (torch.randn(3, len(w), generator=generator) * sizes).to(w.device)
    for shift in (0.0, 1.0):  # Gemma's weight is what is added to one
        lean = copy.copy(probe)
        lean.__class__ = _lean_norm(cast(Any, type(module)), eps, shift)
        if _agree(probe, lean, x):
            return type(lean)
    return None


# -- feed-forwards


@dataclass(frozen=True)
class _Names:
    """What the parts of a feed-forward are called; idle: dropouts that drop nothing, and identities."""

    inputs: tuple[str, ...]
    activation: str
    output: str
    idle: tuple[str, ...]


@functools.cache
def _lean_feedforward(base: Any, names: _Names) -> Any:
    own = base.forward

    @functools.wraps(own)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        act = getattr(self, names.activation)
        wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not args and not kwargs
        if not wanted or base.forward is not own or _has_tensors(act) or any(_drops(self, name) for name in names.idle):
            return cast(Tensor, base.forward(self, x, *args, **kwargs))
        made_of = [getattr(self, name)(x) for name in names.inputs]
        make = act if len(made_of) == 1 else functools.partial(_gated, act)
        output = getattr(self, names.output)
        if not any(part.requires_grad for part in made_of):  # nothing of it is kept for them
            return cast(Tensor, output(make(*made_of)))
        return _through(output, make, made_of)

    return _subclass(base, forward, (_lean_feedforward, names))


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _through(layer: nn.Module, make: Callable[..., Tensor], made_of: list[Tensor]) -> Tensor:
    """layer(make(*made_of)), of which what is made is not kept."""
    plan = layer.__dict__.get(PLAN)
    if isinstance(plan, LowRankAdapter) and not layer.__dict__[VALUES] and _is_called_plainly(layer):
        y = plan.of_made(bare_call(layer), make, made_of)
        if y is not None:
            return y
    return cast(Tensor, layer(remade(make, *made_of)))


def _feedforward_of(module: nn.Module, part: FeedForward) -> Any:
    """The lean class for a module that is a whole feed-forward with separate inputs, or None."""
    *inputs, output = (path.removeprefix(f"{part.path}.") for path in (*part.inputs, part.output))
    others = {name: child for name, child in module.named_children() if name not in (*inputs, output)}
    idle = [name for name in others if not _drops(module, name)]
    acts = [name for name in others if name not in idle]
    if len(acts) != 1 or _has_tensors(others[acts[0]]) or any(True for _ in module.parameters(recurse=False)):
        return None
    if any("." in name for name in (*inputs, output)):
        return None
    generator = torch.Generator().manual_seed(0)
    small = {name: nn.Linear(3, 5) for name in inputs} | {output: nn.Linear(5, 3)}
    for linear in small.values():
        for parameter in linear.parameters():
            parameter.detach().normal_(generator=generator)
    probe = copy.copy(module)
    probe.__dict__["_modules"] = {name: small.get(name, child) for name, child in module.named_children()}
    lean = copy.copy(probe)
    lean.__class__ = _lean_feedforward(cast(Any, type(module)), _Names(tuple(inputs), acts[0], output, tuple(idle)))
    return type(lean) if _agree(probe, lean, torch.randn(64, 3, generator=generator)) else None


def _drops(module: nn.Module, name: str) -> bool:
    """False of a part that passes on what it gets."""
    child = getattr(module, name)
    return not isinstance(child, nn.Identity) and not (isinstance(child, nn.Dropout) and child.p == 0)


def _has_tensors(module: nn.Module) -> bool:
    return any(True for tensors in (module.parameters(), module.buffers()) for _ in tensors)


# -- what both need


def _subclass(base: Any, forward: Callable[..., Tensor], made_by: tuple[Any, ...]) -> Any:
    make, *settings = made_by

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _restored, (make, base, *settings), cast(Any, self).__getstate__()

    body: dict[str, Any] = {"forward": forward, "__reduce_ex__": __reduce_ex__, LEAN_OF: base}
    for copied in ("__module__", "__qualname__", "__doc__"):
        body[copied] = getattr(base, copied)
    return type(base)(base.__name__, (base,), body)


def _restored(make: Callable[..., Any], base: Any, *settings: Any) -> nn.Module:
    cls = make(base, *settings)
    return cast(nn.Module, cls.__new__(cls))


def _is_plain(module: nn.Module) -> bool:
    """True if nothing but the class says what a call of the module does."""
    return not is_adapted(module) and not isinstance(module, torch.jit.ScriptModule) and _is_called_plainly(module)


def _is_called_plainly(module: nn.Module) -> bool:
    """True if no hook sees a call of the module, and no forward is patched onto it."""
    own: Iterable[str] = (name for name in module.__dict__ if name.endswith("_hooks") and "state_dict" not in name)
    patched = "forward" in module.__dict__ or any(module.__dict__[name] for name in own)
    return not patched and not cast(Any, nn.modules.module)._has_any_global_hook()


def _is_recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def _agree(module: nn.Module, lean: nn.Module, x: Tensor) -> bool:
    """True if both give the same output to the last bit, and the same gradient of x."""
    results = []
    try:
        for each in (module, lean):
            inputs = x.detach().requires_grad_()
            with torch.enable_grad():
                y = each(inputs)
                gradient = torch.autograd.grad((y * torch.arange(1, y.shape[-1] + 1, device=y.device)).sum(), inputs)[0]
            results.append((y, gradient))
    except Exception:  # whatever it is, it is not what it was taken for
        return False
    (y, dx), (y_lean, dx_lean) = results
    return torch.equal(y, y_lean) and bool(((dx - dx_lean).norm(dim=-1) <= 1e-4 * dx.norm(dim=-1)).all())
