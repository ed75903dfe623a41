"""Three recommenders in plain PyTorch, how they are kept in a folder, and what a recommender of one's own has to have.

    matrix_factorisation    s(u, i) = (M p_u) . q_i + b_i                    Koren et al. 2009; M: (D, D), starts as 1
    two_towers              s(u, i) = (p_u + P f_u) . (q_i + Q g_i) + b_i    f, g: features of users and items
    sequence                s(u, i) = h_T . q_i + b_i                        SASRec: Kang & McAuley 2018

p, q, b: rows of tables, one for each user or item.   h_T: what causal attention makes of the user's last T items.

A recommender is an nn.Module with

    forward(users (N,), history (N, T), items (M,)) -> scores (N, M)       history: last item last, -1 where none
    known: Known                    what it was trained on: the names of the rows, and the interactions
    tables: {path: "user" | "item"}          its nn.Embedding with a row for each user or item, read by calling them
    features: {path: "user" | "item"}        its `Rows` of fixed features; may be empty

Where tables are called and not read by `.weight`, they can grow and take adapters.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import FolderError, ModelError, nearest
from ...core.files import atomic_directory
from ...core.safe import read_json, read_tensors, write_tensors
from ..models import Located

Side = Literal["user", "item"]
SIDES: tuple[Side, ...] = ("user", "item")
_LARGEST = 1 << 28  # bytes of a file of names


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a recommender was trained on.

    users, items: names of the tables' rows.   user_features, item_features: names of the columns of `Rows`.
    interactions: (M, 2) rows of user and item, in order of time; they are not recommended again.
    """

    users: tuple[str, ...]
    items: tuple[str, ...]
    user_features: tuple[str, ...] = ()
    item_features: tuple[str, ...] = ()
    interactions: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))

    def names(self, side: Side) -> tuple[str, ...]:
        return self.users if side == "user" else self.items

    def feature_names(self, side: Side) -> tuple[str, ...]:
        return self.user_features if side == "user" else self.item_features


class Rows(nn.Module):
    """A table of fixed numbers, (V, F), read by calling it."""

    weight: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", values.float())

    def forward(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight)


class Recommender(nn.Module):
    """What the three share: q and b, a row for each item, and their score of a query."""

    kind: str
    known: Known
    tables: Mapping[str, Side]
    features: Mapping[str, Side] = {}

    def __init__(self, known: Known, width: int) -> None:
        super().__init__()
        self.known, self.width = known, width
        self.items = _table(len(known.items), width)
        self.item_bias = nn.Embedding(len(known.items), 1)
        nn.init.zeros_(self.item_bias.weight)

    def score(self, query: Tensor, vectors: Tensor, items: Tensor) -> Tensor:
        """query: (N, D).   vectors: (M, D) of the items (M,).   Gives (N, M)."""
        scores: Tensor = query @ vectors.T + self.item_bias(items).T
        return scores


class MatrixFactorisation(Recommender):
    """M is a linear layer: the place of a low-rank change of taste that all users of a segment share."""

    kind = "matrix_factorisation"

    def __init__(self, known: Known, width: int = 32) -> None:
        super().__init__(known, width)
        self.users = _table(len(known.users), width)
        self.mix = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.mix.weight)
        self.tables = {"users": "user", "items": "item", "item_bias": "item"}

    def forward(self, users: Tensor, history: Tensor, items: Tensor) -> Tensor:
        return self.score(self.mix(self.users(users)), self.items(items), items)


class TwoTowers(Recommender):
    """Each side adds its own row to what its features say, so that a new user or item is not without a vector."""

    kind = "two_towers"

    def __init__(self, known: Known, width: int = 32, values: Mapping[Side, Tensor] | None = None) -> None:
        """values: the features of each side, (V, F) 0 or 1; zeros where not given, to be loaded."""
        super().__init__(known, width)
        self.users = _table(len(known.users), width)
        values = values or {side: torch.zeros(len(known.names(side)), len(known.feature_names(side))) for side in SIDES}
        self.user_features, self.item_features = Rows(values["user"]), Rows(values["item"])
        self.user_tower = nn.Linear(len(known.user_features), width, bias=False)
        self.item_tower = nn.Linear(len(known.item_features), width, bias=False)
        self.tables = {"users": "user", "items": "item", "item_bias": "item"}
        self.features = {"user_features": "user", "item_features": "item"}

    def forward(self, users: Tensor, history: Tensor, items: Tensor) -> Tensor:
        query = self.users(users) + self.user_tower(self.user_features(users))
        return self.score(query, self.items(items) + self.item_tower(self.item_features(items)), items)


