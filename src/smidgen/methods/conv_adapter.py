"""Conv-Adapter: a small depth-wise separable convolution beside a convolution or a block of them, or after it.  Chen et
al. 2022, arXiv:2208.07463, sections 3.2 and 3.3.

    a(x) = s * (U f(D * x + d) + u)

D: a convolution from C to W channels in W groups, each reading C / W of them   U: (O, W), to each position by itself
d: (W,)   u, s: (O,)   C, O = channels read and given, W = C / compression, f = non-linearity.
U and u start at zero and s at 1, so training starts from the base model; the authors start U at random.
Trainable parameters: C K + W + W O + 2 O per place, K = positions that D's kernel sees.

    placement                  what the call gives                     D's kernel, stride, padding, dilation
    "convolution_parallel"     y + a(x), y = the convolution of x      the convolution's own
    "convolution_sequential"   y + a(y)                                its kernel; it keeps the size
    "residual_parallel"        y + a(x), y = the block's output        3; the block's stride
    "residual_sequential"      y + a(y)                                3; it keeps the size

A block's call ends after the activation that follows its sum, so there the change comes after that.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, AdditiveAdapter, Call
from ..core.blocks import not_recognised
from ..core.checks import require_above_zero, require_one_of
from ..core.disk_names import DiskNames
from ..core.errors import AttachError
from ..core.method import Method, method
from ..core.non_linearity import FUNCTIONS, NonLinearity
from ..core.site import Site
from ..core.targets import modules_of

ConvPlacement = Literal["convolution_parallel", "convolution_sequential", "residual_parallel", "residual_sequential"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHORTCUTS = ("downsample", "shortcut", "skip", "identity")  # beside a block's main path


@method("conv_adapter")
@dataclass(frozen=True, kw_only=True)
class ConvAdapter(Method):
    """Small convolutions in a convolutional network.

    compression: the width W is the channels read divided by this, down to a divisor of them; 2 to 8 is usual.
    placement: beside or after every convolution that sees more than one position, or every block of several; the first
        convolutions, which stand in no block, are left as they are.   non_linearity: f; the network's own is usual.
    """

    compression: float = 4
    placement: ConvPlacement = "convolution_parallel"
    non_linearity: NonLinearity = "relu"

    summary = "y' = y + s * (U f(D * x)), D a small convolution"
    paper = "Chen et al. 2022, arXiv:2208.07463"
    disk = DiskNames("SMIDGEN_CONV_ADAPTER")

    def check(self) -> None:
        require_above_zero(self, "compression")
        require_one_of(self, "placement", get_args(ConvPlacement))
        require_one_of(self, "non_linearity", FUNCTIONS)

    def accepts(self, site: Site) -> str | None:
        name = type(site.layer).__name__
        if site.parameter is not None:
            return "a conv adapter acts on a call, not on a parameter"
        if self.placement.startswith("convolution"):
            return None if isinstance(site.layer, _CONVOLUTIONS) else f"{name} is no convolution"
        if len({len(conv.kernel_size) for conv in _main_path(site.layer)}) != 1:
            return f"{name} is no block of convolutions"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        modules = dict(modules_of(model))
        several = [path for path, m in modules.items() if _is_in_list(path) and len(list(_main_path(m))) > 1]
        inner = [path for path in several if not any(other.startswith(f"{path}.") for other in several)]
        if self.placement.startswith("convolution"):
            inner = [path for path, m in modules.items() if _sees_several(m) and any(map(_is_in_list, _above(path)))]
        if not inner:
            raise not_recognised(model, "convolution in a block", 'ConvAdapter(targets=["*.conv2"])')
        return inner, {}

    def build(self, site: Site) -> "ConvAdapterPart":
        if self.placement == "convolution_parallel":
            return (BesidePadding if _pads_itself(site.layer) else BesideConvolution)(self, site)
        if self.placement == "convolution_sequential":
            return AfterAny(self, site)
        takes_one = len(inspect.signature(site.layer.forward).parameters) == 1
        if self.placement == "residual_parallel":
            return (BesideBlock if takes_one else BesideModule)(self, site)
        return (AfterAny if takes_one else AfterModule)(self, site)


class ConvAdapterPart(Adapter):
    """D, d, U, u and s at one place."""

    mergeable = False

    def __init__(self, method: ConvAdapter, site: Site) -> None:
        super().__init__(site)
        path = [cast(nn.Conv2d, site.layer)] if site.kind else list(_main_path(site.layer))
        reads, gives = path[0].in_channels, path[-1].out_channels
        if not method.placement.endswith("parallel"):
            reads = gives
        self.kernel = path[0].kernel_size if site.kind else (3,) * len(path[0].kernel_size)
        self.groups = max(w for w in range(1, reads + 1) if reads % w == 0 and w <= max(1, reads / method.compression))
        self.f, self.conv = FUNCTIONS[method.non_linearity], {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.kernel)]
        self.down, self.down_bias = site.empty(self.groups, reads // self.groups, *self.kernel), site.empty(self.groups)
        self.up, self.up_bias = site.empty(gives, self.groups, *[1] * len(self.kernel)), site.empty(gives)
        self.scale = site.empty(gives)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)  # as convolutions start
        nn.init.ones_(self.scale)
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def change(self, x: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
        """a(x), in the dtype of x."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        h = self.f(self.conv(x, down, self.down_bias.to(x.dtype), stride, padding, dilation, self.groups))
        scale = self.scale.to(x.dtype).view(-1, *[1] * len(self.kernel))
        return self.conv(h, up, self.up_bias.to(x.dtype)) * scale


