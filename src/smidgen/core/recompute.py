"""Recompute: blocks that keep little for backward and compute the rest once more there (activation checkpointing).

    level    a block keeps                                            computed again in the backward
    off      all that its backward reads                              nothing
    cheap    its inputs, and what products and attention gave out     norms, activations, rotations, sums, low rank
    all      its inputs                                               the block
    Chen et al. 2016, arXiv:1604.06174; what is dear to compute again: Korthikanti et al. 2022, arXiv:2205.05198.

Gradients are the same to the bit: a block runs again with the random numbers, the autocast and the active adapters that
it had, whatever has been switched since, and running statistics move once.  It acts wherever gradients are on, in
`eval()` too, where transformers' own `gradient_checkpointing_enable` silently does nothing.

torch's own selective contexts refuse an output that is changed in place afterwards, as the low-rank product of
`kernels.py` changes the frozen one's, so what is kept is recorded here.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .attach import LIFTED, PLAN, VALUES, set_plans
from .blocks import blocks as recognised
from .errors import AttachError, TargetError, require
from .offload import away, refuse_offload
from .targets import modules_of

Level = Literal["off", "cheap", "all"]
Offload = Literal["off", "cpu"]
LEVELS: tuple[Level, ...] = ("off", "cheap", "all")
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_DEAR_INNER = 8  # a product is dear if its output is at most so many times as wide as what it sums over
_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}  # of aten: where the first factor stands
_OTHERS = ("convolution", "_int_mm", "_scaled_mm", "_weight_int8pack_mm", "_weight_int4pack_mm")
_calls: "weakref.WeakSet[_Kept]" = weakref.WeakSet()  # whose graphs are alive


class Recomputed(AbstractContextManager["Recomputed"]):
    """Blocks that recompute.  `undo`, or the end of a `with`, gives them back the forward they had."""

    def __init__(self, modules: list[nn.Module], level: Level, offload: Offload) -> None:
        self.modules, self.level, self.offload = modules, level, offload

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Let the blocks keep what they kept before.  A graph that is alive stays right."""
        for module in self.modules:
            for name in ("forward", LIFTED):  # adapters put on later have lifted it
                ours = module.__dict__.get(name)
                if isinstance(ours, _Recomputing):
                    if ours.inner is None:
                        del module.__dict__[name]
                    else:
                        module.__dict__[name] = ours.inner
        self.modules = []


def recompute(
    model: nn.Module, level: Level = "cheap", *, blocks: Iterable[str] | None = None, offload: Offload = "off"
) -> Recomputed:
    """Let the blocks of a model keep less for backward; for a `with`, or until `undo`.

    blocks: their paths; by default those of a transformer that `core/blocks.py` knows by structure, else the children
    of every list of like modules.   offload: "cpu" moves the kept inputs of blocks to the host meanwhile (level "all",
    CUDA).   Raises ConfigError, TargetError where no blocks are found, AttachError where they recompute already.
    """
    require(level in LEVELS, f'level is "{level}"; there are: {", ".join(LEVELS)}')
    require(offload in ("off", "cpu"), f'offload is "{offload}"; there are: off, cpu')
    if offload == "cpu":
        require(level == "all", f'offload="cpu" moves the inputs of blocks, and goes with level "all", not "{level}"')
        refuse_offload(next(model.parameters()).device)
    if level == "off":
        return Recomputed([], level, offload)
    paths = list(blocks) if blocks is not None else blocks_of(model)
    known = dict(modules_of(model))
    unknown = [path for path in paths if path not in known]
    require(not unknown, f"{type(model).__name__} has no {', '.join(unknown[:5])}", TargetError)
    if not paths:
        raise TargetError(
            f"no blocks are recognised in {type(model).__name__}: no transformer's, and no list of like modules. "
            'Name what is to be computed again: recompute(model, blocks=["encoder.0", "encoder.1"])'
        )
    modules = [known[path] for path in paths]
    if any(isinstance(m.__dict__.get(name), _Recomputing) for m in modules for name in ("forward", LIFTED)):
        raise AttachError("these blocks recompute already; call undo() of what `recompute` returned first")
    for module in modules:
        module.__dict__["forward"] = _Recomputing(module, module.__dict__.get("forward"), level, offload)
    return Recomputed(modules, level, offload)


