"""What one LoRA training step costs over the floor: the same model, frozen, with a gradient to its inputs.

Rank 16 on every linear layer of the body; forward and backward, no optimiser step. Every variant also computes the
gradient to the inputs, so what is above 1 is what adapting costs. Smidgen, HF PEFT and full fine-tuning in one process.

    python benchmarks/training_step.py [--rounds 9] [--only bert-fp32]
"""

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from common import Spread, described, interleaved, kept_for_backward, llama, one_thread, over, save
from torch import Tensor, nn

import smidgen

RANK, ALPHA, DROPOUT = 16, 32, 0.05
FLOOR = "frozen (floor)"
OURS = "**smidgen**"
TIME_LIMIT, KEPT_LIMIT = 1.2, 1.3  # of the plain variant in bf16


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


CASES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "llama-bf16": ("Llama, 4 layers of 1024, 1 x 512 tokens, bf16", lambda: _llama(torch.bfloat16), (1, 512, 1024)),
    "llama-fp32": ("Llama, 4 layers of 1024, 1 x 512 tokens, fp32", lambda: _llama(torch.float32), (1, 512, 1024)),
    "bert-fp32": ("BERT of MiniLM's shape, 6 layers of 384, 32 x 48 tokens, fp32", bert, (32, 48, 384)),
}


def _llama(dtype: torch.dtype) -> nn.Module:
    return llama(hidden=1024, layers=4, feed_forward=2816, heads=16, dtype=dtype)


def hf_peft(model: nn.Module, *, autocast_adapters: bool = True, dropout: float = 0.0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=sorted(names))
    return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapters)


def ours(model: nn.Module, **settings: Any) -> nn.Module:
    smidgen.attach(model, smidgen.LoRA(rank=RANK, alpha=ALPHA, **settings), seed=0)
    return model


def variants_of(base: nn.Module) -> dict[str, nn.Module]:
    """The same model in every dress, each with weights of its own."""
    variants = {FLOOR: copy.deepcopy(base).requires_grad_(False), "full fine-tuning": copy.deepcopy(base)}
    for dropout in (0.0, DROPOUT):
        dropped = f", dropout {dropout}" if dropout else ""
        variants[f"HF PEFT as it comes{dropped}"] = hf_peft(copy.deepcopy(base), dropout=dropout)
        if next(base.parameters()).dtype == torch.bfloat16:
            bf16 = hf_peft(copy.deepcopy(base), dropout=dropout, autocast_adapters=False)
            variants[f"HF PEFT, bf16 adapters{dropped}"] = bf16
        for dropout_on in ("elements", "features") if dropout else ("elements",):
            of_what = f"{dropped} on {dropout_on}" if dropout else ""
            variants[f"{OURS}{of_what}"] = ours(copy.deepcopy(base), dropout=dropout, dropout_on=dropout_on)
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


def measure(key: str, rounds: int) -> tuple[dict[str, Spread], dict[str, float]]:
    """Time and memory kept for backward of every variant, over the floor's."""
    _, build, shape = CASES[key]
    base = build().train()
    x = torch.randn(shape, dtype=next(base.parameters()).dtype, requires_grad=True)
    models = variants_of(base)
    kept = {name: kept_for_backward(model, functools.partial(loss_of, model, x)) for name, model in models.items()}
    samples = interleaved({name: step_of(model, x) for name, model in models.items()}, rounds)
    return over(samples, FLOOR), {name: size / kept[FLOOR] for name, size in kept.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--only", choices=CASES, help="one model, printed and not saved")
    asked = arguments.parse_args()
    one_thread()
    tables, claims = [], []
    for key in [asked.only] if asked.only else CASES:
        seconds, kept = measure(key, asked.rounds)
        print(CASES[key][0])
        for name, spread in seconds.items():
            print(f"  {name:52s} {spread.median:5.2f} ({spread.low:.2f} to {spread.high:.2f})  kept {kept[name]:5.2f}")
        tables.append(
            {
                "title": CASES[key][0],
                "columns": ["", "time / floor", "kept for backward / floor"],
                "rows": [[name, seconds[name], kept[name]] for name in seconds],
            }
        )
        if key == "llama-bf16":
            claims = [
                {"claim": "a LoRA step in bf16 over the frozen floor", "limit": TIME_LIMIT, "is": seconds[OURS].median},
                {"claim": "memory a LoRA step in bf16 keeps, over the floor", "limit": KEPT_LIMIT, "is": kept[OURS]},
            ]
    if not asked.only:
        save("training_step", "One training step", described(__doc__), tables, claims)


if __name__ == "__main__":
    main()