class BesideConvolution(ConvAdapterPart, AdditiveAdapter):
    """Reads the convolution's input as the convolution does."""

    def delta(self, x: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, self.site.layer)
        if layer.padding_mode == "zeros":
            return self.change(x, layer.stride, layer.padding, layer.dilation)
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        return self.change(padded, layer.stride, 0, layer.dilation)


class BesidePadding(ConvAdapterPart):
    """Beside a convolution with a forward of its own: where that pads more than its `padding` says, so is D's input.

    As TensorFlow's "same" does, an odd one is put behind: EfficientNet's Conv2dSame, Conv2dStaticSamePadding.
    """

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y, layer = call(x, *args, **kwargs), cast(nn.Conv2d, self.site.layer)
        sizes = zip(x.shape[2:], y.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
        needed = [(gives - 1) * s + d * (k - 1) + 1 - reads for reads, gives, k, s, d in sizes]
        own = [0] * len(needed) if isinstance(layer.padding, str) else [2 * side for side in layer.padding]
        missing = [p if n <= p < n + s else max(0, n) for n, p, s in zip(needed, own, layer.stride, strict=True)]
        around = [side for n in reversed(missing) for side in (n // 2, n - n // 2)]
        return torch.add(y, self.change(F.pad(x, around), layer.stride, 0, layer.dilation).to(y.dtype))


class AfterAny(ConvAdapterPart):
    """Reads what the convolution or the block gives."""

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        change = self.change(y, 1, [k // 2 for k in self.kernel], 1)
        inside: Any = (..., *(slice(n) for n in y.shape[-len(self.kernel) :]))  # an even kernel gives one more
        return torch.add(y, change[inside].to(y.dtype))


class AfterModule(AfterAny):
    """After a block that is called with more than one tensor: a batch of mixed rows runs apart."""

    by_row = False


class BesideBlock(ConvAdapterPart):
    """Reads the block's input; how far it strides is what the block did."""

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        size = len(self.kernel)
        stride = [-(-n // m) for n, m in zip(x.shape[-size:], y.shape[-size:], strict=True)]
        change = self.change(x, stride, [k // 2 for k in self.kernel], 1)
        if change.shape != y.shape:
            raise AttachError(
                f"{self.site.name} makes {tuple(y.shape)} of {tuple(x.shape)}, which no stride does; use "
                'placement="residual_sequential"'
            )
        return torch.add(y, change.to(y.dtype))


class BesideModule(BesideBlock):
    """Beside a block that is called with more than one tensor: a batch of mixed rows runs apart."""

    by_row = False


def _main_path(module: nn.Module) -> Iterator[nn.Conv2d]:
    """The convolutions in a module that are not on its shortcut."""
    for path, layer in modules_of(module):
        if isinstance(layer, _CONVOLUTIONS) and not set(path.split(".")) & set(_SHORTCUTS):
            yield cast(nn.Conv2d, layer)


def _pads_itself(layer: nn.Module) -> bool:
    """True for a convolution of a class of its own, whose forward may do more than torch's."""
    kind = getattr(type(layer), "base_class", type(layer))
    return all(kind.forward is not convolution.forward for convolution in _CONVOLUTIONS)


def _sees_several(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTIONS) and math.prod(module.kernel_size) > 1


def _is_in_list(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
