"""FRoD: rotate and scale a weight within a basis that layers of one role share.  Wan et al. 2025, arXiv:2512.23485.

    W = U diag(l0) V^T          W' = W + U (S + diag(l - l0)) V^T

V: (I, I), from the weights of all layers of a role (every q_proj, say), by their joint decomposition.   U: (O, I) and
l0: (I,), from V and W.   l: (I,), and n entries of S (I, I) off its diagonal, at places drawn from `seed`, are trained.
l starts as l0 and S at zero, so training starts from the base model, bit for bit; the paper and Hugging Face PEFT put
U diag(l0) V^T, which is W but for rounding, in its place.   Trainable parameters: I + n per site, n = density I^2.

V, S and U act on the activations one after the other; back from there W' is U (S + diag(l)) V^T where that is W at the
start but for rounding, as it is unless the basis is singular.  That takes N I (2 I + 3 O) multiplications forward and
backward, the layer's own among them; from about N = I tokens on, one product with W' takes less, 3 O I (N + I).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.checks import require_above_zero, require_share
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.full_weight import FullWeightAdapter
from ..core.layers import EmbeddingKind, LinearKind
from ..core.low_rank import is_bare_linear, is_frozen
from ..core.method import Method, Shared, method
from ..core.products import linear
from ..core.site import Site
from ..core.storage import master_dtype

_SPARSE = 0.05  # share of S's entries up to which a sum over them costs less than a dense product
# how far U diag(l0) V^T may be from W, in the dtype they are held in; in 16 bits it is never near enough
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


@method("frod")
@dataclass(frozen=True, kw_only=True)
class FRoD(Method):
    """Full-rank changes within a shared basis.

    density: share of S that is trained.   regularisation: keeps the basis of layers that are alike well-conditioned.
    dropout: probability of dropping an entry of the adapter's input while training.   seed: of the places.
    save_projection: write V and the places as well; else whoever reads the folder computes them again from the base.
    """

    density: float = 0.01
    regularisation: float = 1e-3
    dropout: float = 0.0
    seed: int = 0
    save_projection: bool = True

    summary = "W' = W + U (S + diag(l - l0)) V^T, V shared"
    paper = "Wan et al. 2025, arXiv:2512.23485"
    reads_weight, on_stacks = True, False
    disk = DiskNames(
        "FROD",
        fields={
            "density": "sparse_rate",
            "regularisation": "regularization_alpha",
            "dropout": "frod_dropout",
            "seed": "projection_prng_key",
        },
        tensors={"l": "frod_lambda_l", "s": "frod_lambda_s_values"},
        ignored=("progressbar", "runtime_offload_base_weight"),
    )

    def check(self) -> None:
        require(0 <= self.density <= 1, f"density is {self.density}; it is a share, from 0 to 1")
        require_above_zero(self, "regularisation")
        require_share(self, "dropout")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if isinstance(site.kind, EmbeddingKind):
            return "its basis would be as wide and as high as the vocabulary"
        return None

    def entries_at(self, site: Site) -> int:
        """n at this site."""
        I = site.fan_in
        n = min(int(I * I * self.density), I * (I - 1))
        return max(1, n) if self.density > 0 and I > 1 else n

    def by_weight(self, site: Site) -> bool:
        return not isinstance(site.kind, LinearKind)

    def build(self, site: Site) -> "FRoDAdapter":
        return FRoDAdapter(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "Bases":
        return Bases(self, sites)


def role_of(path: str) -> str:
    """What layers that share a basis have in common, as Hugging Face PEFT names it: the end of the path."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(parts[-2:])


