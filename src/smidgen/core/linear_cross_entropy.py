"""Cross entropy of a linear head without its logits: they exist for a few rows at a time.

    u = s (h W^T + b)           (N, V)      z = c tanh(u / c)    with a soft cap c, else z = u
    loss_n = log sum_v exp z_nv - (1 - e) z_ny - e mean_v z_nv
    g_n    = (softmax(z_n) - (1 - e) onehot(y_n) - e / V) s (1 - (z_n / c)^2)
    dh = g W   (N, D)           dW = g^T h   (V, D)              db = sum_n g   (V,)

h: (N, D) hidden states   W: (V, D), b: (V,) the head, over a vocabulary of V   y: targets   s: scale   e: smoothing

Where the head is frozen, dh is made in the forward, while a chunk's logits are there; what is kept until the backward
is dh alone, and each row of it is multiplied with what comes from above.  Where W or b is trained, the chunk's logits
are made once more in the backward.  A head that is any function is run chunk by chunk under activation checkpointing.
The idea: Wijmans et al. 2024, arXiv:2411.09009 (Cut Cross-Entropy); Hsu et al. 2024, arXiv:2410.10989 (Liger Kernel).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import require
from .site import compute_dtype

Head = Callable[[Tensor], Tensor]
_NUMBERS, _LEAST_ROWS = 1 << 23, 128  # of one chunk's logits: 32 MB in fp32; fewer rows read W too often


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor | Head,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross entropy of the logits `h @ weight.T + bias`, summed over all rows, without having all logits at once.

    h: (..., D), what goes into the head.   weight: the head: (V, D), its nn.Linear, or any function or module
    (rows, D) -> (rows, V), which runs once more in the backward.   bias: (V,), beside that of a layer or function.
    targets: (...) class indices below V; rows whose target is `ignore_index` count nothing.
    chunk: rows whose logits exist at a time, by default some 8 million numbers of them.
    softcap, scale: logits are softcap tanh(scale u / softcap) of the head's outputs u: Gemma 2, Cohere, Granite.
    Returns one number in fp32 (fp64 for fp64): divide it by the count of targets for the mean.
    Raises ConfigError if shapes do not fit, RuntimeError where a second derivative is asked for.
    Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989.
    """
    losses, _ = linear_cross_entropy_rows(
        h,
        weight,
        bias,
        targets,
        ignore_index=ignore_index,
        chunk=chunk,
        softcap=softcap,
        scale=scale,
        label_smoothing=label_smoothing,
    )
    return losses.sum()


