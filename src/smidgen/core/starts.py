"""Where a low-rank change B A may start, computed from the weight or drawn.

    principal      the top of W's singular values         PiSSA    Meng et al. 2024, arXiv:2404.02948, equations 2-3
    triangular     the first rows of its QR               OLoRA    Büyükakyüz 2024, arXiv:2406.01775, algorithm 1
    minor          the bottom of its singular vectors     MiCA     arXiv:2604.01694
    orthogonal     random A and B with B A = 0            as in HF PEFT

    W: (..., O, I)   A: (..., R, I)   B: (..., O, R)   s: the scale of the change.   Leading dimensions are experts.

The first two leave out of the weight what A and B start with: W' = W - s B0 A0 + s B A.
"""

import math

import torch
from torch import Tensor, nn

from .layers import EmbeddingKind
from .site import Site
from .storage import master_dtype

Factors = tuple[Tensor, Tensor]  # A, B


def drawn(start: str, site: Site, A: Tensor, B: Tensor, generator: torch.Generator | None) -> Factors:
    """A and B of a random start, of the shapes of these: "kaiming", "gaussian" or "orthogonal"."""
    A, B = torch.zeros_like(A), torch.zeros_like(B)
    stack, rank = site.linear.stack, B.shape[1]
    if start == "orthogonal":
        A, B = orthogonal(A.view(stack, rank, -1), B.view(stack, -1, rank), generator)
        return A.flatten(0, 1), B.flatten(0, 1)
    if isinstance(site.kind, EmbeddingKind):
        nn.init.normal_(B, generator=generator)
    elif start == "gaussian":
        nn.init.normal_(A, std=1 / rank, generator=generator)
    else:  # the authors' choice, so results compare
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A, B


def of_weight(start: str, site: Site, rank: int, scale: float, generator: torch.Generator | None = None) -> Factors:
    """A (E R, I) and B (E O, R) of a start that is computed from the weight at this site."""
    W = site.weight().to(master_dtype(site.stored))
    W = W.reshape(site.linear.stack, site.fan_out, site.fan_in)
    if start == "pissa":
        A, B = principal(W, rank, scale)
    elif start == "pissa_fast":
        A, B = principal_fast(W, rank, scale, generator)
    else:
        A, B = triangular(W, rank) if start == "olora" else minor(W, rank)
    return A.flatten(0, 1), B.flatten(0, 1)


def principal(W: Tensor, rank: int, scale: float) -> Factors:
    """A and B with s B A = the best approximation of W of this rank, the singular values shared evenly."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return balanced(U[..., :rank], S[..., :rank], Vh[..., :rank, :], scale)


def principal_fast(
    W: Tensor, rank: int, scale: float, generator: torch.Generator | None, iterations: int = 4
) -> Factors:
    """`principal` by subspace iteration on 2 R random directions: Halko et al. 2009, arXiv:0909.4061, algorithm 4.4."""
    width = min(2 * rank, *W.shape[-2:])
    drawn = torch.randn(*W.shape[:-2], W.shape[-1], width, dtype=W.dtype, device=W.device, generator=generator)
    Q = torch.linalg.qr(W @ drawn).Q  # (..., O, 2 R)
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return balanced(Q @ U[..., :rank], S[..., :rank], Vh[..., :rank, :], scale)


def triangular(W: Tensor, rank: int) -> Factors:
    """A: the first rows of the triangle R, B: the first columns of Q, where W = Q R."""
    Q, R = torch.linalg.qr(W)
    return R[..., :rank, :], Q[..., :rank]


def minor(W: Tensor, rank: int) -> Factors:
    """A = 0, and B: the left singular vectors of the smallest singular values, which is not trained."""
    U = torch.linalg.svd(W, full_matrices=False).U
    return W.new_zeros(*W.shape[:-2], rank, W.shape[-1]), U[..., -rank:]


def orthogonal(A: Tensor, B: Tensor, generator: torch.Generator | None) -> Factors:
    """A = Q1^T X / 10 and B = Y Q2 / 10, random, of the shapes of these; so B A = Y Q2 Q1^T X / 100 = 0, to rounding.

    Q1 and Q2 are the odd and the even rows of a random orthogonal matrix (R, R).   R is even.
    """
    *experts, rank, I = A.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*experts, *shape, dtype=A.dtype, device=A.device, generator=generator)

    Q = torch.linalg.qr(normal(rank, rank)).Q
    A = Q[..., 0::2, :].mT @ normal(rank // 2, I) / 10
    return A, normal(B.shape[-2], rank // 2) @ Q[..., 1::2, :] / 10


def balanced(U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> Factors:
    """A = sqrt(S / s) V^T and B = U sqrt(S / s), so that s B A = U S V^T."""
    root = (S / scale).sqrt()
    return root[..., :, None] * Vh, U * root[..., None, :]


def gradient_aligned(G: Tensor, rank: int, gamma: float = 16.0) -> Factors:
    """A and B by which the first step of LoRA is nearest to that of full fine-tuning.

    G: (..., O, I), the gradient of the weight.   LoRA-GA, Wang et al. 2024, arXiv:2407.05000, theorems 3.1 and 3.2.
    """
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    size = G.shape[-2] ** 0.25 / math.sqrt(gamma)
    return size * Vh[..., :rank, :], size * U[..., rank : 2 * rank]
