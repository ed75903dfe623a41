"""What one training step costs over the floor: the same model, frozen, with a gradient to its inputs.

LoRA and DoRA of rank 16, in BERT 8, on every linear layer of the body; forward and backward, no optimiser step. Every
variant also computes the gradient to the inputs, so what is above 1 is what adapting costs. Smidgen, HF PEFT and full
fine-tuning in one process. "lean" is `adapters.lean()`, as `smidgen tune` has it: frozen norms and feed-forwards keep
less than the floor's own. "oneDNN": products with frozen weights are made by it and not by MKL, as `smidgen tune` does
where it measures that to be faster. "compiled": block by block, as `train.compile: true` has it. The peak is resident
memory of one step above that before it, with the models loaded and no gradients.

    python benchmarks/training_step.py [--rounds 9] [--only bert-fp32]
"""

import argparse
import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from common import Spread, described, kept_for_backward, llama, one_thread, over, peak_of_step, save, timed
from torch import Tensor, nn

import smidgen
from smidgen.core import lean
from smidgen.core.blocks import blocks
from smidgen.core.products import products_by
from smidgen.training.compiling import compiled

RANK, DROPOUT = 16, 0.05
FLOOR = "frozen (floor)"
OURS, LEAN = "**smidgen**", "**smidgen**, lean"
ELEMENTS, FEATURES = (f", dropout {DROPOUT} on {what}" for what in ("elements", "features"))
DORA = "DoRA, "
ONEDNN = ", oneDNN"
COMPILED = ", compiled"
# which figure, of which model and variant, may be how much
CLAIMS: tuple[tuple[str, str, str, float], ...] = (
    ("time", "llama-bf16", LEAN, 1.10),
    ("memory kept", "llama-bf16", LEAN, 1.25),
    ("time", "llama-bf16", LEAN + ELEMENTS, 1.20),
    ("time", "llama-bf16", DORA + OURS, 1.40),
    ("time", "llama-fp32", OURS, 1.05),
    ("time", "llama-fp32", DORA + OURS, 1.25),
    ("time", "bert-fp32", OURS + ELEMENTS, 1.15),
    ("time", "bert-fp32", OURS + FEATURES, 1.15),
    ("time", "llama-fp32", OURS + ONEDNN, 1.05),
    ("time", "bert-fp32", OURS + ELEMENTS + ONEDNN, 1.15),
)


def bert() -> nn.Module:
    """An encoder of MiniLM's shape."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=512,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


@dataclass(frozen=True)
class Case:
    """A model, the shape of its inputs, and the rank of what is trained."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int


CASES = {
    "llama-bf16": Case(
        "Llama, 4 layers of 1024, 1 x 512 tokens, rank 16, bf16", lambda: _llama(torch.bfloat16), (1, 512, 1024), RANK
    ),
    "llama-fp32": Case(
        "Llama, 4 layers of 1024, 1 x 512 tokens, rank 16, fp32", lambda: _llama(torch.float32), (1, 512, 1024), RANK
    ),
    "bert-fp32": Case("BERT of MiniLM's shape, 6 layers of 384, 32 x 48 tokens, rank 8, fp32", bert, (32, 48, 384), 8),
}


def _llama(dtype: torch.dtype) -> nn.Module:
    return llama(hidden=1024, layers=4, feed_forward=2816, heads=16, dtype=dtype)


def hf_peft(
    model: nn.Module, rank: int = RANK, *, autocast_adapters: bool = True, dropout: float = 0.0, dora: bool = False
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_dora=dora, target_modules=sorted(names))
    return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapters)


def ours(
    model: nn.Module, rank: int = RANK, *, dora: bool = False, is_lean: bool = False, **settings: Any
) -> nn.Module:
    method = smidgen.DoRA if dora else smidgen.LoRA
    adapters = smidgen.attach(model, method(rank=rank, alpha=2 * rank, **settings), seed=0)
    if is_lean:
        adapters.lean()
    return model


