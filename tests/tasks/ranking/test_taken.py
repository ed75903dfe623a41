"""What users took: the rank that popularity alone would give an item."""

import random

import pytest
import torch

from smidgen.tasks.ranking.catalogue import Catalogue
from smidgen.tasks.ranking.recommenders import Known
from smidgen.tasks.ranking.taken import Taken


def by_definition(taken: Taken, user: int, item: int) -> int:
    """Twice 1 + the items taken more often + half of those taken as often, of the items that the user has not taken."""
    counts = taken.counts.tolist()
    others = [i for i in range(len(counts)) if i != item and i not in taken.histories.items(user)]
    higher, equal = (sum(test(counts[i]) for i in others) for test in (counts[item].__lt__, counts[item].__eq__))
    return 2 + 2 * higher + equal


@pytest.mark.parametrize("seed", range(20))
def test_the_rank_of_popularity_is_its_definition(seed):
    draw = random.Random(seed)
    users, items, old = draw.randint(1, 5), draw.randint(1, 9), draw.randint(0, 12)
    before = [(draw.randrange(users), draw.randrange(items)) for _ in range(old)]
    known = Known(
        users=tuple(f"u{k}" for k in range(users)),
        items=tuple(f"i{k}" for k in range(items)),
        interactions=torch.tensor(before, dtype=torch.int64).view(-1, 2),
    )
    catalogue = Catalogue.grown(known, {"user": ["new"], "item": ["fresh"]}, {"user": {}, "item": {}})
    pairs = [(draw.randrange(users + 1), draw.randrange(items + 1)) for _ in range(draw.randint(0, 20))]
    taken = Taken(catalogue, pairs, [draw.random() for _ in pairs])
    every = [(user, item) for user in range(users + 1) for item in range(items + 1)] * 2
    found = taken.by_popularity([user for user, _ in every], [item for _, item in every])
    assert found == [by_definition(taken, user, item) for user, item in every]


def test_the_rank_of_popularity_is_found_as_fast_for_a_user_who_took_much(monkeypatch):
    """The items of each user are gone through once, not once a row."""
    known = Known(users=("u",), items=tuple(f"i{k}" for k in range(50)))
    pairs = [(0, item) for item in range(50)]
    taken = Taken(Catalogue.grown(known, {"user": [], "item": []}, {"user": {}, "item": {}}), pairs, [0.0] * 50)
    asked = []
    items_of = taken.histories.items
    monkeypatch.setattr(taken.histories, "items", lambda user: asked.append(user) or items_of(user))
    taken.by_popularity([0] * 50, range(50))
    assert asked == [0]
