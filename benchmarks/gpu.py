"""LoRA and NF4-LoRA on one GPU at the shapes of Llama 1B, 8B and 70B: tokens per second and memory, beside HF PEFT.

Weights are random and made in place, a layer at a time: nothing is downloaded. LoRA of rank 16 on every linear layer of
the blocks, AdamW, one sequence a step, loss on every token over the whole vocabulary. Each tool as it comes and at its
best: HF PEFT without and with activation checkpointing, with fp32 and with bf16 adapters, Liger's kernels where they
are installed; smidgen with lean blocks, its chunked loss and each level of recomputation. All in one process on the
same base, by turns; a step that does not fit is said to be out of memory. `gpu_memory.py` counts memory without a GPU.

    python benchmarks/gpu.py [--shapes 1b 8b 70b-nf4] [--sequences 2048 4096 32768] [--steps 5] [--rounds 3]
    python benchmarks/gpu.py --device cpu --shapes tiny --sequences 64 --steps 1     to see that it runs
"""

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from common import Spread, described, save
from torch import Tensor, nn

import smidgen
from smidgen.core.linear_cross_entropy import linear_cross_entropy
from smidgen.core.quantised import format_named
from smidgen.core.quantised_linear import quantise_
from smidgen.core.recompute import Level

RANK, ALPHA = 16, 32
OURS, HF = "smidgen", "HF PEFT"
LIGER = f"{HF}, checkpointing, bf16 adapters, Liger"
CLAIMED, CLAIMED_TOKENS, MEMORY_OF_HF = "8b", 4096, 0.5  # of which something is claimed, beside HF PEFT
LARGEST, FITS_GIB = "70b-nf4", 48


@dataclass(frozen=True)
class Shape:
    """Of a Llama.   nf4: its linear layers in 4 bits."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    nf4: bool = False


_1B = Shape(2048, 16, 32, 8, 8192, 128_256)
_8B = Shape(4096, 32, 32, 8, 14_336, 128_256)
_70B = Shape(8192, 80, 64, 8, 28_672, 128_256)
SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 96, 256),
    "tiny-nf4": Shape(64, 2, 4, 2, 128, 256, nf4=True),
    "1b": _1B,
    "8b": _8B,
    "8b-nf4": Shape(**{**vars(_8B), "nf4": True}),
    "70b-nf4": Shape(**{**vars(_70B), "nf4": True}),
}


@dataclass(frozen=True)
class Found:
    """What one variant did at one length.   speed: tokens a second; both None where it is out of memory."""

    speed: Spread | None
    peak_gib: float | None


def llama_without_memory(shape: Shape) -> Any:
    """The model on the meta device, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1 << 17,
        rope_theta=500_000.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).requires_grad_(False).eval()


def random_llama(shape: Shape, device: torch.device, quantised_by: str | None) -> Any:
    """The model on the device in bf16, or its blocks' linear layers in NF4, held by smidgen or by bitsandbytes."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = llama_without_memory(shape)
    for path, module in list(model.named_modules()):
        if not list(module.parameters(recurse=False)):
            continue
        module.to_empty(device=device, recurse=False)
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
        if quantised_by and is_quantised(path, module):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, QUANTISED[quantised_by](module))
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)
    return model.requires_grad_(False).eval()


def is_quantised(path: str, module: nn.Module) -> bool:
    """True of a linear layer of the blocks."""
    return isinstance(module, nn.Linear) and path != "lm_head"


def _by_bitsandbytes(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    new.weight = bnb.nn.Params4bit(
        layer.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
    )
    return new.to(layer.weight.device)  # this is where it is quantised


def _by_smidgen(layer: nn.Linear) -> nn.Module:
    quantise_(layer, format_named("nf4"))
    return layer


QUANTISED: dict[str, Callable[[nn.Linear], nn.Module]] = {HF: _by_bitsandbytes, OURS: _by_smidgen}


@contextmanager
def hf_peft(
    model: Any, *, checkpointing: bool = True, bf16_adapters: bool = False, liger: bool = False
) -> Iterator[tuple[Callable[[Tensor], Tensor], Any]]:
    """HF PEFT's LoRA with HF's own loss."""
    from peft import LoraConfig, get_peft_model

    names = sorted(
        {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    )
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=not bf16_adapters)
    wrapped.train()
    try:
        yield (
            lambda tokens: wrapped(input_ids=tokens, labels=tokens).loss,
            [p for p in wrapped.parameters() if p.requires_grad],
        )
    finally:
        wrapped.unload()
        if checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        model.requires_grad_(False).eval()


@contextmanager
def ours(model: Any, *, recompute: Level) -> Iterator[tuple[Callable[[Tensor], Tensor], Any]]:
    """Our LoRA and our loss, which never has all logits at once."""
    adapters = smidgen.attach(model, smidgen.LoRA(rank=RANK, alpha=ALPHA), seed=0)
    adapters.lean()

    def loss(tokens: Tensor) -> Tensor:
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
        return linear_cross_entropy(hidden, model.lm_head.weight, None, tokens[:, 1:]) / (tokens.numel() - 1)

    try:
        with smidgen.recompute(model, recompute):
            yield loss, adapters.parameters()
    finally:
        adapters.detach()


Variants = dict[str, tuple[str, Callable[[Any], Any]]]


def variants(shape: Shape) -> Variants:
    """Name -> who quantises the base where it is, and what runs on it."""
    found: Variants = {}
    if not shape.nf4 or importlib.util.find_spec("bitsandbytes"):
        found[f"{HF} as it comes"] = (HF, lambda model: hf_peft(model, checkpointing=False))
        found[f"{HF}, checkpointing"] = (HF, hf_peft)
        found[f"{HF}, checkpointing, bf16 adapters"] = (HF, lambda model: hf_peft(model, bf16_adapters=True))
        if importlib.util.find_spec("liger_kernel"):
            found[LIGER] = (HF, lambda model: hf_peft(model, bf16_adapters=True, liger=True))
    for level in ("off", "cheap", "all"):
        found[f"{OURS}, recompute {level}"] = (OURS, lambda model, level=level: ours(model, recompute=level))
    return found


def step_of(loss_of: Callable[[Tensor], Tensor], parameters: Any, tokens: Tensor) -> Callable[[], None]:
    """What one step of training does."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss_of(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(model: Any, dressed: Callable[[Any], Any], tokens: Tensor, steps: int) -> tuple[float, float]:
    """Tokens per second of training steps, and the peak in GiB; raises torch.OutOfMemoryError."""
    device = tokens.device
    with dressed(model) as (loss_of, parameters):
        step = step_of(loss_of, parameters, tokens)
        step()  # what is made once
        _wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _wait(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return tokens.numel() * steps / seconds, peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    shape: Shape, todo: Variants, sequences: list[int], device: torch.device, steps: int, rounds: int
) -> dict[tuple[int, str], Found]:
    """What each variant did at each length."""
    found: dict[tuple[int, str], Found] = {}
    groups: dict[str, list[str]] = {}
    for variant, (quantiser, _) in todo.items():
        groups.setdefault(quantiser if shape.nf4 else "", []).append(variant)
    for quantiser, names in groups.items():  # one base at a time is in memory
        torch.manual_seed(0)
        model = random_llama(shape, device, quantiser or None)
        for length in sequences:
            tokens = torch.randint(shape.vocabulary, (1, length), device=device)
            speeds: dict[str, list[float]] = {variant: [] for variant in names}
            peaks: dict[str, float] = {}
            for _ in range(rounds):
                for variant in names:
                    try:
                        speed, peaks[variant] = measured(model, todo[variant][1], tokens, steps)
                        speeds[variant].append(speed)
                    except torch.OutOfMemoryError:
                        pass
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
            for variant in names:
                fits = len(speeds[variant]) == rounds
                found[length, variant] = Found(
                    Spread.of(speeds[variant]) if fits else None, peaks.get(variant) if fits else None
                )
        del model
        gc.collect()
    return found


