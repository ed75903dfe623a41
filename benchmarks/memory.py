"""What a LoRA training step keeps, takes at most and costs when blocks compute again what they did not keep.

Rank 16 on every linear layer of the body; forward and backward, no optimiser step, one thread. "Kept" is what the graph
holds between forward and backward, "peak" the resident memory of a step above that before it. HF is HF PEFT's LoRA with
the model in training mode, checkpointed as HF Trainer does it. Second table: one optimiser step over an adapter's
tensors, clipping included.

    python benchmarks/memory.py [--rounds 7] [--only llama-bf16]
"""

import argparse
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Spread, described, interleaved, kept_for_backward, llama, one_thread, over, peak_extra_bytes, save
from torch import Tensor, nn
from training_step import bert, hf_peft, loss_of, ours, step_of

from smidgen import recompute
from smidgen.core.recompute import LEVELS
from smidgen.training.optim import Group, optimizer_of

HF, CHECKPOINTED, IN_EVAL = "HF PEFT", "HF PEFT, gradient checkpointing", "the same, model in eval()"
OURS = {level: f"**smidgen**, recompute: {level}" for level in LEVELS}
CASES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "llama-bf16": ("Llama, 8 layers of 512, 1 x 1024 tokens, bf16", lambda: _llama(torch.bfloat16), (1, 1024, 512)),
    "llama-fp32": ("Llama, 8 layers of 512, 1 x 1024 tokens, fp32", lambda: _llama(torch.float32), (1, 1024, 512)),
    "bert-fp32": ("BERT of MiniLM's shape, 6 layers of 384, 32 x 48 tokens, fp32", bert, (32, 48, 384)),
}
HELD = "llama-bf16"


def _llama(dtype: torch.dtype) -> nn.Module:
    return llama(hidden=512, layers=8, feed_forward=1408, heads=8, dtype=dtype)


def checkpointed(base: nn.Module, *, training: bool) -> nn.Module:
    model: Any = hf_peft(base)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(training)


def variants_of(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for level, name in OURS.items():
        model = ours(copy.deepcopy(base)).eval()
        recompute(model, level)
        yield name, model
    yield HF, hf_peft(copy.deepcopy(base))
    yield CHECKPOINTED, checkpointed(copy.deepcopy(base), training=True)
    yield IN_EVAL, checkpointed(copy.deepcopy(base), training=False)


def measure(key: str, rounds: int) -> list[list[Any]]:
    """Per variant: MB kept, MB at most, and time over that of ours which keeps all."""
    _, build, shape = CASES[key]
    base = build()
    x = torch.randn(shape, dtype=next(base.parameters()).dtype, requires_grad=True)
    models = dict(variants_of(base))
    steps = {name: step_of(model, x) for name, model in models.items()}
    found = {}
    for name, model in models.items():
        steps[name]()  # what is made once and stays
        kept = kept_for_backward(model, functools.partial(loss_of, model, x))
        found[name] = kept / 2**20, peak_extra_bytes(steps[name]) / 2**20
    seconds = over(interleaved(steps, rounds), OURS["off"])
    return [[name, *found[name], seconds[name]] for name in models]


def shapes(layers: int, linears: list[tuple[int, int]], rank: int) -> list[tuple[int, int]]:
    return [shape for O, I in linears for shape in ((rank, I), (O, rank))] * layers


ADAPTERS = {
    "MiniLM, rank 4": shapes(6, [(384, 384)] * 4 + [(1536, 384), (384, 1536)], 4),
    "Llama of 1B, rank 16": shapes(
        16, [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)], 16
    ),
}


def optimizers(which: str, rounds: int) -> list[list[Any]]:
    """Per optimiser: ms of a step, bytes of its states per parameter."""
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
    seconds = interleaved(steps, rounds)
    numbers = sum(p.numel() for p in own)
    return [[name, Spread.of(seconds[name]).over(1e-3), _bytes(states[name]) / numbers] for name in steps]


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
        for name, kept, peak, time in rows:
            spread = f"{time.median:5.2f} ({time.low:.2f} to {time.high:.2f})"
            print(f"  {name:40s} kept {kept:6.1f} MB  peak {peak:6.0f} MB  time {spread}")
        columns = ["", "kept for backward, MB", "peak above the model, MB", "time / recompute: off"]
        tables.append({"title": CASES[key][0], "columns": columns, "rows": rows})
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
                    "is": least[3].median / by_name[CHECKPOINTED][3].median,
                },
            ]
    for which in ADAPTERS if asked.only in (None, "optimizers") else ():
        rows = optimizers(which, 5 * asked.rounds)
        title = f"One optimiser step: {which}, {len(ADAPTERS[which])} tensors"
        print(title)
        for name, time, size in rows:
            print(f"  {name:40s} {time.median:6.2f} ms  {size:4.1f} bytes a parameter")
        tables.append({"title": title, "columns": ["", "ms", "bytes of states per parameter"], "rows": rows})
    if asked.only is None:
        save("memory", "Memory of a training step", described(__doc__), tables, claims)


if __name__ == "__main__":
    main()
