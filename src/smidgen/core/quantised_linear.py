"""QuantisedLinear: nn.Linear whose weight is held in few bits and made dense in blocks while it runs, never as a whole.

    y = x W^T + b            dx = dy W            W from its pieces, some rows, or columns, after the others

The pieces are ordinary buffers, so that state dicts, devices, copies and pickles need nothing of their own.  What is
kept for backward are the pieces alone; there W is made anew, as QLoRA does (Dettmers et al. 2023, arXiv:2305.14314).
`layer.weight` is a QuantisedWeight: shape, dtype and device cost nothing, and whatever else reads it gets it dense.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import NonFiniteError, require
from .kernels import Pull, dropped_, is_of_features, remake, with_dropout
from .products import thin
from .quantised import Format, Pieces, Read, blocks_of, format_named, in_blocks
from .site import compute_dtype
from .storage import WeightStorage, master_dtype, register_storage

_WHOLE = slice(None)


class QuantisedWeight:
    """The weight (O, I) of a quantised layer, for code that looks at `layer.weight` or multiplies by it.

    No Tensor: functions of torch, operators and methods of a tensor see the dense weight, made for them.
    """

    requires_grad = False
    is_leaf = True
    grad = None
    ndim = 2

    def __init__(self, layer: "QuantisedLinear") -> None:
        self.layer = layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.layer.out_features, self.layer.in_features))

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight_dtype

    @property
    def device(self) -> torch.device:
        return self.layer.packed.device

    @property
    def is_meta(self) -> bool:
        return self.layer.packed.is_meta

    @property
    def _version(self) -> int:
        return self.layer.packed._version

    def numel(self) -> int:
        return self.layer.out_features * self.layer.in_features

    def is_floating_point(self) -> bool:
        return True

    def is_inference(self) -> bool:
        return self.layer.packed.is_inference()

    def dense(self) -> Tensor:
        """The whole weight, in its dtype."""
        return self.layer.dense(_WHOLE)

    def __getitem__(self, index: Any) -> Tensor:
        return self.layer.dense(index) if isinstance(index, slice) else self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __repr__(self) -> str:
        return f"QuantisedWeight({tuple(self.shape)}, {self.layer.format.name}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return function(*args, **kwargs)


def _by_dense(name: str) -> Any:
    return lambda weight, *others: getattr(weight.dense(), name)(*others)


_OPERATORS = "add radd sub rsub mul rmul matmul rmatmul truediv rtruediv pow neg abs len iter eq lt gt le ge"
for _name in _OPERATORS.split():
    setattr(QuantisedWeight, f"__{_name}__", _by_dense(f"__{_name}__"))
QuantisedWeight.__hash__ = object.__hash__  # type: ignore[method-assign]  # == is by entry, as a tensor's


class _Weight:
    """Makes `layer.weight`.  A value in the layer's `__dict__`, as adapters of a parameter put there, comes first."""

    def __get__(self, layer: "QuantisedLinear | None", owner: Any = None) -> Any:
        return self if layer is None else QuantisedWeight(layer)


