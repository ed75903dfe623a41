"""What a vocabulary of 50,000 words costs a causal language model: the loss of all logits against the chunked one.

A Llama of SmolLM2's width (576), 2,048 tokens, LoRA of rank 16 on every linear layer of the body, one thread; forward
and backward, no optimiser step. "HF" gives `labels=` to LlamaForCausalLM under HF PEFT's LoRA, as it comes and, where
the base is in bf16, with adapters in bf16. Memory is the resident peak of a step above that before it, with the models
loaded and no gradients. The ratios are over HF as it comes.

    python benchmarks/linear_cross_entropy.py [--rounds 3] [--only four-fp32]
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from common import Spread, described, one_thread, over, peak_of_step, save, timed
from torch import Tensor, nn
from training_step import hf_peft, ours

from smidgen.core.linear_cross_entropy import linear_cross_entropy

VOCABULARY, TOKENS, WIDTH = 50_000, 2_048, 576
CASES = {
    "one-fp32": ("1 layer, fp32", 1, torch.float32),
    "four-fp32": ("4 layers, fp32", 4, torch.float32),
    "four-bf16": ("4 layers, bf16", 4, torch.bfloat16),
}
HF, HF_BF16 = "HF loss, HF PEFT", "HF loss, HF PEFT, bf16 adapters"
MIXED, OURS = "HF loss, smidgen LoRA", "**chunked loss, smidgen LoRA**"
HELD, LIMIT = "four-fp32", 0.4


def model_of(layers: int, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    return model


def whole_loss(model: Any, ids: Tensor) -> Tensor:
    """The model's own: logits of all tokens."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def chunked_loss(model: Any, ids: Tensor) -> Tensor:
    hidden = model.model(input_ids=ids).last_hidden_state
    return linear_cross_entropy(hidden[:, :-1], model.lm_head, None, ids[:, 1:]) / (ids.shape[1] - 1)


def body_adapted(model: Any) -> nn.Module:
    """Ours, the head left alone as HF PEFT leaves it."""
    ours(model.model)
    return model


def step_of(model: nn.Module, loss: Callable[[Any, Tensor], Tensor], ids: Tensor) -> Callable[[], None]:
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(loss(model, ids))

    return step


def measure(key: str, rounds: int) -> list[tuple[str, float, float, Spread, float]]:
    """Per variant: its loss, peak memory in MB, and time over that of HF by both clocks."""
    _, layers, dtype = CASES[key]
    base = model_of(layers, dtype)
    ids = torch.randint(VOCABULARY, (1, TOKENS))
    adapted = body_adapted(copy.deepcopy(base))
    variants = {HF: (hf_peft(copy.deepcopy(base)), whole_loss)}
    if dtype == torch.bfloat16:
        variants[HF_BF16] = hf_peft(base, autocast_adapters=False), whole_loss
    variants |= {MIXED: (adapted, whole_loss), OURS: (adapted, chunked_loss)}
    losses = {name: float(loss(model, ids).detach()) for name, (model, loss) in variants.items()}
    steps = {name: step_of(model, loss, ids) for name, (model, loss) in variants.items()}
    peaks = {name: peak_of_step(variants[name][0], step) / 2**20 for name, step in steps.items()}
    times = timed(steps, rounds, warm_up=False)
    cpu, wall = over(times.cpu, HF), over(times.wall, HF)
    return [(name, losses[name], peaks[name], cpu[name], wall[name].median) for name in variants]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", choices=CASES, help="one model, printed and not saved")
    asked = arguments.parse_args()
    one_thread()
    tables, claims = [], []
    for key in [asked.only] if asked.only else CASES:
        found = measure(key, asked.rounds)
        whole = found[0][2]
        print(CASES[key][0])
        for name, loss, peak, time, wall in found:
            spread = f"{time.median:5.2f} ({time.low:.2f} to {time.high:.2f}), wall {wall:5.2f}"
            print(f"  {name:32s} loss {loss:9.5f}  peak {peak:7.0f} MB, {peak / whole:5.2f} of HF's  time {spread}")
        columns = ["", "loss", "peak memory above the model, MB", "of HF's", "time / HF's", "wall time / HF's"]
        rows = [[name, f"{loss:.5f}", peak, peak / whole, time, wall] for name, loss, peak, time, wall in found]
        tables.append(
            {"title": CASES[key][0], "columns": columns, "rows": rows, "plot": [["of HF's"], ["time / HF's"]]}
        )
        if key == HELD:
            claim = f"peak memory of a step with {VOCABULARY:,} words, 4 layers, over HF's loss and HF PEFT"
            claims.append({"claim": claim, "limit": LIMIT, "is": found[-1][2] / whole})
    if not asked.only:
        save("linear_cross_entropy", "The loss of a large vocabulary", described(__doc__), tables, claims)


if __name__ == "__main__":
    main()
