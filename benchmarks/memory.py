"""What a LoRA training step keeps, takes at most and costs when blocks compute again what they did not keep.

Rank 16 on every linear layer of the body; forward and backward, no optimiser step, one thread. "Kept" is what the graph
holds between forward and backward, "peak" the resident memory of a step above that before it, gradients included. The
floor is the frozen model with a gradient to its inputs. HF is HF PEFT's LoRA with the model in training mode, as it
comes and with adapters in bf16 where the base is, checkpointed as HF Trainer does it. Second table: one optimiser step
over an adapter's tensors, clipping included.

    python benchmarks/memory.py [--rounds 7] [--only llama-bf16]
"""

import argparse
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Spread, described, kept_for_backward, llama, one_thread, over, peak_of_step, save, timed
from torch import Tensor, nn
from training_step import FLOOR, bert, hf_peft, loss_of, ours, step_of

from smidgen import recompute
from smidgen.core.recompute import LEVELS
from smidgen.training.optim import Group, optimizer_of

FULL, HF, BF16, CHECKPOINTED = "full fine-tuning", "HF PEFT", ", bf16 adapters", ", gradient checkpointing"
IN_EVAL = "the same, model in eval()"
OURS = {level: f"**smidgen**, recompute: {level}" for level in LEVELS}
CASES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "llama-bf16": ("Llama, 8 layers of 512, 1 x 1024 tokens, bf16", lambda: _llama(torch.bfloat16), (1, 1024, 512)),
    "llama-fp32": ("Llama, 8 layers of 512, 1 x 1024 tokens, fp32", lambda: _llama(torch.float32), (1, 1024, 512)),
    "bert-fp32": ("BERT of MiniLM's shape, 6 layers of 384, 32 x 48 tokens, fp32", bert, (32, 48, 384)),
}
HELD = "llama-bf16"


def _llama(dtype: torch.dtype) -> nn.Module:
    return llama(hidden=512, layers=8, feed_forward=1408, heads=8, dtype=dtype)


def checkpointed(base: nn.Module, *, training: bool = True, autocast_adapters: bool = True) -> nn.Module:
    model: Any = hf_peft(base, autocast_adapters=autocast_adapters)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(training)


def variants_of(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield FLOOR, copy.deepcopy(base).requires_grad_(False)
    yield FULL, copy.deepcopy(base)
    for level, name in OURS.items():
        model = ours(copy.deepcopy(base)).eval()
        recompute(model, level)
        yield name, model
    yield HF, hf_peft(copy.deepcopy(base))
    yield HF + CHECKPOINTED, checkpointed(copy.deepcopy(base))
    yield IN_EVAL, checkpointed(copy.deepcopy(base), training=False)
    if next(base.parameters()).dtype == torch.bfloat16:
        yield HF + BF16, hf_peft(copy.deepcopy(base), autocast_adapters=False)
        yield HF + BF16 + CHECKPOINTED, checkpointed(copy.deepcopy(base), autocast_adapters=False)


def measure(key: str, rounds: int) -> list[list[Any]]:
    """Per variant: MB kept, MB at most, and time over that of ours which keeps all, by both clocks."""
    _, build, shape = CASES[key]
    base = build()
    x = torch.randn(shape, dtype=next(base.parameters()).dtype, requires_grad=True)
    models = dict(variants_of(base))
    steps = {name: step_of(model, x) for name, model in models.items()}
    found = {}
    for name, model in models.items():
        kept = kept_for_backward(model, functools.partial(loss_of, model, x))
        found[name] = kept / 2**20, peak_of_step(model, steps[name]) / 2**20
    times = timed(steps, rounds)
    cpu, wall = over(times.cpu, OURS["off"]), over(times.wall, OURS["off"])
    return [[name, *found[name], cpu[name], wall[name].median] for name in models]


def shapes(layers: int, linears: list[tuple[int, int]], rank: int) -> list[tuple[int, int]]:
    return [shape for O, I in linears for shape in ((rank, I), (O, rank))] * layers


ADAPTERS = {
    "MiniLM, rank 4": shapes(6, [(384, 384)] * 4 + [(1536, 384), (384, 1536)], 4),
    "Llama of 1B, rank 16": shapes(
        16, [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)], 16
    ),
}


