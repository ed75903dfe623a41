"""Sentences with human sentiment scores, of four kinds: the data of `smidgen demo`, read out of a package's archive.

Hutto & Gilbert 2014 (VADER, ICWSM).  Nothing of the package is installed or run, and nothing of it is committed.
"""

import shutil
from pathlib import Path

from smidgen.recipes.demo import demo_data

OUT = Path(".cache/text_classification")
OUT.mkdir(parents=True, exist_ok=True)
for name, path in demo_data(Path(".cache"), seed=0).items():
    shutil.copyfile(path, OUT / path.name)
    print(f"{OUT / path.name}: {len(path.read_text(encoding='utf-8').splitlines()) - 1:,} sentences ({name})")
