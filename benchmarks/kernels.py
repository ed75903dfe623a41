"""What one frozen linear layer costs with an adapter, over the frozen layer alone with a gradient to its input.

Rank 16 beside layers of 1024, 8 beside layers of 384. "autograd" is the formula y = x W^T + s (x A^T) B^T written out,
its factors cast to the dtype of x. What is kept for backward counts x, which layers that read it share.

    python benchmarks/kernels.py [--rounds 15] [--only 384x1536]
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Spread, cpu_seconds, described, interleaved, kept_for_backward, one_thread, over, save
from torch import Tensor, nn
from training_step import DROPOUT, FLOOR

import smidgen


@dataclass(frozen=True)
class Shape:
    """One layer (I -> O), how many rows it reads, and the adapter's rank."""

    fan_in: int
    fan_out: int
    rows: int
    rank: int

    @property
    def name(self) -> str:
        return f"{self.fan_in}x{self.fan_out}"


SHAPES = (Shape(1024, 1024, 512, 16), Shape(1024, 2816, 512, 16), Shape(384, 1536, 1536, 8), Shape(384, 384, 1536, 8))


class Autograd(nn.Module):
    """The formula of LoRA, left to autograd."""

    def __init__(self, layer: nn.Linear, rank: int, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = layer.requires_grad_(False), nn.Dropout(dropout)
        self.A = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + 2 * (self.dropout(x) @ self.A.to(x.dtype).T) @ self.B.to(x.dtype).T
        return y


def variants_of(shape: Shape, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layer in every dress."""

    def layer() -> nn.Linear:
        return nn.Linear(shape.fan_in, shape.fan_out, bias=False).to(dtype)

    def ours(method: Any, **settings: Any) -> nn.Module:
        model = nn.Sequential(layer())
        smidgen.attach(model, method(rank=shape.rank, alpha=2 * shape.rank, targets="0", **settings), seed=0)
        return model

    def peft(**settings: Any) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=["0"], **settings)
        wrapped: nn.Module = get_peft_model(nn.Sequential(layer()), config)  # type: ignore[arg-type]
        return wrapped

    dropped = f", dropout {DROPOUT}"
    return {
        FLOOR: nn.Sequential(layer()).requires_grad_(False),
        "LoRA, **smidgen**": ours(smidgen.LoRA),
        "LoRA, autograd": Autograd(layer(), shape.rank, 0.0),
        "LoRA, HF PEFT": peft(),
        f"LoRA, **smidgen**{dropped} on elements": ours(smidgen.LoRA, dropout=DROPOUT),
        f"LoRA, **smidgen**{dropped} on features": ours(smidgen.LoRA, dropout=DROPOUT, dropout_on="features"),
        f"LoRA, autograd{dropped}": Autograd(layer(), shape.rank, DROPOUT),
        f"LoRA, HF PEFT{dropped}": peft(lora_dropout=DROPOUT),
        "DoRA, **smidgen**": ours(smidgen.DoRA),
        "DoRA, HF PEFT": peft(use_dora=True),
    }


def backward_of(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """One forward and its backward."""
    parameters = list(model.parameters())

    def run() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(model(x), dy)

    return run


def measure(
    shape: Shape, dtype: torch.dtype, rounds: int
) -> tuple[dict[str, Spread], dict[str, Spread], dict[str, float]]:
    """Forward, forward and backward, each over the floor's; bytes kept beside x over those of x."""
    x = torch.randn(shape.rows, shape.fan_in).to(dtype).requires_grad_()
    dy = torch.randn(shape.rows, shape.fan_out).to(dtype)
    models = {name: model.train() for name, model in variants_of(shape, dtype).items()}
    forward = interleaved({name: functools.partial(model, x) for name, model in models.items()}, rounds, cpu_seconds)
    both = interleaved({name: backward_of(model, x, dy) for name, model in models.items()}, rounds, cpu_seconds)
    size = x.untyped_storage().nbytes()
    kept = {name: kept_for_backward(model, functools.partial(model, x)) / size for name, model in models.items()}
    return over(forward, FLOOR), over(both, FLOOR), kept


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--only", choices=[shape.name for shape in SHAPES], help="one layer, printed and not saved")
    asked = arguments.parse_args()
    one_thread()
    tables = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if asked.only in (None, shape.name) else ():
            forward, both, kept = measure(shape, dtype, asked.rounds)
            title = f"{shape.name}, {shape.rows} rows, rank {shape.rank}, {str(dtype).removeprefix('torch.')}"
            print(title)
            for name in both:
                figures = f"forward {forward[name].median:5.2f}  with backward {both[name].median:5.2f}"
                print(f"  {name:48s} {figures}  kept {kept[name]:5.2f}")
            tables.append(
                {
                    "title": title,
                    "columns": ["", "forward / floor", "forward and backward / floor", "kept for backward / x"],
                    "rows": [[name, forward[name], both[name], kept[name]] for name in both],
                    "plot": [["forward and backward / floor"]],
                }
            )
    if not asked.only:
        save("kernels", "One linear layer", described(__doc__), tables, [])


if __name__ == "__main__":
    main()
