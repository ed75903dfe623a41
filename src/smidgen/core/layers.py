"""LayerKind: what a layer's linear map does, so that a low-rank or per-channel change means the same on every layer.

    I = fan-in, O = fan-out, R = rank.   A: (R, I)   B: (O, R)   v: (O,)

A layer's weight is seen as a matrix (O, I), whatever its stored shape.  Methods never ask which layer they are on: they
project with A, expand with B, scale or shift with a vector shaped by `channels`, and change rows of the matrix.
One class per family; the table at the end is tried in order.
"""

import math
import sys
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNEL_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_SPATIAL = {"BatchNorm2d": 2, "BatchNorm3d": 3, "InstanceNorm1d": 1, "InstanceNorm2d": 2, "InstanceNorm3d": 3}


class LayerKind:
    """The linear map of one family of layers.  Everything about a layer is read from the layer."""

    name: ClassVar[str]
    low_rank: bool = True  # has a matrix worth factorising; False for diagonal maps such as norms
    stack: int = 1  # how many such matrices; more than one only for stacked experts

    def matches(self, layer: nn.Module) -> bool:
        """True if `layer` is of this family."""
        raise NotImplementedError

    def of(self, layer: nn.Module) -> "LayerKind":
        """This kind for one layer: itself, unless reading a stored weight needs more than its shape."""
        return self

    def fans(self, layer: nn.Module) -> tuple[int, int]:
        """(O, I) of the weight seen as a matrix."""
        raise NotImplementedError

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """x by A (R, I), the layer's own way of reading its input; R channels where the layer has O."""
        raise NotImplementedError

    def expand(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        """R channels by B (O, R): a pointwise map to the layer's output channels."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        """What the layer gives for x with the matrix M (O, I) as its weight and without bias."""
        return self.project(layer, x, M)

    def channels(self, layer: nn.Module, v: Tensor, like: Tensor) -> Tensor:
        """v, a number per channel, shaped to broadcast against `like`, an input or output of the layer."""
        return v

    def input_channels(self, layer: nn.Module) -> int:
        """How many channels the input has; I for a linear layer, less for a convolution."""
        return self.fans(layer)[1]

    def scale_columns(self, layer: nn.Module, M: Tensor, v: Tensor, rows: slice) -> Tensor:
        """Rows of the matrix M (rows, I) with each input channel scaled by v (input channels,)."""
        return M * v

    def read_rows(self, W: Tensor, rows: slice) -> Tensor:
        """Rows of the stored weight as a matrix (rows, I); a view where that is possible."""
        return W[rows]

    def write_rows(self, W: Tensor, rows: slice, M: Tensor) -> None:
        """Put the matrix M (rows, I) into the stored weight, rounding to its dtype."""
        W[rows] = M

    def as_stored(self, W: Tensor, M: Tensor) -> Tensor:
        """The whole matrix M (O, I) in the stored shape of W; differentiable."""
        return M.reshape(W.shape)

    def probe(self, layer: nn.Module, generator: torch.Generator) -> Tensor:
        """A small random input for the layer, for comparing two ways of computing it."""
        weight = cast(Tensor, layer.weight)
        return torch.randn(4, self.input_channels(layer), generator=generator).to(weight.device, weight.dtype)


class LinearKind(LayerKind):
    """nn.Linear: y = x W^T + b, W stored as (O, I)."""

    name = "linear"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    def fans(self, layer: nn.Module) -> tuple[int, int]:
        layer = cast(nn.Linear, layer)  # its own numbers: a quantised weight has another shape
        return layer.out_features, layer.in_features

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    def expand(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)


class TransposedLinearKind(LinearKind):
    """transformers' Conv1D (GPT-2): y = x W + b, W stored as (I, O)."""

    name = "conv1d-transposed"

    def matches(self, layer: nn.Module) -> bool:
        module = sys.modules.get("transformers.pytorch_utils")  # not imported only to be asked about
        return module is not None and isinstance(layer, module.Conv1D)

    def fans(self, layer: nn.Module) -> tuple[int, int]:
        fan_in, fan_out = cast(Tensor, layer.weight).shape
        return fan_out, fan_in

    def read_rows(self, W: Tensor, rows: slice) -> Tensor:
        return W[:, rows].T

    def write_rows(self, W: Tensor, rows: slice, M: Tensor) -> None:
        W[:, rows] = M.T

    def as_stored(self, W: Tensor, M: Tensor) -> Tensor:
        return M.T


class ConvKind(LayerKind):
    """nn.Conv1d/2d/3d, grouped and depthwise too: W stored as (O, C/groups, *kernel), so I = C/groups * kernel.

    With groups, every group reads its own C/groups input channels with the same A, and each output channel takes the
    R channels of its own group: exactly the change B A of the stored weight, which therefore merges.
    """

    name = "conv"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, _CONVOLUTIONS)

    def fans(self, layer: nn.Module) -> tuple[int, int]:
        layer = cast(nn.Conv2d, layer)
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, layer)
        A = A.view(A.shape[0], layer.in_channels // layer.groups, *layer.kernel_size)
        if layer.groups > 1:
            A = A.repeat(layer.groups, *[1] * (A.ndim - 1))  # (groups R, C/groups, *kernel)
        return _convolved(layer, x, A)

    def expand(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, layer)
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        return conv(h, B.view(*B.shape, *[1] * len(layer.kernel_size)), groups=layer.groups)

    def apply(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, layer)
        return _convolved(layer, x, M.view(layer.weight.shape))

    def changed(self, layer: nn.Module, x: Tensor, D: Tensor) -> Tensor:
        """What the layer gives for x with D (O, I) added to its weight."""
        layer = cast(nn.Conv2d, layer)
        return _convolved(layer, x, layer.weight + D.view(layer.weight.shape).to(layer.weight.dtype), layer.bias)

    def channels(self, layer: nn.Module, v: Tensor, like: Tensor) -> Tensor:
        return v.view(-1, *[1] * len(cast(nn.Conv2d, layer).kernel_size))

    def input_channels(self, layer: nn.Module) -> int:
        return cast(nn.Conv2d, layer).in_channels

    def scale_columns(self, layer: nn.Module, M: Tensor, v: Tensor, rows: slice) -> Tensor:
        layer = cast(nn.Conv2d, layer)
        group = torch.arange(layer.out_channels, device=M.device)[rows] // (layer.out_channels // layer.groups)
        per_row = v.view(layer.groups, -1)[group]  # (rows, C/groups)
        return M * per_row.repeat_interleave(math.prod(layer.kernel_size), dim=1)

    def read_rows(self, W: Tensor, rows: slice) -> Tensor:
        return W[rows].flatten(1)

    def write_rows(self, W: Tensor, rows: slice, M: Tensor) -> None:
        W[rows] = M.view(W[rows].shape)

    def probe(self, layer: nn.Module, generator: torch.Generator) -> Tensor:
        layer = cast(nn.Conv2d, layer)
        size = [dilation * (k - 1) + 3 for k, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
        x = torch.randn(2, layer.in_channels, *size, generator=generator)
        return x.to(layer.weight.device, layer.weight.dtype)


def _convolved(layer: Any, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """x by a kernel the layer's way: stride, padding mode, dilation and groups, and what a subclass does before."""
    own = getattr(type(layer), "base_class", type(layer)).forward  # without adapters
    if own in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return cast(Tensor, layer._conv_forward(x, kernel, bias))
    with _WithKernel(kernel, bias):  # timm's Conv2dSame and its like pad in a forward of their own
        return cast(Tensor, own(layer, x))


class _WithKernel(TorchFunctionMode):
    """Whatever convolves does so with this kernel and bias."""

    def __init__(self, kernel: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.own = {"weight": kernel, "bias": bias}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.conv1d, torch.conv2d, torch.conv3d):
            return function(*args, **(kwargs or {}))
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        return function(**dict(zip(names, args, strict=False)) | (kwargs or {}) | self.own)


class TransposedConvKind(ConvKind):
    """nn.ConvTranspose1d/2d/3d: W stored as (C, O/groups, *kernel), seen as (O, C/groups * kernel) like ConvKind's.

    The layer's own way of reading its input is to spread it: A makes R channels of the output's size.
    """

    name = "transposed-conv"

    def __init__(self, groups: int = 1) -> None:
        self.groups = groups

    def of(self, layer: nn.Module) -> "LayerKind":
        return TransposedConvKind(cast(nn.ConvTranspose2d, layer).groups)

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, _TRANSPOSED)

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        layer = cast(nn.ConvTranspose2d, layer)
        A = A.view(A.shape[0], layer.in_channels // layer.groups, *layer.kernel_size).transpose(0, 1)
        return self._spread(layer, x, A.repeat(layer.groups, *[1] * (A.ndim - 1)))  # (C, R, *kernel)

    def apply(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        return self._spread(layer, x, self.as_stored(cast(Tensor, layer.weight), M))

    def _spread(self, layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
        layer = cast(nn.ConvTranspose2d, layer)
        conv: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(layer.kernel_size)]
        own = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        spread: Tensor = conv(x, W, None, *own)
        return spread

    def read_rows(self, W: Tensor, rows: slice) -> Tensor:
        per_group = W.view(self.groups, -1, *W.shape[1:]).transpose(1, 2)  # (groups, O/groups, C/groups, *kernel)
        return per_group.flatten(0, 1).flatten(1)[rows]

    def write_rows(self, W: Tensor, rows: slice, M: Tensor) -> None:
        whole = self.read_rows(W, slice(None)).clone()
        whole[rows] = M
        W.copy_(self.as_stored(W, whole))

    def as_stored(self, W: Tensor, M: Tensor) -> Tensor:
        outputs, inputs = W.shape[1], W.shape[0] // self.groups
        return M.view(self.groups, outputs, inputs, *W.shape[2:]).transpose(1, 2).reshape(W.shape)


class EmbeddingKind(LayerKind):
    """nn.Embedding: the map from one-hot words to vectors, so I = number of embeddings, O = their width."""

    name = "embedding"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    def fans(self, layer: nn.Module) -> tuple[int, int]:
        layer = cast(nn.Embedding, layer)
        return layer.embedding_dim, layer.num_embeddings

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T)

    def expand(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return self._scaled(layer, F.linear(h, B))

    def apply(self, layer: nn.Module, x: Tensor, M: Tensor) -> Tensor:
        return self._scaled(layer, F.embedding(x, M.T))

    def _scaled(self, layer: nn.Module, h: Tensor) -> Tensor:
        scale = getattr(layer, "embed_scale", None)  # transformers' scaled word embeddings multiply their output
        if scale is None:
            return h
        weight = cast(nn.Embedding, layer).weight
        return h * (scale.to(weight.dtype) if isinstance(scale, Tensor) else scale)  # rounded, as the layer does

    def input_channels(self, layer: nn.Module) -> int:
        return 0  # its input is indices: there is nothing to scale

    def read_rows(self, W: Tensor, rows: slice) -> Tensor:
        return W[:, rows].T

    def write_rows(self, W: Tensor, rows: slice, M: Tensor) -> None:
        W[:, rows] = M.T

    def as_stored(self, W: Tensor, M: Tensor) -> Tensor:
        return M.T

    def probe(self, layer: nn.Module, generator: torch.Generator) -> Tensor:
        layer = cast(nn.Embedding, layer)
        return torch.randint(layer.num_embeddings, (2, 8), generator=generator).to(layer.weight.device)


class NormKind(LayerKind):
    """Norm layers with a weight: a diagonal map, seen as a matrix (O, 1).  RMSNorms of any library count by shape."""

    name = "norm"
    low_rank = False

    def matches(self, layer: nn.Module) -> bool:
        own = [name for name, parameter in layer.named_parameters(recurse=False) if parameter is not None]
        return "Norm" in _base_class(layer).__name__ and "weight" in own and set(own) <= {"weight", "bias"}

    def fans(self, layer: nn.Module) -> tuple[int, int]:
        return cast(Tensor, layer.weight).numel(), 1

    def channels(self, layer: nn.Module, v: Tensor, like: Tensor) -> Tensor:
        if isinstance(layer, _CHANNEL_NORMS):
            return v.view(-1, *[1] * (like.ndim - 2))  # (N, C, ...): channels second
        return v.view(cast(Tensor, layer.weight).shape)  # (..., *normalized_shape): channels last

    def read_rows(self, W: Tensor, rows: slice) -> Tensor:
        return W.reshape(-1)[rows, None]

    def write_rows(self, W: Tensor, rows: slice, M: Tensor) -> None:
        W.view(-1)[rows] = M[:, 0]

    def probe(self, layer: nn.Module, generator: torch.Generator) -> Tensor:
        weight = cast(Tensor, layer.weight)
        spatial = _SPATIAL.get(_base_class(layer).__name__, 0)
        return torch.randn(4, *weight.shape, *[3] * spatial, generator=generator).to(weight.device, weight.dtype)


class MatrixKind(LayerKind):
    """A parameter as the site: a matrix (O, I), or a stack of them (E, O, I) such as experts, or a vector (O,).

    The layer here is never called by this kind: the owner's forward reads the changed value.
    """

    name = "parameter"

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.low_rank = len(shape) in (2, 3)
        self.stack = shape[0] if len(shape) == 3 else 1

    def fans(self, layer: nn.Module) -> tuple[int, int]:
        if len(self.shape) == 3:
            return self.shape[1], self.shape[2]
        return (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)

    def read_rows(self, W: Tensor, rows: slice) -> Tensor:
        return W.reshape(-1, self._width())[rows]

    def write_rows(self, W: Tensor, rows: slice, M: Tensor) -> None:
        if len(self.shape) == 3:
            W.view(-1, self._width())[rows] = M
        else:  # by its own rows: a kernel may lie in another memory format
            own = W if W.ndim else W.view(1)
            own[rows] = M.view(own[rows].shape)

    def _width(self) -> int:
        """I: (E O, I) for a stack, (O, I) for a matrix, (O, 1) for a vector; a kernel is a matrix of rows."""
        return self.shape[-1] if len(self.shape) == 3 else math.prod(self.shape[1:])


_KINDS: list[LayerKind] = [
    *(TransposedLinearKind(), LinearKind(), ConvKind(), TransposedConvKind(), EmbeddingKind(), NormKind()),
]


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The family of `layer`, or None if it is none that has a linear map of its own."""
    return next((kind.of(layer) for kind in _KINDS if kind.matches(layer)), None)


def register_kind(kind: LayerKind) -> None:
    """Teach smidgen a layer family; the newest is asked first."""
    _KINDS.insert(0, kind)


def _base_class(layer: nn.Module) -> type[nn.Module]:
    return cast("type[nn.Module]", getattr(type(layer), "base_class", type(layer)))
