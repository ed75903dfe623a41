"""Adapter: the parameters at one place, and how they change the call made there.

Every method of the field can be written as `forward(call, x)`, where `call` is what the module would have done.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from .errors import NotMergeable
from .site import Site

Call = Callable[..., Any]
HELD = "smidgen"  # the name under which a layer holds its adapters


class Adapter(nn.Module):
    """Parameters at one site, and the rule by which they change the call made there.

    Traits, on which composition decides:
        additive: the output is the base output plus `delta(x)`; makes weighting and mixed rows cheap.
        by_row: acts on every row of the batch by itself through one tensor argument and keeps its shape, so that the
            rows of one batch can have different adapters at this site.
        starts_as_base: a fresh adapter leaves the model's output as it was.
        weightable: base + w * (what it changes) has a meaning, so that `Weighted` can hold it.
        mergeable: `merged` says how the weight changes.
        observes: only looks at the call and passes it on.
        scaled_side: "output" where the whole rule is l * call(x), "input" where it is call(l * x), l by channel from
            `side_scale`; the rows of one batch then share one base call.
        in_blocks: some rows of `merged` cost less than all of them; False where the whole change is made each time.
    """

    additive: ClassVar[bool] = False
    by_row: ClassVar[bool] = True
    starts_as_base: ClassVar[bool] = True
    weightable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    observes: ClassVar[bool] = False
    scaled_side: ClassVar[Literal["input", "output"] | None] = None
    in_blocks: ClassVar[bool] = True

    shared: nn.Module  # set by AdapterSet: what all adapters of the name use together, if the method has that
    followed: bool = False  # set by AdapterSet.follow: the method sees every optimiser step

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def prepare(self) -> None:
        """Compute what follows from the settings and the base alone: places from a seed, a basis of the weight.

        Called once on the model's device, before `reset` or before a saved adapter's tensors are filled in.
        """

    def filled(self) -> None:
        """A saved adapter's tensors are filled in: compute what follows from these.  Most have nothing."""

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None or isinstance(value, Tensor | nn.Module) or name in self.__dict__.get("_parameters", ()):
            super().__setattr__(name, value)
        else:  # nn.Module would look at all that it could be: half of the time that building an adapter takes
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "followed"}  # a copy follows nothing

    def reset(self, generator: torch.Generator | None) -> None:
        """Initialise all parameters, with random numbers from `generator` alone.  Without any nothing is to do."""
        if any(True for _ in self.parameters(recurse=False)):
            raise NotImplementedError

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """The rule: what becomes of the call."""
        raise NotImplementedError

    def trained_tensors(self) -> list[Tensor]:
        """What is trained here: the adapter's own parameters, and what several sites share."""
        found = list(self.parameters())
        shared = self.__dict__.get("shared")  # of another site, which holds it
        if shared is not None:
            found += list(shared.parameters())
        return [parameter for parameter in found if parameter.requires_grad]

    def side_scale(self) -> Tensor:
        """l (channels,), of an adapter with a `scaled_side`."""
        raise NotImplementedError

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The weight's rows (rows, I) and bias (rows,) with this adapter in them, in the dtype of W.

        rows: which of the O rows these are.  Raises NotMergeable where the method changes activations.
        """
        raise NotMergeable(
            f"{type(self).__name__} at {self.site.name} changes activations, not weights. Keep it attached."
        )


class AdditiveAdapter(Adapter):
    """A method whose output is the base output plus something."""

    additive = True

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        return torch.add(y, self.delta(x).to(y.dtype))

    def delta(self, x: Tensor) -> Tensor:
        """What is added to the base output for this input."""
        raise NotImplementedError

    def weight_delta(self, rows: slice) -> Tensor:
        """Rows (rows, I) of what is added to the weight."""
        raise NotMergeable(
            f"{type(self).__name__} at {self.site.name} changes activations, not weights. Keep it attached."
        )

    def weight_delta_norm(self) -> float | None:
        """The norm of `weight_delta` of all rows, where it is known without forming it; else None."""
        return None

    def bias_delta(self, rows: slice) -> Tensor | None:
        """What is added to these rows of the bias: (rows,).  Asked for where there is a bias."""
        return None

    def add_weight_delta(self, W: Tensor, rows: slice) -> None:
        """Add `weight_delta` to W (rows, I), the caller's own copy, in its place."""
        W.add_(self.weight_delta(rows).to(W.dtype))

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        return W + self.weight_delta(rows).to(W.dtype), self.merged_bias(b, rows)

    def merged_bias(self, b: Tensor | None, rows: slice) -> Tensor | None:
        """The bias (rows,) with this adapter in it."""
        change = None if b is None else self.bias_delta(rows)
        return b if b is None or change is None else b + change.to(b.dtype)

    @property
    def merges_by_adding(self) -> bool:
        """True if `weight_delta` and `bias_delta` are all of `merged`."""
        return type(self).merged is AdditiveAdapter.merged


class ByName(Adapter):
    """An adapter that reads the arguments of the call by their names: one at a model or a block."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.names = tuple(inspect.signature(site.layer.forward).parameters)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call, those given by place too."""
        return dict(zip(self.names, args, strict=False)) | kwargs


class Held(nn.Module):
    """The adapters that live at one layer, by key: `layer.smidgen`.

    A state dict without their tensors (a plain checkpoint of the base) loads and leaves them as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slots: Any = None  # of mixed rows; made when first needed
        self.register_forward_hook(_never_called)  # torch's fused encoder layers read weights unless hooks are there

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get(self, key: str) -> Adapter | None:
        """The adapter under this key, or None."""
        return cast("Adapter | None", self._modules.get(key))

    def put(self, key: str, adapter: Adapter) -> None:
        """Hold an adapter; any name goes, also those that nn.Module has attributes of."""
        self._modules[key] = adapter

    def drop(self, key: str) -> None:
        """Let an adapter go, and what was copied of it."""
        del self._modules[key]
        self.slots = None

    def __len__(self) -> int:
        return len(self._modules)


def _never_called(module: nn.Module, args: Any, output: Any) -> None:
    raise AssertionError("the holder of adapters is not called")
