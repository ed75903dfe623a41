"""BatchNorm tuning: train the affine part of a CNN's norms.  Frankle et al. 2020, arXiv:2003.00152.

    y = (g + dg) (x - m) / sqrt(v + eps) + b + db

dg, db: (C,), start at zero, so training starts from the base model.   C = number of channels.
m, v: (C,), the running statistics: the base's, frozen; or the adapter's own, which start as the base's and follow the
data while training, as in AdaBN (Li et al. 2016, arXiv:1603.04779).  The base's are never touched.
Own statistics merge into weight and bias:   g' = (g + dg) r   b' = b + db + (m_base - m) / sqrt(v + eps) (g + dg),
with r = sqrt((v_base + eps) / (v + eps)).   Trainable parameters: 2 C per norm.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.attach import replaced
from ..core.checks import require_one_of
from ..core.disk_names import DiskNames
from ..core.layers import NormKind, kind_of
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import head_modules, modules_of
from .ln_tuning import has_channels_second

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@method("batchnorm_tuning")
@dataclass(frozen=True, kw_only=True)
class BatchNormTuning(Method):
    """Train scale and shift of BatchNorms, GroupNorms and InstanceNorms, by default all of the model's body.

    statistics: "frozen" normalises by the base's running statistics also while training, so that a batch may be small;
        "adapted" by those of the batch, and keeps running statistics of its own with the adapter.
    """

    statistics: Literal["frozen", "adapted"] = "frozen"

    summary = "y = (g + dg) norm(x) + b + db"
    paper = "Frankle et al. 2020, arXiv:2003.00152"
    disk = DiskNames("SMIDGEN_BATCHNORM_TUNING")

    def check(self) -> None:
        require_one_of(self, "statistics", ("frozen", "adapted"))

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None or not has_channels_second(site.layer) or not isinstance(site.kind, NormKind):
            return f"{site.parameter or type(site.layer).__name__} is no BatchNorm, GroupNorm or InstanceNorm"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        head = head_modules(model)
        paths = [
            path
            for path, module in modules_of(model)
            if has_channels_second(module) and isinstance(kind_of(module), NormKind)
        ]
        in_head = [path for path in paths if any(path == h or path.startswith(h + ".") for h in head)]
        return [path for path in paths if path not in in_head], dict.fromkeys(in_head, "part of the head")

    def build(self, site: Site) -> "BatchNormTuningAdapter":
        return BatchNormTuningAdapter(self, site)


class BatchNormTuningAdapter(Adapter):
    """dg and db at one norm, and its own running statistics where they are adapted."""

    def __init__(self, method: BatchNormTuning, site: Site) -> None:
        super().__init__(site)
        self.weight = site.empty(site.fan_out)
        self.bias = site.empty(site.fan_out)
        self.has_statistics = getattr(site.layer, "running_mean", None) is not None
        self.adapts = self.has_statistics and method.statistics == "adapted"
        for name in _STATISTICS if self.adapts else ():
            of_base = cast(Tensor, getattr(site.layer, name))
            self.register_buffer(name, torch.empty(of_base.shape, dtype=of_base.dtype, device=of_base.device))

    def prepare(self) -> None:
        for name in _STATISTICS if self.adapts else ():
            self.get_buffer(name).copy_(self.site.layer.get_buffer(name))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.site.layer
        values: dict[str, Any] = {}
        if self.adapts and layer.training:
            change: tuple[Tensor, Tensor] = (self.weight, self.bias)
            values = {name: self.get_buffer(name) for name in _STATISTICS}  # the layer itself updates them
        else:
            change = self._affine_change()
            if self.has_statistics and layer.training:
                values["training"] = False
        for name, by in zip(("weight", "bias"), change, strict=True):
            now = getattr(layer, name)  # with what others change around this call
            values[name] = (now.to(by.dtype) + by).to(now.dtype)
        with replaced(layer, values):
            return call(*args, **kwargs)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        weight, bias = (change[rows].to(W.dtype) for change in self._affine_change())
        return W + weight[:, None], None if b is None else b + bias

    def _affine_change(self) -> tuple[Tensor, Tensor]:
        """By what the base's weight and bias change where its own running statistics normalise."""
        if not self.adapts:
            return self.weight, self.bias
        layer: Any = self.site.layer
        g = layer._parameters["weight"].detach().to(self.weight.dtype)
        m, v, m_base, v_base = (
            owner.get_buffer(name).to(g.dtype) for owner in (self, layer) for name in ("running_mean", "running_var")
        )
        root = (v + layer.eps).sqrt()
        scale = g + self.weight
        return scale * (v_base + layer.eps).sqrt() / root - g, self.bias + (m_base - m) / root * scale