def optimizers(which: str, rounds: int) -> list[list[Any]]:
    """Per optimiser: ms of a step by both clocks, bytes of its states per parameter."""
    steps, states = {}, {}

    def add(name: str, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)

        def step() -> None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
            optimizer.step()

        steps[name], states[name] = step, optimizer

    def fresh() -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(shape)) for shape in ADAPTERS[which]]

    def grouped(parameters: list[nn.Parameter]) -> list[Group]:
        named = {str(i): p for i, p in enumerate(parameters)}
        return [Group(parameters=named, learning_rate=1e-4, weight_decay=0.01)]

    own = fresh()
    add("**smidgen**, adamw (fused)", own, optimizer_of(grouped(own)))
    for name, how in (("foreach", {"foreach": True}), ("a loop", {"foreach": False})):
        other = fresh()
        add(f"torch AdamW, {name}", other, torch.optim.AdamW(other, lr=1e-4, **how))
    flat = [nn.Parameter(torch.cat([p.detach().flatten() for p in own]))]
    add("torch AdamW, fused over one flat buffer", flat, torch.optim.AdamW(flat, lr=1e-4, fused=True))
    if importlib.util.find_spec("bitsandbytes") is not None:
        eight = fresh()
        add("**smidgen**, adamw8bit", eight, optimizer_of(grouped(eight), "adamw8bit"))
    times = timed(steps, rounds)
    cpu, wall = ({name: Spread.of(taken).over(1e-3) for name, taken in by.items()} for by in (times.cpu, times.wall))
    numbers = sum(p.numel() for p in own)
    return [[name, cpu[name], wall[name].median, _bytes(states[name]) / numbers] for name in steps]


def _bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--only", choices=[*CASES, "optimizers"], help="one table, printed and not saved")
    asked = arguments.parse_args()
    one_thread()
    tables, claims = [], []
    for key in CASES if asked.only is None else [asked.only] if asked.only in CASES else []:
        rows = measure(key, asked.rounds)
        print(CASES[key][0])
        for name, kept, peak, time, wall in rows:
            spread = f"{time.median:5.2f} ({time.low:.2f} to {time.high:.2f}), wall {wall:5.2f}"
            print(f"  {name:48s} kept {kept:6.1f} MB  peak {peak:6.0f} MB  time {spread}")
        drawn = ["kept for backward, MB", "peak above the model, MB", "time / recompute: off"]
        columns = ["", *drawn, "wall time / recompute: off"]
        plot = [[column] for column in drawn]
        tables.append({"title": CASES[key][0], "columns": columns, "rows": rows, "plot": plot})
        if key == HELD:
            by_name = {row[0]: row for row in rows}
            whole, cheap, least = (by_name[OURS[level]] for level in LEVELS)
            claims = [
                {"claim": "kept by recompute: cheap, over off", "limit": 0.7, "is": cheap[1] / whole[1]},
                {"claim": "kept by recompute: all, over off", "limit": 0.1, "is": least[1] / whole[1]},
                {"claim": "time of recompute: cheap, over off", "limit": 1.2, "is": cheap[3].median},
                {
                    "claim": "time of recompute: all, over HF PEFT with gradient checkpointing",
                    "limit": 1.0,
                    "is": least[3].median / by_name[HF + CHECKPOINTED][3].median,
                },
            ]
    for which in ADAPTERS if asked.only in (None, "optimizers") else ():
        rows = optimizers(which, 5 * asked.rounds)
        title = f"One optimiser step: {which}, {len(ADAPTERS[which])} tensors"
        print(title)
        for name, time, wall, size in rows:
            print(f"  {name:40s} {time.median:6.2f} ms, wall {wall:6.2f} ms  {size:4.1f} bytes a parameter")
        columns = ["", "ms", "ms, wall", "bytes of states per parameter"]
        tables.append({"title": title, "columns": columns, "rows": rows})
    if asked.only is None:
        save("memory", "Memory of a training step", described(__doc__), tables, claims)


if __name__ == "__main__":
    main()