def linear_cross_entropy_rows(
    h: Tensor,
    weight: Tensor | Head,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Per row the loss that `linear_cross_entropy` sums, and whether the target has the largest logit.

    Takes and raises what that does.   A plain nn.Linear is taken by its weight and bias; rows of the target
    `ignore_index` are not multiplied at all, their loss is 0 and they are not right.
    Returns losses (...) in fp32 (fp64 for fp64), differentiable once, and right (...), bool.
    """
    if isinstance(weight, nn.Linear) and _is_plain(weight):
        own, weight = weight.bias, weight.weight
        bias = own if bias is None else bias if own is None else own + bias
    _require_fitting(h, weight, bias, targets, chunk)
    rows, flat = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
    how = _How(ignore_index, chunk, softcap, scale, label_smoothing)
    if not isinstance(weight, Tensor):
        losses, right = _through_function(rows, weight, bias, flat, how)
    else:
        dtype = compute_dtype(h)
        if dtype != h.dtype:  # autocast: as the layer alone would
            rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(h.device.type, enabled=False):
            if torch.is_grad_enabled():
                losses, right = _Losses.apply(rows, weight, bias, flat, how)  # type: ignore[no-untyped-call]
            else:
                losses, right, _ = _walk(rows, weight, bias, flat, how, wants_dh=False)
    return losses.view(targets.shape), right.view(targets.shape)


def _require_fitting(h: Tensor, weight: Tensor | Head, bias: Tensor | None, targets: Tensor, chunk: int | None) -> None:
    """Raise ConfigError naming all that does not fit."""
    wrong = []
    if h.shape[:-1] != targets.shape:
        wrong.append(f"h {tuple(h.shape)} wants targets {tuple(h.shape[:-1])}; they are {tuple(targets.shape)}")
    if isinstance(weight, Tensor):
        if weight.shape[1:] != h.shape[-1:]:
            wrong.append(f"h {tuple(h.shape)} wants a weight (V, {h.shape[-1]}); it is {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            wrong.append(f"the weight {tuple(weight.shape)} wants a bias ({len(weight)},); it is {tuple(bias.shape)}")
    if chunk is not None and chunk < 1:
        wrong.append(f"chunk is {chunk}; at least one row's logits exist at a time")
    require(not wrong, "; ".join(wrong))


@dataclass(frozen=True)
class _How:
    """What the public functions were told, beside the tensors."""

    ignore_index: int
    chunk: int | None
    softcap: float | None
    scale: float
    smoothing: float

    def chunks(self, targets: Tensor, vocabulary: int | None) -> Sequence[Tensor]:
        """Indices of the rows that count, a chunk at a time; one empty chunk where there are none."""
        size = self.chunk or max(_LEAST_ROWS, _NUMBERS // vocabulary if vocabulary else 0)
        return torch.split((targets != self.ignore_index).nonzero()[:, 0], size)

    def shaped(self, u: Tensor) -> Tensor:
        """z of the head's own output, at least fp32.  Changes fp32 outputs in place."""
        z = u if u.dtype == torch.float64 else u.float()
        z = z if self.scale == 1.0 else z.mul_(self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, z: Tensor) -> Tensor | None:
        """dz/du (rows, V), or None where it is the scale everywhere."""
        return None if self.softcap is None else (z / self.softcap).square_().neg_().add_(1)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        losses, right, dh = _walk(h, weight, bias, targets, how, wants_dh=ctx.needs_input_grad[0] and not trains_head)
        ctx.save_for_backward(dh, *((h, weight, bias, targets) if trains_head else ()))
        ctx.how = how
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, above: Tensor, _: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # torch's once_differentiable would give a constant, and wrong second derivatives
            raise RuntimeError("linear_cross_entropy has no second derivative: leave create_graph=True out")
        dh, *saved = ctx.saved_tensors
        dW = db = None
        if saved:
            dh, dW, db = _head_gradients(saved, above, ctx.how, ctx.needs_input_grad)
        elif dh is not None:
            dh = dh * above.to(dh.dtype)[:, None]
        return dh, dW, db, None, None


def _walk(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How, *, wants_dh: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses and right (N,), and if wanted dh (N, D) for a gradient of 1 from above."""
    losses = h.new_zeros(len(h), dtype=torch.promote_types(h.dtype, torch.float32))
    right = torch.zeros_like(targets, dtype=torch.bool)
    dh = torch.zeros_like(h) if wants_dh else None
    for rows in how.chunks(targets, len(weight)):
        y = targets[rows]
        z = how.shaped(F.linear(h[rows], weight, bias))
        slope = how.slope(z) if dh is not None else None
        losses[rows], right[rows], shares = _chunk_losses(z, y, how.smoothing)
        if dh is not None:
            dh[rows] = _logit_gradient(shares, y, slope, how).to(h.dtype) @ weight
    return losses, right, dh


def _chunk_losses(z: Tensor, y: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and right (rows,), and the softmax (rows, V), which takes the place of z."""
    best, at = z.max(dim=1)
    expected = z.gather(1, y[:, None])[:, 0]
    if smoothing:
        expected = torch.lerp(expected, z.mean(1), smoothing)
    shares = z.sub_(best[:, None]).exp_()
    total = shares.sum(1)
    losses = best + total.log() - expected
    return losses, at == y, shares.div_(total[:, None])


def _logit_gradient(shares: Tensor, y: Tensor, slope: Tensor | None, how: _How) -> Tensor:
    """g (rows, V), in the place of the softmax."""
    less = shares.new_full((len(y), 1), how.smoothing - 1)
    g = shares.scatter_add_(1, y[:, None], less)
    if how.smoothing:
        g.sub_(how.smoothing / g.shape[1])
    if slope is not None:
        g.mul_(slope)
    return g if how.scale == 1.0 else g.mul_(how.scale)


def _head_gradients(
    saved: Sequence[Any], above: Tensor, how: _How, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh, dW and db, as far as wanted, from logits made again.  Sums over chunks are kept in at least fp32."""
    h, weight, bias, targets = saved
    dh = torch.zeros_like(h) if wanted[0] else None
    dW = torch.zeros_like(weight, dtype=above.dtype) if wanted[1] else None
    db = torch.zeros(len(weight), dtype=above.dtype, device=h.device) if wanted[2] else None
    for rows in how.chunks(targets, len(weight)):
        y, some = targets[rows], h[rows]
        z = how.shaped(F.linear(some, weight, bias))
        slope = how.slope(z)
        g = _logit_gradient(_chunk_losses(z, y, how.smoothing)[2], y, slope, how).mul_(above[rows, None])
        if db is not None:
            db += g.sum(0)
        g = g.to(h.dtype)
        if dh is not None:
            dh[rows] = g @ weight
        if dW is not None:
            dW += g.T @ some
    return dh, None if dW is None else dW.to(weight.dtype), None if db is None else db.to(bias.dtype)


def _through_function(h: Tensor, head: Head, bias: Tensor | None, targets: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    """The same for a head that is a function, by autograd; each chunk is run once more in the backward."""

    def of_chunk(some: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        u = head(some)
        u = u if bias is None else u + bias
        z = (u if u.dtype == torch.float64 else u.float()) * how.scale
        z = z if how.softcap is None else how.softcap * torch.tanh(z / how.softcap)
        return F.cross_entropy(z, y, reduction="none", label_smoothing=how.smoothing), z.argmax(1) == y

    found = []
    for rows in how.chunks(targets, None):
        if torch.is_grad_enabled():
            found.append((rows, *checkpoint(of_chunk, h[rows], targets[rows], use_reentrant=False)))
        else:
            found.append((rows, *of_chunk(h[rows], targets[rows])))
    where, losses, right = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (
        losses.new_zeros(len(h)).index_copy(0, where, losses),
        torch.zeros_like(targets, dtype=torch.bool).index_copy(0, where, right),
    )


def _is_plain(layer: nn.Linear) -> bool:
    """A linear layer that does nothing but its own: no adapter, no hook."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)
