"""A training step of a small CNN: the frozen floor, full fine-tuning, HF PEFT's LoRA and ours on every convolution.

Six residual blocks of 1x1, 3x3 and 1x1 convolutions with BatchNorm (64 to 256 channels), 16 images of 64 pixels, LoRA
of rank 4, fp32, one thread; forward and backward, no optimiser step. The floor is a frozen model whose input wants its
gradient. The peak is resident memory of one step above that before it, with the models loaded and no gradients.

    python benchmarks/convolution.py [--rounds 7]
"""

import argparse
import copy
from collections.abc import Callable

import torch
from common import Spread, described, kept_for_backward, one_thread, over, peak_of_step, save, timed
from torch import Tensor, nn

import smidgen

RANK, ALPHA = 4, 8.0
FLOOR, FULL, HF, OURS = "frozen floor", "full fine-tuning", "HF PEFT's LoRA", "**smidgen's LoRA**"


class Block(nn.Module):
    def __init__(self, wide: int, thin: int) -> None:
        super().__init__()
        shapes = [(wide, thin, 1), (thin, thin, 3), (thin, wide, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2, bias=False) for i, o, k in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in shapes)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = torch.relu(norm(conv(h)))
        return x + h


def cnn() -> nn.Module:
    stem = nn.Conv2d(3, 256, 4, stride=4, bias=False)
    return nn.Sequential(stem, *(Block(256, 64) for _ in range(6)), nn.AdaptiveAvgPool2d(1)).eval()


def variants() -> dict[str, tuple[nn.Module, bool]]:
    """Name -> model, and whether its input wants a gradient."""
    import peft

    base = cnn().requires_grad_(False)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=r".*convs\.\d|0")
    )
    ours = copy.deepcopy(base)
    smidgen.attach(ours, smidgen.LoRA(rank=RANK, alpha=ALPHA, targets=smidgen.Targets.of_type(nn.Conv2d)))
    full = copy.deepcopy(base).requires_grad_(True)
    return {FLOOR: (base, True), FULL: (full, False), HF: (theirs, False), OURS: (ours, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    said = parser.parse_args()
    one_thread()
    x = torch.randn(16, 3, 64, 64)
    models = variants()

    def loss_of(name: str) -> Callable[[], Tensor]:
        model, wants = models[name]
        return lambda: model(x.clone().requires_grad_() if wants else x).square().mean()

    def step_of(name: str) -> Callable[[], None]:
        loss = loss_of(name)
        return lambda: torch.autograd.backward(loss())

    times = timed({name: step_of(name) for name in models}, said.rounds)
    ratios, walls = over(times.cpu, FLOOR), over(times.wall, FLOOR)
    kept = {name: kept_for_backward(models[name][0], loss_of(name)) / 2**20 for name in models}
    peaks = {name: peak_of_step(models[name][0], step_of(name)) / 2**20 for name in models}
    rows = [
        [name, Spread.of(times.cpu[name]), ratios[name], walls[name].median, kept[name], peaks[name]] for name in models
    ]
    for name, spread, ratio, wall, size, peak in rows:
        ratio_text = f"{ratio.median:.2f} of the floor, {wall:.2f} by wall time"
        print(f"{name:20s} {spread.median:.3f} s  {ratio_text}  keeps {size:.0f} MB, peak {peak:.0f} MB")
    columns = ["", "CPU seconds", "over the floor", "wall time over the floor", "kept for backward, MB"]
    columns.append("peak above the model, MB")
    tables = [{"title": "one step", "columns": columns, "rows": rows}]
    save("convolution", "LoRA on convolutions", described(__doc__), tables, [])


if __name__ == "__main__":
    main()
