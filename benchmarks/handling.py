"""Importing, attaching, saving, loading, switching and merging adapters, beside HF PEFT doing the same.

The base has the shape of a Llama with 0.82B parameters in its body, bf16: hidden 2048, 16 layers, 112 linear layers.
The adapter is LoRA of rank 16 on all 112, 40 MB in fp32. Each tool has a model of its own over the same weights.
Seconds are CPU seconds of one thread. Each of the 50 adapters is loaded once by each tool, in turn. 0.51B are the first
ten layers. HF PEFT is measured as it comes and at its best settings: adapters in bf16 as the base is, and loaded with
`low_cpu_mem_usage`. "Times ours" is the better of the two over ours.

    python benchmarks/handling.py [--adapters 50] [--rounds 5]
"""

import argparse
import functools
import itertools
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import report
import torch
from common import Run, Spread, cpu_seconds, described, interleaved, llama, one_thread, peak_extra_bytes, plain, save
from torch import nn

import smidgen
import smidgen.formats.read  # what the first load would import: HF PEFT has imported its own by then

RANK, ALPHA = 16, 32
BARELY = 0.026  # std of factors whose change of the weights loses 4.3 % to rounding, where 5 % are allowed
IMPORT_LIMIT_S, ATTACH_LIMIT_S, LOAD_LIMIT_S, LOADS_LIMIT_S, SWITCH_LIMIT_MS = 0.1, 0.1, 0.04, 2.0, 0.5
MERGE_LIMIT_S, MERGE_LIMIT_MB = 1.0, 20
OURS, THEIRS, BEST, TORCH = "smidgen", "HF PEFT", "HF PEFT, best settings", "torch alone"
HF = (THEIRS, BEST)
HELP, FIRST_USE = "smidgen --help", "first use"
SMALLER = 10  # of the 16 layers: 0.51B parameters
ADAPTER_NUMBERS = 10_092_544  # R (I + O), summed over the layers
SHOWN_LOADS = (1, 10, 25, 50)
Figures = dict[str, Spread]  # by tool


def import_seconds(rounds: int) -> tuple[Figures, Figures]:
    """CPU seconds that an import takes in a new process, alone and with what attaching LoRA needs.

    Of torch alone and of a page of help too.
    """

    def running(*arguments: str) -> Run:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    def of_children(run: Run) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    variants = {
        TORCH: running("-c", "import torch"),
        OURS: running("-c", "import torch, smidgen"),
        THEIRS: running("-c", "import torch, peft"),
        OURS + FIRST_USE: running("-c", "import torch\nfrom smidgen import LoRA, attach"),
        THEIRS + FIRST_USE: running("-c", "import torch\nfrom peft import LoraConfig, get_peft_model"),
        HELP: running("-m", "smidgen", "--help"),
    }
    samples = interleaved(variants, rounds, of_children)
    alone = {tool: samples[tool] for tool in (OURS, THEIRS, TORCH, HELP)}
    return spreads(alone), spreads({tool: samples[tool + FIRST_USE] for tool in (OURS, THEIRS)})


def twins() -> dict[str, nn.Module]:
    """A model for each tool over the same weights: none sees what another puts on.

    At its best settings HF PEFT has copies of them: merging changes them, and how large they are decides what a change
    that bf16 can barely hold loses.
    """
    models = {
        tool: llama(hidden=2048, layers=16, feed_forward=5632, heads=32, dtype=torch.bfloat16, device=device)
        for tool, device in ((OURS, "cpu"), (THEIRS, "meta"), (BEST, "meta"))
    }
    weights = models[OURS].state_dict()
    models[THEIRS].load_state_dict(weights, assign=True)
    models[BEST].load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return models


def attach(model: nn.Module) -> smidgen.AdapterSet:
    return smidgen.attach(model, smidgen.LoRA(rank=RANK, alpha=ALPHA))


def hf_attach(model: nn.Module, tool: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=tool != BEST)  # type: ignore[arg-type]


