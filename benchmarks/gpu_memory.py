"""The memory of training steps on one GPU at the shapes of Llama 1B, 8B and 70B, counted on a machine without one.

The steps of `gpu.py` run on tensors that have a shape and no memory (PyTorch's FakeTensorMode); each storage counts
from where it is made to where it is freed. Counted is the second step, which has the optimiser's states. A GPU needs
more: what its allocator rounds up, the workspaces of its libraries and some 0.5 GiB for CUDA itself. HF's NF4 is
bitsandbytes' CUDA code, which cannot be counted. The last table counts a step of a small model, and beside it is what
PyTorch's allocator gave at most in the same step with memory, on the CPU.

    python benchmarks/gpu_memory.py [--shapes 1b 8b 8b-nf4 70b-nf4] [--sequences 2048 4096]
"""

import argparse
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import gpu
import report
import torch
from common import described, one_thread, plain, save
from gpu import CLAIMED, CLAIMED_TOKENS, FITS_GIB, LARGEST, MEMORY_OF_HF, OURS, SHAPES, Shape
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from smidgen.core import quantised_linear, recompute

_GPU = torch.device("cuda")
_SMALL = Shape(512, 8, 8, 2, 1536, 32_000)
_SMALL_TOKENS = 1024
SAVED, SEQUENCES = ["1b", "8b", "8b-nf4", "70b-nf4"], [2048, 4096]  # whose results are saved


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that operations made and that live, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.living: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self.living:
            self.living[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.living.pop(key)


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors have no numbers, so what is asked of numbers is answered for them: all targets count, nothing drew a
    random number, and a row is one text.  Storages are told apart without addresses.  Weights in few bits are read in
    the blocks of a GPU.
    """
    blocks_of = quantised_linear.blocks_of
    with (
        patch.object(Tensor, "nonzero", lambda x: torch.arange(x.numel())[:, None]),
        patch.object(torch, "equal", lambda one, other: True),
        patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None),
        patch.object(recompute, "_storage", lambda tensor: tensor.untyped_storage()._cdata),
        patch.object(quantised_linear, "blocks_of", lambda size, width, device: blocks_of(size, width, _GPU)),
        FakeTensorMode(allow_non_fake_inputs=True),  # NF4 has a table
    ):
        yield


def counted(shape: Shape, dressed: Callable[[Any], Any], length: int) -> tuple[int, int]:
    """Bytes of the model with its adapters, and at most in a step."""
    model = gpu.llama_without_memory(shape)
    for path, module in model.named_modules():
        if shape.nf4 and gpu.is_quantised(path, module):
            gpu.QUANTISED[OURS](module)
        if isinstance(module, type(model.model.norm)):  # lean blocks are tried, with the norms' own weights
            module.to_empty(device="cpu").weight.data.fill_(1)
    with ExitStack() as stack:
        loss_of, parameters = stack.enter_context(dressed(model))
        stack.enter_context(without_memory())
        count = stack.enter_context(Counted())
        trained = {id(parameter) for parameter in parameters}
        parameters = []
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    own = nn.Parameter(_empty(parameter), requires_grad=id(parameter) in trained)
                    module._parameters[name] = own
                    parameters += [own] if own.requires_grad else []
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else _empty(buffer)
        held = count.now
        step = gpu.step_of(loss_of, parameters, torch.zeros(1, length, dtype=torch.long))
        step()  # makes the optimiser's states
        count.peak = count.now
        step()
        return held, count.peak


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def allocated(shape: Shape, dressed: Callable[[Any], Any], length: int) -> int:
    """Bytes that the CPU's allocator gave at most in a step, beside the model and its adapters."""
    model = gpu.random_llama(shape, torch.device("cpu"), OURS if shape.nf4 else None)
    with dressed(model) as (loss_of, parameters):
        step = gpu.step_of(loss_of, parameters, torch.zeros(1, length, dtype=torch.long))
        step()
        states = sum(2 * parameter.nbytes for parameter in parameters)  # AdamW's, made before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
    given = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    given.sort(key=lambda event: event.start_ns())
    return states + max(itertools.accumulate(event.nbytes() for event in given))


def compare(name: str, sequences: list[int]) -> Iterator[list[Any]]:
    """A line of the table for each length and variant of one shape."""
    shape = SHAPES[name]
    for length in sequences:
        first = None
        for variant, (tool, dressed) in gpu.variants(shape).items():
            if shape.nf4 and tool != OURS:
                continue
            held, peak = (size / 2**30 for size in counted(shape, dressed, length))
            first = first or peak
            yield [name, f"{length:,}", variant, held, peak - held, peak, peak / first]


def claims_of(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """What is claimed of the shapes that were counted."""
    claims: list[dict[str, Any]] = []
    of_8b = [r for r in rows if r[:2] == [CLAIMED, f"{CLAIMED_TOKENS:,}"] and r[2].startswith(OURS)]
    if of_8b:
        claim = f"counted peak memory over HF PEFT's as it comes, 8B, {CLAIMED_TOKENS:,} tokens, one GPU"
        claims.append({"claim": claim, "limit": MEMORY_OF_HF, "is": min(r[6] for r in of_8b)})
    largest = [r[5] for r in rows if r[:2] == [LARGEST, f"{CLAIMED_TOKENS:,}"] and r[2].startswith(OURS)]
    if largest:
        claim = f"70B with NF4-LoRA, {CLAIMED_TOKENS:,} tokens, counted peak GiB on one GPU"
        claims.append({"claim": claim, "limit": FITS_GIB, "is": min(largest)})
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SAVED)
    parser.add_argument("--sequences", nargs="+", type=int, default=SEQUENCES)
    asked = parser.parse_args()
    one_thread()
    rows: list[list[Any]] = []
    for name in asked.shapes:
        for row in compare(name, asked.sequences):
            print("  ".join(f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row), flush=True)
            rows.append(row)
    checked = []
    for variant, (_, dressed) in gpu.variants(_SMALL).items():
        held, peak = counted(_SMALL, dressed, _SMALL_TOKENS)
        real = allocated(_SMALL, dressed, _SMALL_TOKENS)
        checked.append([variant, (peak - held) / 1e6, real / 1e6, real / (peak - held)])
    columns = ["shape", "tokens", "", "model with adapters", "a step beside", "together", "over the first"]
    tables = [
        {"title": "GiB, counted", "columns": columns, "rows": rows},
        {
            "title": f"A step of 8 layers of 512, {_SMALL_TOKENS:,} tokens, counted and allocated",
            "columns": ["", "counted, MB", "allocated, MB", "allocated over counted"],
            "rows": checked,
        },
    ]
    print(report.table_of(plain(tables[1])))
    if (asked.shapes, asked.sequences) == (SAVED, SEQUENCES):
        save("gpu_memory", "Memory on one GPU, counted", described(__doc__), tables, claims_of(rows))


if __name__ == "__main__":
    main()