def blocks_of(model: nn.Module) -> list[str]:
    """Paths of the blocks that can recompute; empty if none are found."""
    found = recognised(model)
    if found:
        return found
    for path, module in modules_of(model):
        if any(path.startswith(f"{other}.") for other in found) or not isinstance(
            module, nn.ModuleList | nn.Sequential
        ):
            continue
        children = [(name, child) for name, child in module.named_children() if any(True for _ in child.children())]
        kinds = [type(child) for _, child in children]
        found += [f"{path}.{name}".removeprefix(".") for name, child in children if kinds.count(type(child)) > 1]
    return found


def kept_bytes() -> int:
    """What recomputing blocks keep now beside their inputs, of all graphs that are alive."""
    tensors = [tensor for kept in _calls for entry in kept.entries for tensor in entry.tensors()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class _Recomputing:
    """What stands in a block's `forward`.  Copied and pickled with the block, of which it holds the copy then.

    inner: what stood there before.
    """

    def __init__(self, block: nn.Module, inner: Callable[..., Any] | None, level: Level, offload: Offload) -> None:
        self.block, self.inner, self.level, self.offload = block, inner, level, offload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.inner
        if call is None:
            cls = cast(Any, type(self.block))
            is_lifted = self.block.__dict__.get(LIFTED) is self  # by adapters put on later, which then call it
            call = functools.partial((cls.base_class if is_lifted else cls).forward, self.block)
        if not torch.is_grad_enabled() or _holds_tokens(kwargs):
            return call(*args, **kwargs)
        kwargs |= {name: None for name in _CACHES if name in kwargs}
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        values, run = (*args, *kwargs.values()), functools.partial(_spread, call, len(args), tuple(kwargs))
        if torch.compiler.is_compiling():  # the graph itself has plans, generators and buffers as they were
            if self.level == "all":
                return checkpoint(run, *values, use_reentrant=False)
            return checkpoint(run, *values, use_reentrant=False, context_fn=_compiled_contexts)
        kept = _Kept(self.block, self.level == "cheap", values)
        with away(next(self.block.parameters()).device) if self.offload == "cpu" else nullcontext():
            return checkpoint(run, *values, use_reentrant=False, preserve_rng_state=False, context_fn=kept.contexts)


def _compiled_contexts() -> Any:
    """What a compiler is told to keep: the same operations.  It has made changes in place into new values."""
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_dear(func, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _spread(call: Callable[..., Any], count: int, names: tuple[str, ...], *values: Any) -> Any:
    """The call with its arguments by name again: by position checkpoint sees them as what is to be kept."""
    return call(*values[:count], **dict(zip(names, values[count:], strict=True)))


def _holds_tokens(kwargs: dict[str, Any]) -> bool:
    """True if the call reads keys and values of earlier tokens, which running it again would add once more."""
    caches = (kwargs.get(name) for name in _CACHES)
    return any(not hasattr(cache, "get_seq_length") or cache.get_seq_length() for cache in caches if cache is not None)


class _Entry:
    """The output of one dear operation, as long as it stays what it was."""

    def __init__(self, func: Any, output: Any) -> None:
        self.func, self.is_read = func, False
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            # an alias without a graph, which counts changes in place together with the output
            self.output = tree_map_only(Tensor, Tensor.detach, output)
        self.version = self._now()  # that it has while it is whole

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.output) if isinstance(leaf, Tensor)]

    def is_whole(self) -> bool:
        return self.version == self._now()

    def _now(self) -> int:
        return sum(tensor._version for tensor in self.tensors())