def as_if_trained(parameters: Iterable[nn.Parameter], std: float = 0.06) -> None:
    """Give the trainable ones numbers that training could have left: a change that bf16 can hold."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.normal_(std=std)


def attaching(models: dict[str, nn.Module], rounds: int) -> Figures:
    """Seconds to put a fresh adapter on."""

    def hf_attach_fresh(tool: str) -> Run:
        return hf_attach(models[tool], tool).unload  # type: ignore[no-any-return]

    def seconds(attach_it: Run) -> float:
        undo: list[Any] = []
        taken = cpu_seconds(lambda: undo.append(attach_it()))
        undo[0]()
        return taken

    return spreads(interleaved(variants_of(lambda: attach(models[OURS]).detach, hf_attach_fresh), rounds, seconds))


@dataclass(frozen=True)
class OnDisk:
    """Seconds to save, of every load of adapters named "0", "1" ..., and of some more without a look at the base."""

    saves: Figures
    loads: dict[str, list[float]]
    unchecked: Spread
    wrapped: dict[str, Any]  # HF PEFT's models with all that they loaded


def on_disk(models: dict[str, nn.Module], count: int, rounds: int) -> OnDisk:
    """Save an adapter, and load it again and again."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        adapters, wrapped = attach(models[OURS]), {tool: hf_attach(models[tool], tool) for tool in HF}
        for parameters in (adapters.parameters(), *(model.parameters() for model in wrapped.values())):
            as_if_trained(parameters)
        saves = interleaved(
            variants_of(
                lambda: adapters.save(f"{folder}/ours", replace=True),
                lambda tool: wrapped[tool].save_pretrained(f"{folder}/{tool}"),
            ),
            rounds,
            cpu_seconds,
        )
        adapters.detach()
        for model in wrapped.values():
            model.unload()
        names = {tool: iter(map(str, range(count))) for tool in (OURS, *HF)}
        loaded: dict[str, Any] = {}
        best: dict[str, Any] = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}

        def hf_load(tool: str) -> None:
            name, options = next(names[tool]), best if tool == BEST else {}
            if tool in loaded:
                loaded[tool].load_adapter(f"{folder}/{tool}", adapter_name=name, **options)
            else:
                model: Any = models[tool]
                loaded[tool] = PeftModel.from_pretrained(model, f"{folder}/{tool}", adapter_name=name, **options)

        def seconds(load: Run) -> float:
            # A virtual machine gets memory that it does not use from its host, and gives it back after a while: that
            # takes longer than the reading, and is no work of either tool.  So get it now.
            torch.ones(4 * ADAPTER_NUMBERS)
            return cpu_seconds(load)

        variants = variants_of(lambda: smidgen.load(models[OURS], f"{folder}/ours", next(names[OURS])), hf_load)
        loads = interleaved(variants, count, seconds, warm_up=False)
        more = iter(range(count, count + rounds))
        unchecked = [
            seconds(lambda: smidgen.load(models[OURS], f"{folder}/ours", str(next(more)), check_base=False))
            for _ in range(rounds)
        ]
        return OnDisk(spreads(saves), loads, Spread.of(unchecked), loaded)


def switching(adapters: smidgen.AdapterSet, wrapped: dict[str, Any], count: int) -> tuple[Figures, Figures]:
    """Seconds to switch to another adapter, and to switch adapters off and on again."""
    order = torch.randperm(count).tolist()
    names = {tool: iter(map(str, order)) for tool in (OURS, *HF)}
    switch = variants_of(
        lambda: adapters.activate(next(names[OURS])), lambda tool: wrapped[tool].set_adapter(next(names[tool]))
    )

    def off_and_on() -> None:
        active = adapters.active
        adapters.activate(None)
        adapters.activate(active)

    def hf_off_and_on(tool: str) -> None:
        with wrapped[tool].disable_adapter():
            pass

    return (
        spreads(interleaved(switch, min(count, 20), cpu_seconds, warm_up=False)),
        spreads(interleaved(variants_of(off_and_on, hf_off_and_on), 5, cpu_seconds)),
    )


def switching_of_two(adapters: smidgen.AdapterSet) -> Spread:
    """Seconds to switch where all others are gone: inactive adapters should cost nothing."""
    for name in adapters.names[2:]:
        adapters.delete(name)
    turns = itertools.cycle(adapters.names)
    return Spread.of([cpu_seconds(lambda: adapters.activate(next(turns))) for _ in range(20)])


def merging(models: dict[str, nn.Module], rounds: int, std: float = 0.06) -> tuple[Figures, Figures]:
    """Seconds, and bytes beside the model, to write one adapter into the weights; its factors have this std."""

    def our_merge() -> Run:
        adapters = attach(models[OURS])
        as_if_trained(adapters.parameters(), std)
        return adapters.merge

    def hf_merge(tool: str) -> Run:
        wrapped = hf_attach(models[tool], tool)
        as_if_trained(wrapped.parameters(), std)
        return wrapped.merge_and_unload  # type: ignore[no-any-return]

    variants = variants_of(our_merge, hf_merge)
    return (
        spreads(interleaved(variants, rounds, lambda prepare: cpu_seconds(prepare()), warm_up=False)),
        spreads(interleaved(variants, 1, lambda prepare: peak_extra_bytes(prepare()), warm_up=False)),
    )


