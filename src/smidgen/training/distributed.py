"""Several processes: gradients are summed at the end of a step, and a base too large for one process is sharded.

What is trained stays whole in every process, as plain tensors: it is small, so one sum of a flat tensor a step is all
that the processes have to say to each other about it, and checkpoints, optimiser and guard need to know nothing of
them.  The frozen base gets no gradient, so sharding it costs its gathering alone, block by block, forward and backward:
FSDP2, `torch.distributed.fsdp.fully_shard`.  Why so, and not DDP: docs/decisions/0020-several-processes.md
"""

import atexit
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.blocks import blocks
from ..core.errors import ModelError
from ..core.fingerprint import pin_fingerprint

_BUCKET = 1 << 24  # numbers summed at once: 64 MB in fp32


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes the sum over all processes; one that a process lacks counts as zero there, and one that
    all lack stays None.
    """
    for bucket in _buckets(list(parameters)):
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        there = torch.tensor([p.grad is not None for p in bucket], dtype=parts[0].dtype, device=parts[0].device)
        flat = torch.cat([there, *(part.flatten() for part in parts)])
        dist.all_reduce(flat)
        has = flat[: len(bucket)].tolist()
        sums = torch.split(flat[len(bucket) :], [p.numel() for p in bucket])
        for parameter, gradient, processes in zip(bucket, sums, has, strict=True):
            parameter.grad = gradient.view_as(parameter) if processes else None


@torch.no_grad()
def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's numbers, in place."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def shard_blocks(model: nn.Module, device: torch.device) -> int:
    """Spread the weights of the model's blocks over all processes, frozen; returns how many numbers are spread.

    Before adapters are attached: what comes later is whole in every process.  All else of the model moves to `device`
    and stays whole.  Raises ModelError where no blocks are recognised.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    paths = blocks(model)
    if not paths:
        raise ModelError(
            f"no blocks are recognised in {type(model).__name__}, so there is nothing to shard; leave train.shard out"
        )
    pin_fingerprint(model)  # while this process has all weights
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parts = [model.get_submodule(path) for path in paths]
    spread = {id(p): p for part in parts for p in part.parameters()}
    whole = {p for p in model.parameters() if id(p) not in spread}
    for parameter in spread.values():
        parameter.requires_grad_(False)
    for part in parts:
        fully_shard(part, mesh=mesh)
    for owner in dict.fromkeys(path.rpartition(".")[0].rpartition(".")[0] for path in paths):
        # holds nothing itself, but knows which block comes next and gathers it meanwhile
        fully_shard(model.get_submodule(owner), mesh=mesh, ignored_params=whole)
    model.to(device)
    return sum(p.numel() for p in spread.values())


def end_together() -> None:
    """End the program here, with success, if it is one of several processes; else do nothing.

    Groups of processes live as long as what is sharded over them, and gloo's threads as long as the groups: whatever of
    them is left when C++ tidies up after Python aborts a program that has done all it had to.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # none goes while another still listens
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, as many as are summed at once."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for some in kinds.values():
        bucket, held = list[nn.Parameter](), 0
        for parameter in some:
            if bucket and held + parameter.numel() > _BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(parameter)
            held += parameter.numel()
        yield bucket
