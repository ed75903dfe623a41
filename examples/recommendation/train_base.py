"""Train a recommender from nothing: what `prepare.py` makes the base with, and `compare.py` retrains with."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.data.interactions import Histories, read_features
from smidgen.data.read import read
from smidgen.tasks.ranking.recommenders import SIDES, Known, MatrixFactorisation, Recommender, SASRec, TwoTowers

BATCH, HISTORY = 512, 30
RATE, DECAY = 3e-3, 0.2  # the decay is of rows of tables alone


def train_base(
    kind: str, rows: Sequence[tuple[str, str, float]], files: dict[str, Path], *, epochs: int, seed: int = 0
) -> tuple[Recommender, float]:
    """A recommender of these interactions (user, item, time) with softmax over all items, and the seconds it took.

    files: of features, "user" and "item", which two_towers reads.
    """
    torch.manual_seed(seed)
    rows = sorted(rows, key=lambda row: row[2])
    names = {"user": tuple(dict.fromkeys(u for u, _, _ in rows)), "item": tuple(dict.fromkeys(i for _, i, _ in rows))}
    place = {side: {name: i for i, name in enumerate(names[side])} for side in names}
    pairs = torch.tensor([[place["user"][u], place["item"][i]] for u, i, _ in rows])
    known = Known(users=names["user"], items=names["item"], interactions=pairs)
    if kind == "matrix_factorisation":
        model: Recommender = MatrixFactorisation(known)
    elif kind == "sequence":
        model = SASRec(known, length=HISTORY)
    else:
        model = _two_towers(known, files)
    start = time.monotonic()
    _fit(model, pairs, epochs)
    return model.eval(), time.monotonic() - start


def _fit(model: Recommender, pairs: Tensor, epochs: int) -> None:
    users, items = pairs[:, 0].tolist(), pairs[:, 1].tolist()
    histories = Histories(users, items, list(range(len(users))))
    history = torch.full((len(users), HISTORY if model.kind == "sequence" else 0), -1)
    for i, user in enumerate(users if model.kind == "sequence" else []):
        before = histories.items(user)[: histories.count_before(user, i)][-HISTORY:]
        if before:
            history[i, -len(before) :] = torch.tensor(before)
    everything = torch.arange(len(model.known.items))
    steps = epochs * -(-len(pairs) // BATCH)
    groups: dict[float, list[Tensor]] = {DECAY: [], 0.0: []}
    for name, parameter in model.named_parameters():
        groups[DECAY if name.split(".")[0] in model.tables else 0.0].append(parameter)
    split = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]
    optimizer = torch.optim.AdamW(split, lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(pairs)).split(BATCH):
            loss = F.cross_entropy(model(pairs[some, 0], history[some], everything), pairs[some, 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _two_towers(known: Known, files: dict[str, Path]) -> TwoTowers:
    words = {side: read_features(read(files[side])[0]) for side in SIDES}
    names = {side: sorted({word for some in words[side].values() for word in some}) for side in SIDES}
    values = {
        side: torch.tensor([[float(word in words[side][name]) for word in names[side]] for name in known.names(side)])
        for side in SIDES
    }
    known = Known(
        users=known.users,
        items=known.items,
        interactions=known.interactions,
        user_features=tuple(names["user"]),
        item_features=tuple(names["item"]),
    )
    return TwoTowers(known, values=values)
