"""What each of two ranks does in `test_distributed.py`: says as JSON how far a model that is sharded or in DDP is from
one that is neither.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import smidgen
from smidgen.core.errors import ModelError
from smidgen.core.fingerprint import fingerprint
from smidgen.training.distributed import end_together, same_everywhere, shard_blocks, sum_gradients

METHODS = ("LoRA", "DoRA", "IA3", "LoHa", "OFT", "Bottleneck", "PrefixTuning", "PromptTuning", "LoReFT")
CPU = torch.device("cpu")


def llama(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def attached(model: nn.Module, method: str) -> smidgen.AdapterSet:
    """An adapter moved away from its start, the same in every process."""
    adapters = smidgen.attach(model, getattr(smidgen, method)(), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return adapters


def outputs_and_gradients(model: nn.Module, adapters: smidgen.AdapterSet, tokens: Tensor) -> dict[str, Tensor]:
    logits = model(input_ids=tokens).logits
    logits.float().square().sum().backward()
    sum_gradients(adapters.parameters())
    return {"": logits.detach()} | {name: whole(p.grad) for name, p in adapters.named_parameters()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def compared(method: str, dtype: torch.dtype, folder: Path) -> float:
    """The largest difference of outputs and summed gradients, with another batch in each process."""
    rank = dist.get_rank()
    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(rank))
    plain, sharded = llama(dtype), llama(dtype)
    print_before = fingerprint(sharded)
    spread = shard_blocks(sharded, CPU)
    assert spread == sum(p.numel() for p in plain.model.layers.parameters())
    assert fingerprint(sharded) == print_before
    sets = [attached(model, method) for model in (plain, sharded)]
    assert not any(hasattr(p, "full_tensor") for p in sets[1].parameters())
    found = gap(*(outputs_and_gradients(m, a, tokens) for m, a in zip((plain, sharded), sets, strict=True)))
    if rank == 0:  # one process alone can write the folder, and a whole model reads it
        sets[1].save(folder / f"{method}-{dtype}")
        smidgen.load(llama(dtype), folder / f"{method}-{dtype}")
    sets[1].detach()
    return found


def attached_first(dtype: torch.dtype) -> float:
    """Attach and then `fully_shard`, as in a loop of one's own: adapters are sharded with their blocks."""
    from torch.distributed.fsdp import fully_shard

    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(5))
    results = []
    for sharded in (False, True):
        model = llama(dtype)
        adapters = attached(model, "LoRA")
        if sharded:
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
        logits = model(input_ids=tokens).logits
        logits.float().square().sum().backward()
        grads = {name: whole(p.grad) for name, p in adapters.named_parameters()}
        results.append({"": logits.detach()} | grads)
    return gap(*results)


def in_ddp(quantised: bool, folder: Path) -> dict[str, float]:
    """How far gradients in DDP, with half the rows in each process, are from those of one process with all rows, as a
    share of the largest; and how far what is loaded is from what was saved.
    """
    halves = [torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(rank)) for rank in range(2)]

    def base() -> nn.Module:
        model = llama(torch.float32)
        if quantised:
            smidgen.quantise(model, "nf4")
        return model

    def gradients(adapters: smidgen.AdapterSet, model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        model(input_ids=tokens).logits.square().mean().backward()
        return {name: p.grad for name, p in adapters.named_parameters()}

    model, alone = base(), base()
    adapters = attached(model, "LoRA")
    wrapped = DistributedDataParallel(model, broadcast_buffers=not quantised)
    expected = gradients(attached(alone, "LoRA"), alone, torch.cat(halves))
    apart = gap(gradients(adapters, wrapped, halves[dist.get_rank()]), expected)
    adapters.save(folder)
    dist.barrier()  # the first process writes
    saved, loaded = (dict(some.named_parameters()) for some in (adapters, smidgen.load(base(), folder)))
    assert saved.keys() == loaded.keys()
    return {"apart": apart / max(float(g.abs().max()) for g in expected.values()), "loaded": gap(loaded, saved)}


def summed() -> dict[str, Any]:
    """Gradients 1 and 2 of one parameter, 3 and none of a second, none of a third."""
    rank = dist.get_rank()
    first, second, third = (nn.Parameter(torch.zeros(n)) for n in (2, 3, 4))
    first.grad = torch.full((2,), 1.0 + rank)
    if rank == 0:
        second.grad = torch.full((3,), 3.0)
    sum_gradients([first, second, third])
    same = torch.tensor([float(rank), 7.0])
    same_everywhere([same])
    return {
        "first": first.grad.tolist(),
        "second": second.grad.tolist(),
        "third": third.grad,
        "same": same.tolist(),
    }


def refused() -> str:
    try:
        shard_blocks(nn.Sequential(nn.Linear(3, 5)), CPU)
    except ModelError as error:
        return str(error)
    return "nothing was refused"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {
        f"{method} {dtype}": compared(method, dtype, folder)
        for method in METHODS
        for dtype in (torch.float32, torch.bfloat16)
    }
    found["attached first"] = max(attached_first(torch.float32), attached_first(torch.bfloat16))
    found["ddp"] = {name: in_ddp(name == "nf4", folder / f"ddp-{name}") for name in ("plain", "nf4")}
    found |= {"summed": summed(), "refused": refused()}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    end_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