class QuantisedLinear(nn.Linear):
    """A linear layer with its weight held in a `Format`; made by `quantise_`, and not trained.

    format_name: of the format.   weight_dtype: what the weight is read in; the dtype it had.
    """

    weight: Any = _Weight()
    packed: Tensor
    format_name: str
    weight_dtype: torch.dtype

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, format: str = "nf4", dtype: Any = None
    ) -> None:
        layer = nn.Linear(in_features, out_features, bias, dtype=dtype)  # with its random start
        quantise_(layer, format_named(format))
        self.__dict__.update(layer.__dict__)

    @property
    def format(self) -> Format:
        """How the weight is held."""
        return format_named(self.format_name)

    @property
    def pieces(self) -> Pieces:
        """The tensors that hold the weight."""
        return cast(Pieces, self._buffers)

    def reader(self) -> Read:
        """What makes parts of the weight dense, in fp32."""
        return self.format.reader((self.out_features, self.in_features), self.pieces)

    def dense(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of the weight (rows, I)."""
        return self.reader()(rows, _WHOLE).to(dtype or self.weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if "weight" in self.__dict__:  # replaced while this call lasts
            return F.linear(x, self.__dict__["weight"], self.bias)
        return quantised_linear(x, self)

    def take(self, pieces: Pieces) -> None:
        """Hold these pieces instead."""
        for name, piece in self.pieces.items():
            piece.copy_(pieces[name])  # in place: whoever knows them by their version sees that they have changed

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format_name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantisedLinear":
        kept = {id(piece) for piece in self.pieces.values()}

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            # a scale in 16 bits would be another weight: pieces move, and keep their dtypes
            return tensor.to(new.device) if id(tensor) in kept and new.dtype != tensor.dtype else new

        dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.packed.device)).dtype
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self.weight_dtype = dtype
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:  # of the plain layer
            pieces = self.format.quantised(tuple(weight.shape), in_blocks(weight), self.packed.device)
            state_dict.update({prefix + name: piece for name, piece in pieces.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def quantise_(layer: nn.Linear, format: Format, W: Tensor | None = None) -> None:
    """Make a linear layer, the same object, a quantised one.

    W: its weight, if it is not the one that the layer has now, which may be on the meta device.
    Raises NonFiniteError, and then has changed nothing.
    """
    own = layer.weight.detach() if W is None else W
    pieces = format.quantised((own.shape[0], own.shape[1]), in_blocks(own), own.device)
    whole = own.is_meta or all(torch.isfinite(piece).all() for piece in pieces.values() if piece.is_floating_point())
    require(whole, "a weight holds NaN or infinity, so it cannot be quantised", NonFiniteError)
    dtype = own.dtype if W is None else layer.weight.dtype
    del layer._parameters["weight"]
    for name, piece in pieces.items():
        layer.register_buffer(name, piece)
    layer.__dict__ |= {"format_name": format.name, "weight_dtype": dtype}
    layer.__class__ = QuantisedLinear


def quantised_linear(
    x: Tensor,
    layer: QuantisedLinear,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    *,
    with_bias: bool = True,
) -> Tensor:
    """x W^T + b, or x W^T + b + scale (x * mask) A^T B^T, in x's dtype or autocast's; gradients for x, b, A and B.

    x: (..., I).   A: (R, I)   B: (O, R)   mask: dropout's, as in `frozen_linear_low_rank`
    """
    x = x.to(compute_dtype(x))
    b = layer.bias.to(x.dtype) if with_bias and layer.bias is not None else None
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # a compiler decides itself what to keep
            y = F.linear(x, layer.dense(_WHOLE, x.dtype), b)
            if A is None or B is None:
                return y
            rows, A = with_dropout(x, A, mask)
            return y + scale * F.linear(F.linear(rows, A), _as(B, x)).view(y.shape)
        return _applied(None, (x,), layer, b, A, B, scale, mask)


def quantised_linear_of_made(
    make: Callable[..., Tensor],
    made_of: Sequence[Tensor],
    layer: QuantisedLinear,
    A: Tensor,
    B: Tensor,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """The same of x = make(*made_of), which backward makes again and nobody keeps.  Not for autocast or a compiler."""
    b = None if layer.bias is None else layer.bias.to(made_of[0].dtype)
    return _applied(make, made_of, layer, b, A, B, scale, mask)


def _applied(
    make: Callable[..., Tensor] | None,
    made_of: Sequence[Tensor],
    layer: QuantisedLinear,
    b: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    result: Tensor = _QuantisedLinear.apply(  # type: ignore[no-untyped-call]
        make, b, A, B, scale, mask, layer.out_features, layer.format, tuple(layer.pieces.items()), *made_of
    )
    return result


class _QuantisedLinear(torch.autograd.Function):
    """Of x, or of x = make(*made_of).  Kept for backward: the pieces, and with factors what x is made of, x A^T and
    dropout's mask.

    g = s dy B (N, R)   dA = g^T x   dB = s dy^T (x A^T)   dx = dy W + g A   and where the mask stands: as in kernels.py
    """

    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[..., Tensor] | None,
        b: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        scale: float,
        mask: Tensor | None,
        fan_out: int,
        format: Format,
        pieces: tuple[tuple[str, Tensor], ...],
        *made_of: Tensor,
    ) -> Tensor:
        x = made_of[0] if make is None else make(*made_of)
        ctx.make, ctx.names, ctx.scale, ctx.format = make, [name for name, _ in pieces], scale, format
        ctx.shape, h = (fan_out, x.shape[-1]), None
        rows = x.reshape(-1, x.shape[-1])
        y = _by_rows(rows, format.reader(ctx.shape, dict(pieces)), fan_out)
        if b is not None:
            y.add_(b)
        if A is not None and B is not None:
            rows, A_cast = with_dropout(x, A, mask)
            h = thin(rows, A_cast)  # (N, R)
            y.addmm_(h, _as(B, x).T, alpha=scale)
        kept = (A, B, h if ctx.needs_input_grad[3] else None, mask, *made_of) if h is not None else (None,) * 4
        ctx.save_for_backward(*(piece for _, piece in pieces), *kept)
        return y.view(*x.shape[:-1], fan_out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors  # asked for once: checkpoint gives them out once
        pieces, (A, B, h, mask, *made_of) = saved[: len(ctx.names)], saved[len(ctx.names) :]
        of_made = ctx.needs_input_grad[9:]
        dy_rows, g = dy.reshape(-1, dy.shape[-1]), None
        x: Any = made_of[0] if made_of else None
        pull: Pull = _itself
        dx = db = dA = dB = None
        if A is not None:
            g = thin(dy_rows, _as(B, dy).T).mul_(ctx.scale)  # (N, R)
        if ctx.make is not None:
            x, pull = remake(ctx.make, made_of, of_made)
        if g is not None:
            rows, A_cast = with_dropout(x, A, mask)
        if g is not None and ctx.needs_input_grad[2]:
            dA = torch.mm(g.T, rows)
            dA = (dA.mul_(mask) if is_of_features(mask) else dA).to(A.dtype)
        if ctx.needs_input_grad[3]:
            dB = torch.mm(h.T, dy_rows).mul_(ctx.scale).T.to(B.dtype)
        if ctx.needs_input_grad[1]:
            db = dy_rows.sum(0)
        if any(of_made):
            read = ctx.format.reader(ctx.shape, dict(zip(ctx.names, pieces, strict=True)))
            if g is None or mask is None or is_of_features(mask):
                dx = _by_columns(dy_rows, read, ctx.shape[1])
                if g is not None:
                    dx.addmm_(g, A_cast)
            else:
                dx = _by_columns(dy_rows, read, ctx.shape[1], dropped_(torch.mm(g, A_cast), mask))
            dx = dx.view(*dy.shape[:-1], -1)
        return None, db, dA, dB, None, None, None, None, None, *pull(dx)


def _itself(dx: Tensor | None) -> tuple[Tensor | None]:
    return (dx,)


def _by_rows(x: Tensor, read: Read, fan_out: int) -> Tensor:
    """x W^T (N, O), some rows of W after the others."""
    blocks = blocks_of(fan_out, x.shape[1], x.device)
    if len(blocks) == 1:
        return torch.mm(x, read(_WHOLE, _WHOLE).to(x.dtype).T)
    y = x.new_empty(x.shape[0], fan_out)
    for rows in blocks:
        torch.mm(x, read(rows, _WHOLE).to(x.dtype).T, out=y[:, rows])
    return y


def _by_columns(dy: Tensor, read: Read, fan_in: int, to: Tensor | None = None) -> Tensor:
    """dy W (N, I), some columns of W after the others: no sum is rounded in between.

    to: what it is added to, in place.
    """
    dx = dy.new_empty(dy.shape[0], fan_in) if to is None else to
    for columns in blocks_of(fan_in, dy.shape[1], dy.device):
        dx[:, columns].addmm_(dy, read(_WHOLE, columns).to(dy.dtype), beta=0 if to is None else 1)
    return dx


def _as(factor: Tensor, x: Tensor) -> Tensor:
    return factor.to(x.dtype)


def own_weights(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's own parameters by name, a weight in few bits among them, in nn.Linear's order."""
    held = {"weight": cast(Tensor, layer.weight)} if isinstance(layer, QuantisedLinear) else {}
    return held | {name: p for name, p in layer._parameters.items() if p is not None}


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters, those of weights in few bits as if they were plain."""
    held = sum(
        layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, QuantisedLinear)
    )
    return held + sum(p.numel() for p in model.parameters())


def is_quantised_linear(call: Callable[..., Any]) -> bool:
    """True if `call` is the forward of QuantisedLinear itself, with nothing around it."""
    return getattr(call, "__func__", None) is QuantisedLinear.forward


class QuantisedStorage(WeightStorage):
    """The weight of a QuantisedLinear: read in blocks of rows; written whole, which rounds to its format."""

    name = "quantised"

    def matches(self, weight: Tensor) -> bool:
        return isinstance(weight, QuantisedWeight)

    def read(self, weight: Tensor) -> Tensor:
        return weight  # of which W[rows] makes these rows dense and no others

    def blocks(self, weight: Tensor) -> Iterator[Tensor]:
        read, (O, I) = cast(QuantisedWeight, weight).layer.reader(), weight.shape
        return (read(rows, _WHOLE).to(master_dtype(weight)) for rows in blocks_of(O, I, weight.device))


register_storage(QuantisedStorage())
