"""A batch of 32 rows in which rows have adapters of their own, beside HF PEFT's `adapter_names`.

One Linear(2048, 2048) without bias, and a Llama of hidden 2048 with 2 layers; LoRA of rank 16 on every linear layer.
Decode is one token for each row; prefill 64 for the layer, 32 for the model. CPU time of one thread, over the base
layer or model in the same round, and of decode the median by wall time too. HF PEFT is measured as it comes and, where
the base is in bf16, with adapters in bf16. "In turn" activates another composition before every call and counts it: the
same 32 adapters in other rows, one row with an adapter that was not there, or 32 drawn from the 50 that are loaded.

    python benchmarks/rows.py [--rounds 15] [--only bf16]
"""

import argparse
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import report
import torch
from common import Run, Spread, described, llama, one_thread, over, plain, save, seconds_of, timed
from torch import Tensor, nn

import smidgen
from smidgen import LoRA, Rows

ROWS, RANK, ALPHA, LOADED = 32, 16, 32, 50
OURS, THEIRS, THEIRS_BF16 = "smidgen", "HF PEFT", "HF PEFT, bf16 adapters"
Parts = Sequence[str | None]
MIXES: dict[str, Parts] = {
    "one for all": ["a0"] * ROWS,
    "4, sorted": [f"a{row // 8}" for row in range(ROWS)],
    "4, as they come": [f"a{row % 4}" for row in range(ROWS)],
    "16, and none": [f"a{row}" if row % 2 else None for row in range(ROWS)],
    "32": [f"a{row}" for row in range(ROWS)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
        self.base, self.ours = make(dtype).eval(), make(dtype)
        self.ours.load_state_dict(self.base.state_dict(), assign=True)
        targets = [name for name, part in self.base.named_modules() if isinstance(part, nn.Linear)]
        targets = [name for name in targets if name != "lm_head"]
        self.adapters = smidgen.attach(self.ours, LoRA(rank=RANK, alpha=ALPHA, targets=targets), "a0")
        for number in range(1, count):
            self.adapters.add(LoRA(rank=RANK, alpha=ALPHA, targets=targets), f"a{number}")
        as_if_trained(self.adapters.parameters(*self.adapters.names))
        self.ours.eval()
        self.theirs: dict[str, Any] = {}
        for name in (THEIRS, THEIRS_BF16) if dtype == torch.bfloat16 else (THEIRS,):
            twin = make(dtype)
            twin.load_state_dict(self.base.state_dict(), assign=True)
            self.theirs[name] = hf_peft(twin, targets, count, autocast_adapters=name != THEIRS_BF16).eval()

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

    def their_run(self, which: str, parts: Parts, x: Tensor, repeats: int) -> Prepared:
        names, model = [part or "__base__" for part in parts], self.theirs[which]
        return lambda: lambda: again(lambda x: model(x, adapter_names=names), repeats, x)

    def runs(self, parts: Parts, x: Tensor, repeats: int) -> dict[str, Prepared]:
        """The same rows by every tool."""
        theirs = {which: self.their_run(which, parts, x, repeats) for which in self.theirs}
        return {OURS: self.our_run(parts, x, repeats), **theirs}


def hf_peft(model: nn.Module, targets: list[str], count: int, *, autocast_adapters: bool) -> Any:
    """HF PEFT's LoRA with as many adapters.   autocast_adapters: in fp32, as it comes."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    wrapped = get_peft_model(model, config, "a0", autocast_adapter_dtype=autocast_adapters)  # type: ignore[arg-type]
    for number in range(1, count):
        wrapped.add_adapter(f"a{number}", config, autocast_adapter_dtype=autocast_adapters)
    as_if_trained(p for name, p in wrapped.named_parameters() if "lora_" in name)
    return wrapped


def as_if_trained(parameters: Iterable[nn.Parameter]) -> None:
    """Numbers that training could have left."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def again(run: Callable[[Tensor], Any], repeats: int, x: Tensor) -> None:
    for _ in range(repeats):
        run(x)


def ratios(variants: dict[Any, Prepared], rounds: int) -> tuple[dict[Any, Spread], dict[Any, Spread]]:
    """CPU time and wall time of each over that of the variant "base"."""
    times = timed(variants, rounds, lambda prepare: seconds_of(prepare()))
    return over(times.cpu, "base"), over(times.wall, "base")


def beside(twins: Twins, x: Tensor, rounds: int, repeats: int) -> list[list[Any]]:
    """A line for each mix: ours and theirs over the base by CPU time, then by wall time."""
    variants: dict[Any, Prepared] = {"base": twins.run(x, repeats)}
    tools = (OURS, *twins.theirs)
    for mix, parts in MIXES.items():
        variants |= {(tool, mix): run for tool, run in twins.runs(parts, x, repeats).items()}
    cpu, wall = ratios(variants, rounds)
    return [[mix, *(cpu[tool, mix] for tool in tools), *(wall[tool, mix].median for tool in tools)] for mix in MIXES]


def in_turn(twins: Twins, x: Tensor, rounds: int, repeats: int) -> list[list[Any]]:
    """A line for each way in which the composition changes before every call."""
    names, draw = [f"a{number}" for number in range(LOADED)], random.Random(0)
    others = [[*names[:row], names[ROWS + row % 2], *names[row + 1 : ROWS]] for row in range(8)]
    ways: dict[str, list[list[str]]] = {
        "the same 32 in other rows": [draw.sample(names[:ROWS], ROWS) for _ in range(8)],
        "one row with another adapter": others,
        f"32 of {LOADED}": [draw.sample(names, ROWS) for _ in range(8)],
    }
    variants: dict[Any, Prepared] = {"base": twins.run(x, repeats), "still": twins.our_run(names[:ROWS], x, repeats)}
    variants |= {way: twins.our_runs_in_turn(mixes, x, repeats) for way, mixes in ways.items()}
    found, _ = ratios(variants, rounds)
    return [["no change", found["still"]], *([way, found[way]] for way in ways)]


def loaded(dtype: torch.dtype, rounds: int) -> list[list[Any]]:
    """A line for each number of adapters that are loaded, of which one acts, on half of the rows."""
    x, parts, counts = torch.randn(ROWS, 1, 2048).to(dtype), ["a0", None] * (ROWS // 2), (1, 10, LOADED)
    all_twins = {count: Twins(Layer, dtype, count) for count in counts}
    variants: dict[Any, Prepared] = {"base": all_twins[1].run(x, 5)}
    for count, twins in all_twins.items():
        variants |= {(tool, count): run for tool, run in twins.runs(parts, x, 5).items()}
    found, _ = ratios(variants, rounds)
    return [[count, *(found[tool, count] for tool in (OURS, *all_twins[1].theirs))] for count in counts]


@torch.no_grad()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--only", choices=DTYPES, help="one dtype, printed and not saved")
    asked = arguments.parse_args()
    rounds = asked.rounds
    one_thread()
    tables: list[dict[str, Any]] = []
    claims = []

    def table(title: str, first: str, lines: list[list[Any]], *, by_wall: bool = False) -> None:
        tools = [OURS, THEIRS, THEIRS_BF16] if "bf16" in title else [OURS, THEIRS]
        columns = [first, *tools, *(f"{tool}, wall" for tool in tools if by_wall)][: len(lines[0])]
        lines = [line[: len(columns)] for line in lines]
        tables.append({"title": title, "columns": columns, "rows": lines, "plot": [tools] if by_wall else []})
        print(title, report.table_of(plain(tables[-1])), sep="\n\n", flush=True)

    for name, dtype in DTYPES.items():
        if asked.only not in (None, name):
            continue
        twins = Twins(Layer, dtype, LOADED)
        token, tokens = (torch.randn(ROWS, length, 2048).to(dtype) for length in (1, 64))
        decode = beside(twins, token, rounds, repeats=5)
        table(f"one layer, {name}, decode", "adapters", decode, by_wall=True)
        table(f"one layer, {name}, prefill", "adapters", beside(twins, tokens, max(rounds // 3, 3), repeats=1))
        table(f"one layer, {name}, decode, in turn", "what changes", in_turn(twins, token, rounds, repeats=8))
        table(f"one layer, {name}, decode, one adapter and none", "adapters loaded", loaded(dtype, rounds))
        claim = f"32 rows with 32 adapters, one layer, {name}, decode, over the base layer"
        claims.append({"claim": claim, "limit": LIMITS[dtype], "is": decode[-1][1].median})
        twins = Twins(small_llama, dtype, LOADED)
        token, tokens = (torch.randint(512, (ROWS, length)) for length in (1, 32))
        table(f"a Llama, {name}, decode", "adapters", beside(twins, token, rounds, repeats=1), by_wall=True)
        table(f"a Llama, {name}, prefill", "adapters", beside(twins, tokens, max(rounds // 5, 3), repeats=1))
        table(f"a Llama, {name}, decode, in turn", "what changes", in_turn(twins, token, rounds, repeats=8))
    if asked.only is None:
        save("rows", "A batch with many adapters", described(__doc__), tables, claims)


if __name__ == "__main__":
    main()
