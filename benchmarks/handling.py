"""Importing, attaching, loading, switching and merging adapters, beside HF PEFT doing the same.

The base has the shape of a Llama with 0.82B parameters in its body, bf16: hidden 2048, 16 layers, 112 linear layers.
The adapter is LoRA of rank 16 on all 112, 40 MB in fp32. Each tool has a model of its own over the same weights.
Seconds are CPU seconds of one thread. Each of the 50 adapters is loaded once by each tool, in turn.

    python benchmarks/handling.py [--adapters 50] [--rounds 5]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import report
import torch
from common import Run, Spread, cpu_seconds, described, interleaved, llama, one_thread, peak_extra_bytes, plain, save
from torch import nn

import smidgen

RANK, ALPHA = 16, 32
ATTACH_LIMIT_S, LOAD_LIMIT_S, SWITCH_LIMIT_MS = 0.15, 3.0, 2.0
OURS, THEIRS, TORCH = "smidgen", "HF PEFT", "torch alone"
ADAPTER_NUMBERS = 10_092_544  # R (I + O), summed over the layers
SHOWN_LOADS = (1, 10, 25, 50)
Figures = dict[str, Spread]  # by tool


def import_seconds(rounds: int) -> Figures:
    """CPU seconds that an import takes in a new process; that of torch alone too."""

    def importing(package: str) -> Run:
        return lambda: subprocess.run([sys.executable, "-c", f"import {package}"], check=True)

    def of_children(run: Run) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    packages = {TORCH: "torch", OURS: "smidgen", THEIRS: "peft"}
    return spreads(interleaved({name: importing(p) for name, p in packages.items()}, rounds, of_children))


def twins() -> tuple[nn.Module, nn.Module]:
    """Two models over the same weights: neither tool sees what the other puts on, and memory is taken once."""
    one, other = (
        llama(hidden=2048, layers=16, feed_forward=5632, heads=32, dtype=torch.bfloat16, device=device)
        for device in ("cpu", "meta")
    )
    other.load_state_dict(one.state_dict(), assign=True)
    return one, other


def attach(model: nn.Module) -> smidgen.AdapterSet:
    return smidgen.attach(model, smidgen.LoRA(rank=RANK, alpha=ALPHA))


def hf_attach(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))


def as_if_trained(parameters: Iterable[nn.Parameter]) -> None:
    """Give the trainable ones numbers that training could have left: a change that bf16 can hold."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.normal_(std=0.06)


def attaching(ours: nn.Module, theirs: nn.Module, rounds: int) -> Figures:
    """Seconds to put a fresh adapter on."""

    def seconds(attach_it: Run) -> float:
        undo: list[Any] = []
        taken = cpu_seconds(lambda: undo.append(attach_it()))
        undo[0]()
        return taken

    return spreads(
        interleaved({OURS: lambda: attach(ours).detach, THEIRS: lambda: hf_attach(theirs).unload}, rounds, seconds)
    )


def loading(ours: nn.Module, theirs: nn.Module, count: int) -> tuple[dict[str, list[float]], Any]:
    """Seconds of every load, of adapters named "0", "1", ...; and HF PEFT's model with all of them."""
    from peft import PeftModel

    # A virtual machine gets memory that it never used from its host, which takes longer than the reading: get it now.
    torch.ones(2 * count * ADAPTER_NUMBERS)
    with tempfile.TemporaryDirectory() as folder:
        adapters, wrapped = attach(ours), hf_attach(theirs)
        as_if_trained(adapters.parameters())
        as_if_trained(wrapped.parameters())
        adapters.save(f"{folder}/ours")
        wrapped.save_pretrained(f"{folder}/theirs")
        adapters.detach()
        wrapped.unload()
        names, their_names = iter(map(str, range(count))), iter(map(str, range(count)))
        loaded: list[PeftModel] = []

        def hf_load() -> None:
            name = next(their_names)
            if loaded:
                loaded[0].load_adapter(f"{folder}/theirs", adapter_name=name)
            else:
                loaded.append(PeftModel.from_pretrained(theirs, f"{folder}/theirs", adapter_name=name))

        variants = {OURS: lambda: smidgen.load(ours, f"{folder}/ours", next(names)), THEIRS: hf_load}
        return interleaved(variants, count, warm_up=False), loaded[0]