def lines(name: str, found: dict[tuple[int, str], Found], sequences: list[int]) -> Iterator[list[Any]]:
    """A line of the table for each length and variant of one shape."""
    for length in sequences:
        of_length = {variant: each for (other, variant), each in found.items() if other == length}
        first = next((each for each in of_length.values() if each.speed), None)
        for variant, each in of_length.items():
            over = each.speed.median / first.speed.median if each.speed and first and first.speed else None
            memory = each.peak_gib / first.peak_gib if each.peak_gib and first and first.peak_gib else None
            speed: Any = each.speed or "out of memory"
            yield [name, f"{length:,}", variant, speed, each.peak_gib, over, memory]


def claims_of(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """What is claimed of the shapes that were run."""
    claims: list[dict[str, Any]] = []
    ran = [r for r in rows if r[:2] == [CLAIMED, f"{CLAIMED_TOKENS:,}"] and isinstance(r[3], Spread)]
    theirs, mine = ([r for r in ran if r[2].startswith(tool)] for tool in (HF, OURS))
    if theirs and mine:
        best = max(r[3].median for r in mine)
        claims.append(
            {
                "claim": "HF PEFT's tokens per second over ours, 8B, 4,096 tokens, one GPU",
                "limit": 1 / 1.5,
                "is": theirs[0][3].median / best,
            }
        )
        claims.append(
            {
                "claim": "peak memory over HF PEFT's, 8B, 4,096 tokens, one GPU",
                "limit": MEMORY_OF_HF,
                "is": min(r[4] for r in mine) / theirs[0][4],
            }
        )
    large = [r[4] for r in rows if r[0] == LARGEST and r[2].startswith(OURS) and r[4]]
    if large:
        claims.append(
            {"claim": "70B with NF4-LoRA, peak GiB on one GPU", "limit": FITS_GIB, "is": min(large)},
        )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "8b", "8b-nf4", "70b-nf4"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[2048, 4096, 8192, 32_768])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing is measured; to see that it runs: --device cpu --shapes tiny")
        return
    found: dict[str, dict[tuple[int, str], Found]] = {name: {} for name in asked.shapes}
    for last in (False, True):  # Liger patches transformers for the rest of the process
        for name in asked.shapes:
            todo = {variant: how for variant, how in variants(SHAPES[name]).items() if (variant == LIGER) == last}
            found[name] |= compare(SHAPES[name], todo, asked.sequences, device, asked.steps, asked.rounds)
            print(f"{name}: {', '.join(todo) or 'no Liger'}", flush=True)
    rows = [row for name in asked.shapes for row in lines(name, found[name], asked.sequences)]
    for row in rows:
        print("  ".join(str(cell.median if isinstance(cell, Spread) else cell) for cell in row))
    if device.type == "cuda":
        columns = [
            "shape",
            "tokens",
            "",
            "tokens a second",
            "peak, GiB",
            "speed over the first",
            "memory over the first",
        ]
        title = torch.cuda.get_device_name(device)
        tables = [{"title": title, "columns": columns, "rows": rows}]
        save("gpu", "On one GPU", described(__doc__), tables, claims_of(rows))


if __name__ == "__main__":
    main()