def variants_of(ours: Run, theirs: Callable[[str], Any]) -> dict[str, Run]:
    """What each tool does.   theirs: of HF PEFT as it comes or at its best settings."""
    return {OURS: ours, **{tool: functools.partial(theirs, tool) for tool in HF}}


def spreads(samples: dict[str, list[float]]) -> Figures:
    return {tool: Spread.of(figures) for tool, figures in samples.items()}


def ours_alone(what: str, figure: Spread, unit: float = 1.0) -> list[Any]:
    """A line of the table where HF PEFT has nothing to compare."""
    return [what, figure.over(unit), None, None, None]


def row(what: str, figures: Figures, unit: float = 1.0) -> list[Any]:
    """A line of the table: ours, theirs, and how many times ours the better of theirs is."""
    shown = [figures[tool].over(unit) if tool in figures else None for tool in (OURS, *HF)]
    ours, better = figures[OURS].median, min(figures[tool].median for tool in HF if tool in figures)
    return [what, *shown, better / ours if ours else None]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--adapters", type=int, default=50, help="how many to load; results are saved for 50")
    arguments.add_argument("--rounds", type=int, default=5)
    asked = arguments.parse_args()
    one_thread()
    count = asked.adapters
    imported, used = import_seconds(asked.rounds)
    models = twins()
    attached = attaching(models, asked.rounds)
    disk = on_disk(models, count, asked.rounds)
    adapters = smidgen.adapters_of(models[OURS])
    assert adapters is not None
    switched, off_and_on = switching(adapters, disk.wrapped, count)
    switched_of_two = switching_of_two(adapters)
    adapters.detach()
    for wrapped in disk.wrapped.values():
        wrapped.unload()
    merged, beside = merging(models, asked.rounds)
    for model in models.values():
        model.model.layers = model.model.layers[:SMALLER]  # type: ignore[union-attr, index]
    merged_smaller, beside_smaller = merging(models, asked.rounds)
    merged_barely, _ = merging(models, asked.rounds, BARELY)

    rows = [
        row(f"import, s ({TORCH}: {imported[TORCH].median:.2f})", imported),
        row("import and first use of attach and LoRA, s", used),
        ours_alone(f"{HELP}, s", imported[HELP]),
        row("attach a fresh adapter, s", attached),
        row("save it, s", disk.saves),
        *(
            row(f"load adapter number {n}, s", spreads({tool: [each[n - 1]] for tool, each in disk.loads.items()}))
            for n in SHOWN_LOADS
            if n <= count
        ),
        row(f"load {count} adapters, together, s", spreads({tool: [sum(each)] for tool, each in disk.loads.items()})),
        ours_alone("load one more, the base not checked, s", disk.unchecked),
        row(f"switch to another of {count}, ms", switched, 1e-3),
        ours_alone("switch to another of 2, ms", switched_of_two, 1e-3),
        row(f"switch off and on again, {count} loaded, ms", off_and_on, 1e-3),
        row("merge into the weights, s", merged),
        row("memory beside the model while merging, MB", beside, 1e6),
        row("merge into the weights of 0.51B, s", merged_smaller),
        row("memory beside the 0.51B while merging, MB", beside_smaller, 1e6),
        row("merge into 0.51B a change that bf16 can barely hold, s", merged_barely),
    ]
    columns = ["", OURS, THEIRS, BEST, "times ours"]
    table = {"title": "CPU time and memory", "columns": columns, "rows": rows, "plot": [["times ours"]]}
    over_torch, a_load = used[OURS].median - imported[TORCH].median, Spread.of(disk.loads[OURS]).median
    claims = [
        {"claim": "importing attach and LoRA, over torch, CPU s", "limit": IMPORT_LIMIT_S, "is": over_torch},
        {"claim": "attaching rank 16 to 112 layers, CPU s", "limit": ATTACH_LIMIT_S, "is": attached[OURS].median},
        {"claim": "loading one of 50 adapters, CPU s", "limit": LOAD_LIMIT_S, "is": a_load},
        {"claim": "loading 50 adapters together, CPU s", "limit": LOADS_LIMIT_S, "is": sum(disk.loads[OURS])},
        {"claim": "switching among 50, CPU ms", "limit": SWITCH_LIMIT_MS, "is": switched[OURS].median * 1e3},
        {"claim": "merging into 0.51B, CPU s", "limit": MERGE_LIMIT_S, "is": merged_smaller[OURS].median},
        {"claim": "memory beside it, MB", "limit": MERGE_LIMIT_MB, "is": beside_smaller[OURS].median / 1e6},
    ]
    print(report.table_of(plain(table)))
    if count == 50:
        save("handling", "Handling adapters", described(__doc__), [table], claims)


if __name__ == "__main__":
    main()