class SASRec(Recommender):
    """A user is the items taken last: new users need no row.  Positions count backwards from the newest item."""

    kind = "sequence"

    def __init__(self, known: Known, width: int = 32, length: int = 30, blocks: int = 1) -> None:
        super().__init__(known, width)
        self.length = length
        self.positions = _table(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.tables = {"items": "item", "item_bias": "item"}

    def forward(self, users: Tensor, history: Tensor, items: Tensor) -> Tensor:
        history = history[:, -self.length :] if history.shape[1] else history.new_full((len(history), 1), -1)
        there = history >= 0  # (N, T)
        steps = history.shape[1]
        x = self.items(history.clamp(min=0)) * there[..., None]
        x = x + self.positions(torch.arange(steps - 1, -1, -1, device=history.device))
        itself = torch.eye(steps, dtype=torch.bool, device=history.device)
        sees = (torch.ones_like(itself).tril() & there[:, None, :]) | itself  # itself: no row without anything to see
        for block in self.blocks:
            x = block(x, sees[:, None])
        return self.score(self.norm(x[:, -1]), self.items(items), items)


class Block(nn.Module):
    """Attention with one head, then a small network, each added to what it read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        """x: (N, T, D).   sees: (N, 1, T, T) bool."""
        y = self.before(x)[:, None]  # (N, 1, T, D)
        y = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), attn_mask=sees)
        x = x + self.out(y[:, 0])
        y = F.gelu(self.up(self.between(x)))
        return cast(Tensor, x + self.down(y))


KINDS: dict[str, Any] = {cls.kind: cls for cls in (MatrixFactorisation, TwoTowers, SASRec)}


def save_recommender(model: Recommender, folder: str | Path) -> None:
    """Write one of the three as a folder, whole or not at all; what is there is replaced."""
    with atomic_directory(folder, replace=True) as new:
        write_recommender(model, new)


def write_recommender(model: Recommender, folder: Path) -> None:
    """Write one of the three into a folder: config.json, names.json, model.safetensors, interactions.safetensors."""
    known = model.known
    config: dict[str, Any] = {"model_type": "recommender", "kind": model.kind, "width": model.width}
    if isinstance(model, SASRec):
        config |= {"length": model.length, "blocks": len(model.blocks)}
    names = {f"{side}s": known.names(side) for side in SIDES}
    names |= {f"{side}_features": known.feature_names(side) for side in SIDES}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")
    write_tensors(folder / "model.safetensors", {n: t.detach().cpu() for n, t in model.state_dict().items()})
    write_tensors(folder / "interactions.safetensors", {"interactions": known.interactions})


def load_recommender(located: Located) -> Recommender:
    """The recommender in a folder of ours, or that a function of the user's makes.  Raises ModelError."""
    if located.is_made:
        return _checked(located.made(), located.name)
    if not located.is_local or located.is_yolo:
        raise ModelError(f"{located.name} is no recommender: give a folder of ours, or FILE.py:NAME")
    folder = Path(located.source)
    try:
        config, names = read_json(folder / "config.json"), read_json(folder / "names.json", max_bytes=_LARGEST)
        kind = config.pop("kind", None)
        if config.pop("model_type", None) != "recommender" or kind not in KINDS:
            raise ModelError(f"{folder} is no recommender; config.json says {kind!r}, kinds: {', '.join(KINDS)}")
        interactions = read_tensors(folder / "interactions.safetensors")["interactions"]
        known = Known(**{key: tuple(map(str, some)) for key, some in names.items()}, interactions=interactions)
        model: Recommender = KINDS[kind](known, **{key: int(value) for key, value in config.items()})
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
    except (FolderError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} is no whole recommender: {str(error).splitlines()[0]}") from error
    return _checked(model, located.name)


def _checked(module: nn.Module, name: str) -> Recommender:
    """The module, if it has what a recommender needs.  Raises ModelError saying all that it lacks."""
    model, wrong = cast(Recommender, module), []
    known = getattr(module, "known", None)
    if not isinstance(known, Known):
        raise ModelError(
            f"{name} is no recommender: it has no `known` that is a Known (smidgen.tasks.ranking.recommenders)"
        )
    if len(set(known.users)) < len(known.users) or len(set(known.items)) < len(known.items):
        wrong.append("known names a user or an item twice")
    pairs, sizes = known.interactions, torch.tensor([len(known.users), len(known.items)])
    if pairs.ndim != 2 or pairs.shape[1] != 2 or bool(((pairs < 0) | (pairs >= sizes)).any()):
        wrong.append("known.interactions is not (M, 2) rows of users and items")
    modules = dict(module.named_modules())
    for path, side in {**getattr(module, "tables", {}), **getattr(module, "features", {})}.items():
        table = modules.get(path)
        if not isinstance(table, nn.Embedding | Rows):
            near = nearest(path, modules)
            hint = f"; did you mean {near[0]}?" if near else ""
            wrong.append(f'"{path}" is no table (nn.Embedding, or Rows for features){hint}')
        elif len(table.weight) != len(known.names(side)):
            wrong.append(f'"{path}" has {len(table.weight)} rows for {len(known.names(side))} {side}s')
    if "item" not in getattr(module, "tables", {}).values():
        wrong.append('`tables` names no table of items; it is {path: "user" or "item"}')
    if wrong:
        raise ModelError(f"{name} is no recommender: {'; '.join(wrong)}")
    return model


def _table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=1 / math.sqrt(width) / 2)
    return table
