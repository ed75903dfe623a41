"""A batch of 32 rows in which rows have adapters of their own, beside HF PEFT's `adapter_names`.

One Linear(2048, 2048) without bias, and a Llama of hidden 2048 with 2 layers; LoRA of rank 16 on every linear layer.
Decode is one token for each row; prefill 64 for the layer, 32 for the model. CPU time of one thread, over the base
layer or model in the same round. "In turn" activates another composition before every call and counts it: the same 32
adapters in other rows, one row with an adapter that was not there, or 32 drawn from the 50 that are loaded.

    python benchmarks/rows.py [--rounds 15]
"""

import argparse
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import report
import torch
from common import Run, Spread, cpu_seconds, described, interleaved, llama, one_thread, over, plain, save
from torch import Tensor, nn

import smidgen
from smidgen import LoRA, Rows

ROWS, RANK, ALPHA, LOADED = 32, 16, 32, 50
OURS, THEIRS = "smidgen", "HF PEFT"
Parts = Sequence[str | None]
MIXES: dict[str, Parts] = {
    "one for all": ["a0"] * ROWS,
    "4, sorted": [f"a{row // 8}" for row in range(ROWS)],
    "4, as they come": [f"a{row % 4}" for row in range(ROWS)],
    "16, and none": [f"a{row}" if row % 2 else None for row in range(ROWS)],
    "32": [f"a{row}" for row in range(ROWS)],
}
LIMITS = {torch.float32: 1.3, torch.bfloat16: 1.6}
Prepared = Callable[[], Run]  # sets what acts and gives the run that is measured


class Layer(nn.Module):
    """One linear layer, as a model that HF PEFT can wrap."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(2048, 2048, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def small_llama(dtype: torch.dtype) -> nn.Module:
    return llama(hidden=2048, layers=2, feed_forward=5632, heads=32, dtype=dtype)


class Twins:
    """A base and, over the same weights, ours and HF PEFT's with as many adapters."""

    def __init__(self, make: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, count: int) -> None:
        from peft import LoraConfig, get_peft_model

        self.base, ours, theirs = make(dtype).eval(), make(dtype), make(dtype)
        for twin in (ours, theirs):
            twin.load_state_dict(self.base.state_dict(), assign=True)
        targets = [name for name, part in self.base.named_modules() if isinstance(part, nn.Linear)]
        targets = [name for name in targets if name != "lm_head"]
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        self.theirs: Any = get_peft_model(theirs, config, "a0")
        self.adapters = smidgen.attach(ours, LoRA(rank=RANK, alpha=ALPHA, targets=targets), "a0")
        for number in range(1, count):
            self.adapters.add(LoRA(rank=RANK, alpha=ALPHA, targets=targets), f"a{number}")
            self.theirs.add_adapter(f"a{number}", config)
        as_if_trained(p for name, p in self.theirs.named_parameters() if "lora_" in name)
        as_if_trained(self.adapters.parameters(*self.adapters.names))
        self.ours = ours.eval()
        self.theirs.eval()

    def run(self, x: Tensor, repeats: int) -> Prepared:
        """The base."""
        return lambda: lambda: again(self.base, repeats, x)

    def our_run(self, parts: Parts, x: Tensor, repeats: int) -> Prepared:
        def prepare() -> Run:
            self.adapters.activate(Rows(*parts))
            self.ours(x)
            return lambda: again(self.ours, repeats, x)

        return prepare

    def our_runs_in_turn(self, mixes: Iterable[Parts], x: Tensor, repeats: int) -> Prepared:
        """Every call after a switch to the next of the mixes."""
        following = itertools.cycle([Rows(*parts) for parts in mixes])

        def switch_and_run(x: Tensor) -> None:
            self.adapters.activate(next(following))
            self.ours(x)

        def prepare() -> Run:
            switch_and_run(x)
            return lambda: again(switch_and_run, repeats, x)

        return prepare

    def their_run(self, parts: Parts, x: Tensor, repeats: int) -> Prepared:
        names = [part or "__base__" for part in parts]
        return lambda: lambda: again(lambda x: self.theirs(x, adapter_names=names), repeats, x)