class _Kept:
    """What one call of a block needs to run again, and the two contexts that `checkpoint` asks for."""

    def __init__(self, block: nn.Module, keeps_dear: bool, values: tuple[Any, ...]) -> None:
        self.block, self.keeps_dear = block, keeps_dear
        self.entries: list[_Entry] = []
        devices = {leaf.device for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
        self.devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self.random: list[Tensor] | None = None  # of the generators, where the block draws
        self.acting: list[tuple[nn.Module, Any, Any]] = []
        self.moving: list[Tensor] = []  # buffers that the forward changes
        _calls.add(self)

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return self._first(), _Again(self)

    @contextmanager
    def _first(self) -> Iterator[None]:
        random, seen = self._generators(), list[tuple[Tensor, int]]()
        for module in self.block.modules():
            if PLAN in module.__dict__:
                self.acting.append((module, module.__dict__[PLAN], module.__dict__[VALUES]))
            if module._buffers:
                buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
                if module.training and "running_mean" in module._buffers:  # torch moves these without counting it
                    self.moving += buffers
                else:
                    seen += [(buffer, buffer._version) for buffer in buffers]
        with _Keeping(self.entries) if self.keeps_dear else nullcontext():
            yield
        if not all(map(torch.equal, random, self._generators())):
            self.random = random
        self.moving += [buffer for buffer, before in seen if buffer._version != before]

    def _generators(self) -> list[Tensor]:
        modules = [torch.get_device_module(device) for device in self.devices]
        states = [module.get_rng_state(device) for module, device in zip(modules, self.devices, strict=True)]
        return [torch.get_rng_state(), *states]

    def _set_generators(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Everything as it was when the block ran first; afterwards as it is now."""
        acting = [(module, module.__dict__[PLAN], module.__dict__[VALUES]) for module, _, _ in self.acting]
        buffers = [(buffer, buffer.clone()) for buffer in self.moving]
        random = None if self.random is None else self._generators()
        try:
            for module, plan, values in self.acting:
                set_plans(module, plan, values)
            if self.random is not None:
                self._set_generators(self.random)
            with _Serving(self.entries) if self.keeps_dear else nullcontext():
                yield
        finally:
            for module, plan, values in acting:
                set_plans(module, plan, values)
            for buffer, value in buffers:
                buffer.copy_(value)
            if random is not None:
                self._set_generators(random)


class _Again(AbstractContextManager[None]):
    """`_Kept.again`, entered once per backward."""

    def __init__(self, kept: _Kept) -> None:
        self.kept = kept

    def __enter__(self) -> None:
        self.context = self.kept.again()
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the outputs of dear operations.

    What then changes such an output in place, before anybody has read it, is part of it: when it is given out, that is
    done already.
    """

    def __init__(self, entries: list[_Entry]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = entries
        self.by_storage: dict[int, _Entry] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.is_view:
            return output
        in_place = _is_in_place(func)
        for position, arg in enumerate((*args, *(kwargs or {}).values())):
            for tensor in arg if isinstance(arg, list | tuple) else [arg]:
                entry = self.by_storage.get(_storage(tensor)) if isinstance(tensor, Tensor) else None
                if entry is None:
                    continue
                if not in_place or position > 0:
                    entry.is_read = True
                elif not entry.is_read:
                    entry.version += 1  # torch counts it after this call
        if not in_place and _is_dear(func, args):
            entry = _Entry(func, output)
            self.entries.append(entry)
            self.by_storage |= {_storage(tensor): entry for tensor in entry.tensors()}
        return output


class _Serving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives out what was recorded, in the same order."""

    def __init__(self, entries: list[_Entry]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = iter(entries)
        self.served: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_in_place(func):
            return args[0] if _storage(args[0]) in self.served else func(*args, **(kwargs or {}))
        if not _is_dear(func, args):
            return func(*args, **(kwargs or {}))
        entry = next(self.entries, None)
        if entry is None or entry.func is not func:
            raise RuntimeError(f"a block did not run as before when it was computed again: {func} came up")
        if not entry.is_whole():
            return func(*args, **(kwargs or {}))
        self.served |= {_storage(tensor) for tensor in entry.tensors()}
        return tree_map_only(Tensor, Tensor.detach, entry.output)


def _is_dear(func: Any, args: Any) -> bool:
    """True if the operation takes far longer than it takes to write its output.

    A product does if what it sums over is not much shorter than a row of the output: so those of low rank do not, nor
    the scores of an attention that is written out, which are many.  Attention with dropout draws, so it runs again.
    """
    dear, first, dropout = _kind(func)
    if first is not None:
        return bool(args[first].shape[-1] * _DEAR_INNER >= args[first + 1].shape[-1])
    return dear and (dropout is None or len(args) <= dropout or args[dropout] == 0.0)


@functools.cache
def _kind(func: Any) -> tuple[bool, int | None, int | None]:
    """Whether an operation is dear; of a product where its first factor stands; where attention has its dropout."""
    name = func._schema.name.removeprefix("aten::")
    if name in _PRODUCTS and not func._schema.is_mutable:
        return True, _PRODUCTS[name], None
    names = [argument.name for argument in func._schema.arguments]
    attention = name.startswith("_scaled_dot_product_") and not name.endswith("_backward")
    dropout = names.index("dropout_p") if attention and "dropout_p" in names else None
    return attention or (name in _OTHERS and not func._schema.is_mutable), None, dropout


@functools.cache
def _is_in_place(func: Any) -> bool:
    """True if an operation changes its first argument, one tensor, and gives it out."""
    schema = func._schema
    return bool(schema.is_mutable) and schema.name.endswith("_") and str(schema.arguments[0].type) == "Tensor"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