def switching(adapters: smidgen.AdapterSet, wrapped: Any, count: int) -> tuple[Figures, Figures]:
    """Seconds to switch to another adapter, and to switch adapters off and on again."""
    order = torch.randperm(count).tolist()
    names, their_names = iter(map(str, order)), iter(map(str, order))
    switch = {
        OURS: lambda: adapters.activate(next(names)),
        THEIRS: lambda: wrapped.set_adapter(next(their_names)),
    }

    def off_and_on() -> None:
        active = adapters.active
        adapters.activate(None)
        adapters.activate(active)

    def hf_off_and_on() -> None:
        with wrapped.disable_adapter():
            pass

    return (
        spreads(interleaved(switch, min(count, 20), warm_up=False)),
        spreads(interleaved({OURS: off_and_on, THEIRS: hf_off_and_on}, 5)),
    )


def merging(ours: nn.Module, theirs: nn.Module, rounds: int) -> tuple[Figures, Figures]:
    """Seconds, and bytes beside the model, to write one adapter into the weights."""

    def our_merge() -> Run:
        adapters = attach(ours)
        as_if_trained(adapters.parameters())
        return adapters.merge

    def hf_merge() -> Run:
        wrapped = hf_attach(theirs)
        as_if_trained(wrapped.parameters())
        return wrapped.merge_and_unload  # type: ignore[no-any-return]

    variants = {OURS: our_merge, THEIRS: hf_merge}
    return (
        spreads(interleaved(variants, rounds, lambda prepare: cpu_seconds(prepare()), warm_up=False)),
        spreads(interleaved(variants, 1, lambda prepare: peak_extra_bytes(prepare()), warm_up=False)),
    )


def spreads(samples: dict[str, list[float]]) -> Figures:
    return {tool: Spread.of(figures) for tool, figures in samples.items()}


def row(what: str, figures: Figures, unit: float = 1.0) -> list[Any]:
    """A line of the table: ours, theirs, and how many times ours theirs is."""
    ours, theirs = figures[OURS].over(unit), figures[THEIRS].over(unit)
    return [what, ours, theirs, theirs.median / ours.median if ours.median else None]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--adapters", type=int, default=50, help="how many to load; results are saved for 50")
    arguments.add_argument("--rounds", type=int, default=5)
    asked = arguments.parse_args()
    one_thread()
    count = asked.adapters
    imported = import_seconds(asked.rounds)
    ours, theirs = twins()
    attached = attaching(ours, theirs, asked.rounds)
    loads, wrapped = loading(ours, theirs, count)
    adapters = smidgen.adapters_of(ours)
    assert adapters is not None
    switched, off_and_on = switching(adapters, wrapped, count)
    adapters.detach()
    merged, beside = merging(ours, wrapped.unload(), asked.rounds)

    rows = [
        row(f"import, s ({TORCH}: {imported[TORCH].median:.2f})", imported),
        row("attach a fresh adapter, s", attached),
        *(
            row(f"load adapter number {n}, s", spreads({tool: [each[n - 1]] for tool, each in loads.items()}))
            for n in SHOWN_LOADS
            if n <= count
        ),
        row(f"load {count} adapters, together, s", spreads({tool: [sum(each)] for tool, each in loads.items()})),
        row(f"switch to another of {count}, ms", switched, 1e-3),
        row(f"switch off and on again, {count} loaded, ms", off_and_on, 1e-3),
        row("merge into the weights, s", merged),
        row("memory beside the model while merging, MB", beside, 1e6),
    ]
    table = {"title": "CPU time and memory", "columns": ["", OURS, THEIRS, "times ours"], "rows": rows}
    claims = [
        {"claim": "attaching rank 16 to 112 layers, CPU s", "limit": ATTACH_LIMIT_S, "is": attached[OURS].median},
        {"claim": "loading 50 adapters together, CPU s", "limit": LOAD_LIMIT_S, "is": sum(loads[OURS])},
        {"claim": "switching among 50, CPU ms", "limit": SWITCH_LIMIT_MS, "is": switched[OURS].median * 1e3},
    ]
    print(report.table_of(plain(table)))
    if count == 50:
        save("handling", "Handling adapters", described(__doc__), [table], claims)


if __name__ == "__main__":
    main()