class Bases(Shared):
    """V_<role> (I, I) and places_<role> (2, n) of every role."""

    def __init__(self, method: FRoD, sites: Sequence[Site]) -> None:
        super().__init__()
        self.method, self.sites = method, tuple(sites)
        by_role: dict[str, list[Site]] = {}
        for site in sites:
            by_role.setdefault(role_of(site.path), []).append(site)
        self.role: dict[str, str] = {}
        for role, members in by_role.items():
            widths = sorted({site.fan_in for site in members})
            for site in members:  # layers of other widths cannot share
                self.role[site.name] = role if len(widths) == 1 else f"{role}_{site.fan_in}"
        for site in sites:
            role, I = self.role[site.name], site.fan_in
            if f"V_{role}" not in self._buffers:
                n, like, save = method.entries_at(site), site.stored, method.save_projection
                self.register_buffer(
                    f"V_{role}", torch.empty(I, I, dtype=like.dtype, device=like.device), persistent=save
                )
                places = torch.empty(2, n, dtype=torch.long, device=like.device)
                self.register_buffer(f"places_{role}", places, persistent=save)
                for name, count in (("order", n + I), ("columns", n + I), ("starts", I)):
                    by_row = torch.empty(count, dtype=torch.long, device=like.device)
                    self.register_buffer(f"{name}_{role}", by_row, persistent=False)

    def basis(self, site: Site) -> tuple[Tensor, Tensor]:
        """V and the places of S's entries, for a site."""
        role = self.role[site.name]
        return cast(Tensor, self._buffers[f"V_{role}"]), cast(Tensor, self._buffers[f"places_{role}"])

    def sort(self, site: Site) -> None:
        """Put the entries of S and of the diagonal behind them in the order of their rows."""
        order, columns, starts = self.by_row(site)
        diagonal, (_, places) = torch.arange(len(starts), device=starts.device), self.basis(site)
        row, column = torch.cat([places, diagonal.expand(2, -1)], dim=1)
        order.copy_(row.argsort(stable=True))
        columns.copy_(column[order])
        starts.copy_(torch.searchsorted(row[order], diagonal))

    def by_row(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """How to sort the entries of S + diag (n + I,) by row, their columns then, and where each row starts (I,)."""
        role = self.role[site.name]
        order, columns, starts = (self.get_buffer(f"{name}_{role}") for name in ("order", "columns", "starts"))
        return order, columns, starts

    @torch.no_grad()
    def prepare(self) -> None:
        if any(site.stored.is_meta for site in self.sites):
            return  # the base has no memory yet
        # in Hugging Face PEFT's order and precision, so that its folders without V mean the same here
        generator = torch.Generator().manual_seed(self.method.seed)
        weights: dict[str, dict[int, Tensor]] = {}
        for number, site in enumerate(self.sites):  # of two in one block, the later one counts
            weights.setdefault(self.role[site.name], {})[_block(site.path, number)] = site.weight().detach()
        for role in sorted(weights):
            matrices = [W.to("cpu", torch.float32) for _, W in sorted(weights[role].items())]
            V, places = self._buffers[f"V_{role}"], self._buffers[f"places_{role}"]
            assert V is not None
            assert places is not None
            V.copy_(_joint_basis(matrices, self.method.regularisation))
            I, n = len(V), places.shape[1]
            if n:
                drawn = torch.randperm(I * (I - 1), generator=generator)[:n]
                row, column = drawn // (I - 1), drawn % (I - 1)
                places.copy_(torch.stack([row, column + (column >= row)]))  # the diagonal left out


def _block(path: str, fallback: int) -> int:
    """The number of the block that a layer is in: after "layers", else the first number of its path."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), fallback)


def _joint_basis(matrices: Sequence[Tensor], regularisation: float) -> Tensor:
    """V (I, I) of matrices (O, I): the paper's hierarchical joint decomposition, section 3."""
    stacked = torch.cat(list(matrices))
    if stacked.shape[0] < stacked.shape[1]:
        across: Tensor = torch.linalg.svd(stacked, full_matrices=True)[2]
        return across.T
    Q, R = torch.linalg.qr(stacked)
    I = R.shape[1]
    T = torch.zeros(I, I)
    for part in Q.split([len(W) for W in matrices]):
        T += torch.linalg.inv(part.T @ part + regularisation * torch.eye(I))
    V: Tensor = R.T @ torch.linalg.eigh(T / len(matrices))[1]
    return V


class FRoDAdapter(FullWeightAdapter):
    """l and the entries s of S at one site.

    is_exact: U diag(l0) V^T is W but for rounding.
    """

    in_blocks = False
    U: Tensor
    l0: Tensor

    def __init__(self, method: FRoD, site: Site) -> None:
        super().__init__(site)
        self.dropout, I, like, self.is_exact = method.dropout, site.fan_in, site.stored, False
        self.l = site.empty(I)
        self.s = site.empty(method.entries_at(site))
        self.register_buffer("U", torch.empty(site.fan_out, I, dtype=like.dtype, device=like.device), persistent=False)
        self.register_buffer("l0", torch.empty(I, dtype=master_dtype(like), device=like.device), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        if self.site.stored.is_meta:
            return
        self._bases.sort(self.site)
        V, W = (
            self._bases.basis(self.site)[0].to("cpu", torch.float64),
            self.site.weight().detach().to("cpu", torch.float64),
        )
        try:
            scaled = torch.linalg.solve(V, W.T).T  # U diag(l0)
        except RuntimeError:  # singular
            scaled = W @ torch.linalg.pinv(V, rtol=1e-6).T
        l0 = scaled.norm(dim=0)
        self.U.copy_(torch.where(l0 > 1e-12, scaled / l0, 0))
        self.l0.copy_(l0)
        gap = (self.U.to(V) * self.l0.to(V)) @ V.T - W
        self.is_exact = bool(gap.norm() <= _ROUNDING.get(self.U.dtype, 0) * W.norm())

    def filled(self) -> None:
        self.prepare()  # from the V of the file

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.s)
        with torch.no_grad():
            self.l.copy_(self.l0)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        few, dropped = x.numel() <= self.site.fan_in * x.shape[-1], self.training and self.dropout
        if few and not dropped and self._fuses(call, x):
            return _FrozenLinear.apply(x, self.site.stored, self.site.bias, self, self.l, self.s)  # type: ignore[no-untyped-call]
        with_delta = AdditiveAdapter if few or dropped else FullWeightAdapter
        return with_delta.forward(self, call, x, *args, **kwargs)

    def _fuses(self, call: Call, x: Tensor) -> bool:
        is_usual = torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        is_plain = self.site.storage.plain and is_bare_linear(call) and is_frozen(self.site)
        return self.is_exact and is_usual and is_plain and not torch.compiler.is_compiling()

    def delta(self, x: Tensor) -> Tensor:
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        h = self.V.T.to(x.dtype) @ x.reshape(-1, x.shape[-1]).T  # (I, N)
        return F.linear(self.by_middle(h).T, self.U.to(x.dtype)).view(*x.shape[:-1], -1)

    def weight_delta(self, rows: slice) -> Tensor:
        return self.U[rows].to(self.l.dtype) @ self.by_middle(self.V.T.to(self.l.dtype))

    @property
    def V(self) -> Tensor:
        """V (I, I) of the site's role."""
        return self._bases.basis(self.site)[0]

    def by_middle(self, h: Tensor) -> Tensor:
        """(S + diag(l - l0)) h of h (I, N)."""
        diagonal, I = self.l - self.l0, len(self.l)
        is_sparse = len(self.s) <= _SPARSE * I * I and h.device.type == "cpu" and h.dtype == self.l.dtype
        if not is_sparse or torch.compiler.is_compiling():  # in 16 bits sums would be rounded after each entry
            _, places = self._bases.basis(self.site)
            return torch.diag(diagonal).index_put((places[0], places[1]), self.s).to(h.dtype) @ h
        order, columns, starts = self._bases.by_row(self.site)
        entries = torch.cat([self.s, diagonal])[order]
        # row i of the result is the sum of the rows of h that row i of S has entries for
        return F.embedding_bag(columns, h, starts, mode="sum", per_sample_weights=entries)

    @property
    def _bases(self) -> Bases:
        return cast(Bases, self.shared)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b + ((S + diag(l - l0)) h)^T U^T, h = V^T x^T.   Kept: h (I, N).

    Of g = U^T dy^T (I, N): (S + diag(l - l0))^T g is the gradient of h, and with l in l - l0's place V takes it to x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, part: FRoDAdapter, l: Tensor, s: Tensor) -> Tensor:
        h, y = part.V.T @ x.reshape(-1, x.shape[-1]).T, linear(x, W, b)
        y.view(-1, y.shape[-1]).addmm_(part.by_middle(h).T, part.U.T)
        ctx.save_for_backward(h, l, s)
        ctx.part, ctx.learned = part, (l, s)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        h, *_ = ctx.saved_tensors  # and looked whether the parameters have changed since
        part: FRoDAdapter = ctx.part
        g = torch.mm(part.U.T, dy.reshape(-1, dy.shape[-1]).T)
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            middle = part.by_middle(h)
        # by the parameters of the forward, not the saved ones: checkpointing hands back copies
        needed = [h, *(parameter for parameter in ctx.learned if parameter.requires_grad)]
        dh, *found = torch.autograd.grad(middle, needed, g, allow_unused=True)
        gradients = [found.pop(0) if parameter.requires_grad else None for parameter in ctx.learned]
        dx = torch.mm(dh.addcmul_(g, part.l0[:, None]).T, part.V.T) if ctx.needs_input_grad[0] else None
        return None if dx is None else dx.view(*dy.shape[:-1], -1), None, None, None, *gradients
