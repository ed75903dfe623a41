"""Tokens per second of a causal language model, of rows by length and of packed rows, forward and backward.

Documents as long as chats are (log-normal, half of them shorter than the median), LoRA of rank 8 on a Llama. "padded":
8 documents of like length in a batch, as `smidgen tune` has prompts and chats. "packed": documents share blocks; "mask"
is attention over all pairs of a block, "apart" document by document (`core/document_mask.py`), as it has plain texts.
"joined": the 8 documents of the padded batch in one row, attention document by document. Padding counts as no token.
Batches and blocks are every so-manieth of an epoch over 400 documents, and come to about as many tokens each.

    python benchmarks/packing.py [--rounds 5]
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from common import Spread, cpu_seconds, described, interleaved, llama, one_thread, save

import smidgen
from smidgen.core.attention_backward import short_attention_backward_in_fp32
from smidgen.data.batches import LengthBucketedBatches
from smidgen.tasks.base import Batch, Examples
from smidgen.tasks.language.language_model import LanguageModel
from smidgen.tasks.language.token_rows import Tokens, as_batch, as_examples

T = TypeVar("T")
DOCUMENTS, ROWS, SPREAD = 400, 8, 0.9  # of a batch; of the logarithm of the lengths
PADDED, MASK, APART, JOINED = "padded", "packed, mask", "packed, apart", "joined, apart"


@dataclass(frozen=True)
class Case:
    """Documents of a median length in tokens, cut to a block."""

    median: int
    block: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        return f"median {self.median}, cut to {self.block}, {str(self.dtype).rpartition('.')[2]}"


CASES = (
    Case(40, 128, torch.float32),
    Case(200, 512, torch.float32),
    Case(200, 2048, torch.float32),
    Case(40, 2048, torch.float32),
    Case(200, 2048, torch.bfloat16),
)


def documents(case: Case) -> list[Tokens]:
    """Random tokens; the second half of each document is learned, as of a chat its answers."""
    draw, rows = random.Random(0), []
    for _ in range(DOCUMENTS):
        size = max(16, min(case.block, round(math.exp(draw.gauss(math.log(case.median), SPREAD)))))
        ids = [draw.randrange(3, 512) for _ in range(size)]
        rows.append((ids, [i if 2 * t >= size else -100 for t, i in enumerate(ids)]))
    return rows


def spread_over(found: Sequence[T], count: int) -> list[T]:
    """So many of them, evenly from first to last."""
    count = max(1, min(count, len(found)))
    return [found[int((i + 0.5) * len(found) / count)] for i in range(count)]


def joined(rows: list[Tokens]) -> Examples:
    """All in one row."""
    return as_examples(rows, sum(len(ids) for ids, _ in rows), packed=True, keep_all=True)


def measure(case: Case, rounds: int) -> tuple[dict[str, Spread], float, float, float]:
    """Tokens per second over those of padded rows; padded rows' own, their padding, and documents in a block."""
    rows = documents(case)
    single = as_examples(rows, case.block, packed=False, keep_all=True)
    packed = as_examples(rows, case.block, packed=True, keep_all=True)
    every = LengthBucketedBatches(single.lengths, batch_size=ROWS, seed=0)
    some = spread_over(sorted(every, key=lambda batch: sum(single.lengths[i] for i in batch)), 4)
    tokens = sum(single.lengths[i] for batch in some for i in batch)
    in_blocks = spread_over(range(len(packed)), round(tokens * len(packed) / sum(packed.lengths)))
    alike = [as_batch(packed, in_blocks[i : i + ROWS], 0) for i in range(0, len(in_blocks), ROWS)]
    batches: dict[str, list[Batch]] = {
        PADDED: [as_batch(single, batch, 0) for batch in some],
        MASK: alike,
        APART: alike,
        JOINED: [as_batch(joined([rows[i] for i in batch]), [0], 0) for batch in some],
    }
    counts = dict.fromkeys((PADDED, JOINED), tokens)
    counts |= {name: sum(packed.lengths[i] for i in in_blocks) for name in (MASK, APART)}
    body = llama(hidden=768, layers=2, feed_forward=2048, heads=12, dtype=case.dtype)
    smidgen.attach(body, smidgen.LoRA(rank=8, alpha=16), seed=0)
    model = LanguageModel(body).eval()
    with short_attention_backward_in_fp32():
        runs = {name: steps_of(model, some, apart=name in (APART, JOINED)) for name, some in batches.items()}
        seconds = interleaved(runs, rounds, cpu_seconds)
    speeds = {name: [counts[name] / s for s in found] for name, found in seconds.items()}
    over = {name: Spread.of([a / b for a, b in zip(speeds[name], speeds[PADDED], strict=True)]) for name in speeds}
    return over, sorted(speeds[PADDED])[rounds // 2], every.padding_share().bucketed, len(rows) / len(packed)


def steps_of(model: LanguageModel, batches: list[Batch], *, apart: bool) -> Callable[[], None]:
    def run() -> None:
        model.attends_apart = apart
        for batch in batches:
            model(batch)["loss"].sum().backward()
            model.zero_grad()

    return run


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--only", type=int, choices=range(len(CASES)), help="one case, printed and not saved")
    asked = arguments.parse_args()
    one_thread()
    rows: list[list[Any]] = []
    for case in CASES if asked.only is None else [CASES[asked.only]]:
        over, speed, padding, shared = measure(case, asked.rounds)
        print(f"{case.title}: {speed:.0f} tokens/s padded, padding {padding:.1%}, {shared:.1f} documents a block")
        for name in (MASK, APART, JOINED):
            print(f"  {name:14s} {over[name].median:.2f} ({over[name].low:.2f} to {over[name].high:.2f})", flush=True)
        rows.append([case.title, 100 * padding, shared, speed, *(over[name] for name in (MASK, APART, JOINED))])
    columns = ["documents", "padding, %", "documents a block", "padded, tokens a second"]
    columns += [f"{name} / padded" for name in (MASK, APART, JOINED)]
    if asked.only is None:
        table = {"title": "tokens per second", "columns": columns, "rows": rows}
        save("packing", "Packed rows", described(__doc__), [table], [])


if __name__ == "__main__":
    main()
