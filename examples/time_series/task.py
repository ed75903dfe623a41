"""Forecasting: an LSTM reads 36 months of a series and says the next 12.

A window is seen in its own units: minus the mean and over the deviation of the 36 months.  So the same model reads
temperatures, traffic and rivers.
"""

import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from smidgen.tasks.pieces import Pieces

FOLDER = Path(".cache/time_series")
READ, SAID = 36, 12  # months


class Forecaster(nn.Module):
    """(N, 36, 1) -> (N, 12), months before and after."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, num_layers=2, batch_first=True)
        self.out = nn.Linear(width, SAID)

    def forward(self, months: Tensor) -> Tensor:
        hidden, _ = self.lstm(months)
        return self.out(hidden[:, -1])


class Windows(torch.utils.data.Dataset):
    """All windows of a series whose 12 months to be said lie within `start` to `end`; row: (36, 1) and (12,)."""

    def __init__(self, series: Tensor, start: int = 0, end: int | None = None) -> None:
        first = max(start, READ)
        last = (len(series) if end is None else end) - SAID
        self.series, self.places = series, range(first, last + 1)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        place = self.places[index]
        before, after = self.series[place - READ : place], self.series[place : place + SAID]
        mean, deviation = before.mean(), before.std().clamp_min(1e-6)
        return ((before - mean) / deviation)[:, None], (after - mean) / deviation


def series(name: str) -> Tensor:
    """The months of a series, (M,)."""
    with open(FOLDER / f"{name}.csv", newline="") as file:
        return torch.tensor([float(row["value"]) for row in csv.DictReader(file)])


def model() -> Forecaster:
    """The model that prepare.py trained on five other series."""
    made = Forecaster()
    made.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return made


def sea() -> Pieces:
    """The warmth of the sea off Peru, where El Nino is seen: learn from 1950 to 1979, choose the step on the 1980s,
    judge on 1990 to 2010.
    """
    months = series("elnino")
    return Pieces(
        model=model,
        train=Windows(months, end=360),
        valid=Windows(months, start=360, end=480),
        test=Windows(months, start=480),
        loss=F.l1_loss,
        metrics={"mae": F.l1_loss, "rmse": lambda said, true: F.mse_loss(said, true).sqrt()},
        lower_is_better=("mae", "rmse"),
        head="out",
    )


def air_travel() -> Windows:
    """A series that the model was trained on: what does adapting to the sea cost there?"""
    return Windows(series("AirPassengers"))