def variants_of(base: nn.Module, rank: int) -> dict[str, nn.Module]:
    """The same model in every dress, each with weights of its own."""
    variants = {FLOOR: copy.deepcopy(base).requires_grad_(False), "full fine-tuning": copy.deepcopy(base)}
    dresses = {OURS: False}
    if lean.put_on(copy.deepcopy(base).requires_grad_(False)):  # BERT has nothing to be made lean
        dresses[LEAN] = True
    for dropout in (0.0, DROPOUT):
        dropped = f", dropout {dropout}" if dropout else ""
        variants[f"HF PEFT as it comes{dropped}"] = hf_peft(copy.deepcopy(base), rank, dropout=dropout)
        if next(base.parameters()).dtype == torch.bfloat16:
            bf16 = hf_peft(copy.deepcopy(base), rank, dropout=dropout, autocast_adapters=False)
            variants[f"HF PEFT, bf16 adapters{dropped}"] = bf16
        for name, is_lean in dresses.items():
            for dropout_on in ("elements", "features") if dropout else ("elements",):
                of_what = f"{dropped} on {dropout_on}" if dropout else ""
                settings = {"is_lean": is_lean, "dropout": dropout, "dropout_on": dropout_on}
                variants[f"{name}{of_what}"] = ours(copy.deepcopy(base), rank, **settings)
    variants[f"{DORA}HF PEFT as it comes"] = hf_peft(copy.deepcopy(base), rank, dora=True)
    for name, is_lean in dresses.items():
        variants[DORA + name] = ours(copy.deepcopy(base), rank, dora=True, is_lean=is_lean)
    for name in (FLOOR, OURS):
        variants[name + COMPILED] = copy.deepcopy(variants[name])
    return variants


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A scalar that depends on every output."""
    output: Tensor = model(inputs_embeds=x)[0]
    return output.float().square().mean()


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        x.grad = None
        torch.autograd.backward(loss_of(model, x))

    return step


def by_onednn(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with products_by("onednn"):
            step()

    return run


@dataclass(frozen=True)
class Found:
    """Of one variant: times and memory kept for backward, over the floor's; bytes of a step beside the model."""

    cpu: Spread
    wall: float
    kept: float
    peak_bytes: float


def measure(key: str, rounds: int, held: ExitStack) -> dict[str, Found]:
    """What every variant takes.   held: what lasts meanwhile."""
    case = CASES[key]
    base = case.build().train()
    x = torch.randn(case.shape, dtype=next(base.parameters()).dtype, requires_grad=True)
    models = variants_of(base, case.rank)
    for name, model in models.items():
        if COMPILED in name:
            held.enter_context(compiled(model, blocks(model)))
    kept = {name: kept_for_backward(model, functools.partial(loss_of, model, x)) for name, model in models.items()}
    steps = {name: step_of(model, x) for name, model in models.items()}
    peaks = {name: peak_of_step(model, steps[name]) for name, model in models.items()}
    if x.dtype == torch.float32:  # 16-bit products are oneDNN's in any case
        mine = [name for name in models if OURS in name and LEAN not in name and COMPILED not in name]
        steps |= {name + ONEDNN: by_onednn(steps[name]) for name in mine}
        kept |= {name + ONEDNN: kept[name] for name in mine}
        peaks |= {name + ONEDNN: peak_of_step(models[name], steps[name + ONEDNN]) for name in mine}
    times = timed(steps, rounds)
    cpu, wall = over(times.cpu, FLOOR), over(times.wall, FLOOR)
    return {name: Found(cpu[name], wall[name].median, kept[name] / kept[FLOOR], peaks[name]) for name in steps}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--only", choices=CASES, help="one model, printed and not saved")
    asked = arguments.parse_args()
    one_thread()
    tables: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    for key in [asked.only] if asked.only else CASES:
        with ExitStack() as held:
            found = measure(key, asked.rounds, held)
        print(CASES[key].title)
        for name, each in found.items():
            time = f"{each.cpu.median:5.2f} ({each.cpu.low:.2f} to {each.cpu.high:.2f}), wall {each.wall:5.2f}"
            print(f"  {name:52s} {time}  kept {each.kept:5.2f}  peak {each.peak_bytes / 2**20:5.0f} MB")
        columns = ["time / floor", "wall time / floor", "kept for backward / floor", "peak above the model, MB"]
        tables.append(
            {
                "title": CASES[key].title,
                "columns": ["", *columns],
                "rows": [
                    [name, each.cpu, each.wall, each.kept, each.peak_bytes / 2**20] for name, each in found.items()
                ],
                "plot": [[columns[0]], *([column] for column in columns[2:])],
            }
        )
        for what, model, variant, limit in CLAIMS:
            if model == key:
                figure = found[variant].cpu.median if what == "time" else found[variant].kept
                claims.append(
                    {"claim": f"{what} of a step over the floor, {model}: {variant}", "limit": limit, "is": figure}
                )
    for claim in claims:
        print(f"{claim['claim']:90s} limit {claim['limit']:.2f}  is {claim['is']:.2f}")
    if not asked.only:
        save("training_step", "One training step", described(__doc__), tables, claims)


if __name__ == "__main__":
    main()
