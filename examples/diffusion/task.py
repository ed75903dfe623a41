"""A small diffusion model of 8 x 8 images, and the two ways in which its loss needs chance.

    x_t = sqrt(a_t) x + sqrt(1 - a_t) e        e: noise, t: a step, a_t: how much of the image is left there
    loss = | e - model(x_t, t) |^2             Ho et al. 2020, arXiv:2006.11239, equation 14

While training e and t are drawn anew in each batch (`augment`); where the model is judged they are those of the data
set, which follow from its seed, so that every model meets the same noise.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from smidgen.tasks.pieces import Pieces

FOLDER = Path(".cache/diffusion")
STEPS = 100  # of the diffusion
LEFT = torch.cos(torch.linspace(0, 1, STEPS + 1)[1:] * math.pi / 2).square().clamp(1e-3, 0.999)  # a_t: (100,)


class Block(nn.Module):
    """Two convolutions with a shortcut, told the step between them."""

    def __init__(self, channels_in: int, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.step = nn.Linear(width, channels)
        self.norm = nn.GroupNorm(8, channels)
        self.short = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        h = F.silu(self.norm(self.first(x)) + self.step(step)[:, :, None, None])
        return F.silu(self.short(x) + self.second(h))


class UNet(nn.Module):
    """The noise in noised images: (N, 1, 8, 8), noise like it and steps (N,) -> (N, 1, 8, 8)."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        width = 2 * channels
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.down1, self.down2 = Block(1, channels, width), Block(channels, width, width)
        self.middle = Block(width, width, width)
        self.up2, self.up1 = Block(2 * width, channels, width), Block(2 * channels, channels, width)
        self.out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, image: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        left = LEFT.to(image.device)[step][:, None, None, None]
        return self.noise_in(left.sqrt() * image + (1 - left).sqrt() * noise, step)

    def noise_in(self, x: Tensor, step: Tensor) -> Tensor:
        half = self.embed[0].in_features // 2
        angles = step[:, None] * torch.exp(-math.log(1000) * torch.arange(half, device=x.device) / half)
        t = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        one = self.down1(x, t)  # (N, C, 8, 8)
        two = self.down2(F.avg_pool2d(one, 2), t)  # (N, 2 C, 4, 4)
        deep = self.middle(F.avg_pool2d(two, 2), t)  # (N, 2 C, 2, 2)
        two = self.up2(torch.cat([F.interpolate(deep, scale_factor=2), two], dim=1), t)
        one = self.up1(torch.cat([F.interpolate(two, scale_factor=2), one], dim=1), t)
        return self.out(one)


class Noised(torch.utils.data.Dataset):
    """Each image with `draws` noises and steps that follow from the seed."""

    def __init__(self, images: Tensor, draws: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = images.repeat(draws, 1, 1, 1)
        self.noise = torch.randn(self.images.shape, generator=generator)
        self.step = torch.randint(STEPS, (len(self.images),), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = self.noise[index]
        return {"image": self.images[index], "noise": noise, "step": self.step[index], "targets": noise}


def draw_again(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training batch with other noise and steps."""
    noise = torch.randn_like(batch["image"])
    return {**batch, "noise": noise, "step": torch.randint_like(batch["step"], STEPS), "targets": noise}


def each_row(predicted: Tensor, noise: Tensor) -> Tensor:
    """The squared error of each image, (N,)."""
    return (predicted - noise).square().mean(dim=(1, 2, 3))


def model() -> UNet:
    """The model that prepare.py trained on the digits 0 to 7."""
    made = UNet()
    made.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return made


def eights_and_nines() -> Pieces:
    """Digits that the model has never seen: half of them to learn, the rest to choose the step and to judge."""
    images = load_file(FOLDER / "digits.safetensors")["new"]
    half, rest = len(images) // 2, 3 * len(images) // 4
    return Pieces(
        model=model,
        train=Noised(images[:half], draws=1, seed=0),
        valid=Noised(images[half:rest], draws=8, seed=1),
        test=Noised(images[rest:], draws=8, seed=2),
        loss=each_row,
        augment=draw_again,
    )