def as_if_trained(parameters: Iterable[nn.Parameter]) -> None:
    """Numbers that training could have left."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def again(run: Callable[[Tensor], Any], repeats: int, x: Tensor) -> None:
    for _ in range(repeats):
        run(x)


def ratios(variants: dict[str, Prepared], rounds: int) -> dict[str, Spread]:
    """CPU time of each over that of the variant "base"."""
    measured = interleaved(variants, rounds, lambda prepare: cpu_seconds(prepare()))
    return over(measured, "base")


def beside(twins: Twins, x: Tensor, rounds: int, repeats: int) -> list[list[Any]]:
    """A line for each mix: ours and theirs over the base."""
    variants = {"base": twins.run(x, repeats)}
    for name, parts in MIXES.items():
        variants[OURS + name] = twins.our_run(parts, x, repeats)
        variants[THEIRS + name] = twins.their_run(parts, x, repeats)
    found = ratios(variants, rounds)
    return [[name, found[OURS + name], found[THEIRS + name]] for name in MIXES]


def in_turn(twins: Twins, x: Tensor, rounds: int, repeats: int) -> list[list[Any]]:
    """A line for each way in which the composition changes before every call."""
    names, draw = [f"a{number}" for number in range(LOADED)], random.Random(0)
    others = [[*names[:row], names[ROWS + row % 2], *names[row + 1 : ROWS]] for row in range(8)]
    ways: dict[str, list[list[str]]] = {
        "the same 32 in other rows": [draw.sample(names[:ROWS], ROWS) for _ in range(8)],
        "one row with another adapter": others,
        f"32 of {LOADED}": [draw.sample(names, ROWS) for _ in range(8)],
    }
    variants = {"base": twins.run(x, repeats), "still": twins.our_run(names[:ROWS], x, repeats)}
    variants |= {way: twins.our_runs_in_turn(mixes, x, repeats) for way, mixes in ways.items()}
    found = ratios(variants, rounds)
    return [["no change", found["still"]], *([way, found[way]] for way in ways)]


def loaded(dtype: torch.dtype, rounds: int) -> list[list[Any]]:
    """A line for each number of adapters that are loaded, of which one acts, on half of the rows."""
    x, parts, counts = torch.randn(ROWS, 1, 2048).to(dtype), ["a0", None] * (ROWS // 2), (1, 10, LOADED)
    all_twins = {count: Twins(Layer, dtype, count) for count in counts}
    variants = {"base": all_twins[1].run(x, 5)}
    for count, twins in all_twins.items():
        variants[f"{OURS}{count}"] = twins.our_run(parts, x, 5)
        variants[f"{THEIRS}{count}"] = twins.their_run(parts, x, 5)
    found = ratios(variants, rounds)
    return [[count, found[f"{OURS}{count}"], found[f"{THEIRS}{count}"]] for count in counts]


@torch.no_grad()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    rounds = arguments.parse_args().rounds
    one_thread()
    tables, claims = [], []

    def table(title: str, first: str, lines: list[list[Any]]) -> None:
        columns = [first, OURS, THEIRS][: len(lines[0])]
        tables.append({"title": title, "columns": columns, "rows": lines})
        print(report.table_of(plain(tables[-1])), flush=True)

    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        twins = Twins(Layer, dtype, LOADED)
        token, tokens = (torch.randn(ROWS, length, 2048).to(dtype) for length in (1, 64))
        decode = beside(twins, token, rounds, repeats=5)
        table(f"one layer, {name}, decode", "adapters", decode)
        table(f"one layer, {name}, prefill", "adapters", beside(twins, tokens, max(rounds // 3, 3), repeats=1))
        table(f"one layer, {name}, decode, in turn", "what changes", in_turn(twins, token, rounds, repeats=8))
        table(f"one layer, {name}, decode, one adapter and none", "adapters loaded", loaded(dtype, rounds))
        claim = f"32 rows with 32 adapters, one layer, {name}, decode, over the base layer"
        claims.append({"claim": claim, "limit": LIMITS[dtype], "is": decode[-1][1].median})
        twins = Twins(small_llama, dtype, LOADED)
        token, tokens = (torch.randint(512, (ROWS, length)) for length in (1, 32))
        table(f"a Llama, {name}, decode", "adapters", beside(twins, token, rounds, repeats=1))
        table(f"a Llama, {name}, prefill", "adapters", beside(twins, tokens, max(rounds // 5, 3), repeats=1))
        table(f"a Llama, {name}, decode, in turn", "what changes", in_turn(twins, token, rounds, repeats=8))
    save("rows", "A batch with many adapters", described(__doc__), tables, claims)


if __name__ == "__main__":
    main()
