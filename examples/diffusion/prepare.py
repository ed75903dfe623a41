"""scikit-learn's handwritten digits, and a diffusion model trained on 0 to 7: the model that is adapted to 8 and 9."""

import csv
import gzip
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from task import FOLDER, Noised, UNet, draw_again, each_row
from torch import Tensor

STEPS, BATCH = 2000, 64


def digits() -> tuple[Tensor, Tensor]:
    """(N, 1, 8, 8) from -1 to 1, and which digit each is, (N,)."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations is not None
    with gzip.open(Path(package.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", "rt") as file:
        table = torch.tensor([[float(value) for value in row] for row in csv.reader(file)])
    return table[:, :64].view(-1, 1, 8, 8) / 8 - 1, table[:, 64]


def train_base(images: Tensor) -> None:
    torch.manual_seed(0)
    model, rows = UNet(), Noised(images, draws=1, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    total = 0.0
    for _ in range(STEPS):
        some = torch.randint(len(rows), (BATCH,))
        batch = draw_again({"image": rows.images[some], "step": rows.step[some]})
        loss = each_row(model(batch["image"], batch["noise"], batch["step"]), batch["targets"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item() / STEPS
    save_file(model.state_dict(), FOLDER / "base.safetensors")
    size = sum(p.numel() for p in model.parameters())
    print(f"{FOLDER}/base.safetensors: {size:,} parameters, mean loss {total:.3f} over {STEPS} steps")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    images, digit = digits()
    generator = torch.Generator().manual_seed(0)
    new = images[digit >= 8]
    new = new[torch.randperm(len(new), generator=generator)]
    save_file({"old": images[digit < 8].contiguous(), "new": new}, FOLDER / "digits.safetensors")
    print(f"{FOLDER}/digits.safetensors: {int((digit < 8).sum())} digits from 0 to 7, {len(new)} eights and nines")
    train_base(images[digit < 8])
