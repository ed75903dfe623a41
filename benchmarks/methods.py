"""Every method beside Hugging Face PEFT's: the same folder read by both, the cost of a step, merging, compiling.

A Llama of 2 layers of 512, 256 tokens, fp32, one thread; rank 16 where a method has ranks. Our adapter is moved away
from its start, saved, and read by HF PEFT from that folder; theirs is saved and read by us. Then forward and backward
of both and of the frozen model (the floor, with a gradient to its inputs), interleaved, as medians of CPU time. The
second table has those methods alone whose steps take times that differ by more than a tenth, the largest gain first.

    python benchmarks/methods.py [--rounds 7] [--only oft loha]
"""

import argparse
import copy
import dataclasses
import functools
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import Spread, described, kept_for_backward, llama, one_thread, over, plain, save, timed
from torch import Tensor, nn
from training_step import FLOOR, loss_of, step_of

import smidgen
from smidgen.core.errors import SmidgenError
from smidgen.core.method import Method, methods

TOKENS, RANK = 256, 16
WORST = 1.05  # of a method over HF PEFT's own
# where another size is the method's own, or a default is too large for this model
SETTINGS: dict[str, dict[str, Any]] = {
    "selective": {"by": "magnitude", "budget": 0.005},
    "trainable_tokens": {"tokens": tuple(range(16)), "targets": "embed_tokens"},
    "alora": {"invocation_tokens": (3,)},
    "arrow": {"experts": ("one", "other"), "top_k": 2, "rank": RANK, "train_experts": True},
    "cpt": {"token_ids": tuple(range(16))},
    "xlora": {"experts": ("one", "other"), "rank": RANK, "train_experts": True},
    "vera": {},
    "pvera": {},
    "adalora": {"rank": RANK, "start_rank": RANK},
    "prefix_tuning": {"shift_positions": True},
}
OURS, THEIRS, FAR = "smidgen, time / floor", "HF PEFT, time / floor", 1.1
COLUMNS = ["method", "HF reads ours", "we read HF's", "time / floor", "HF PEFT's", "kept / floor", "HF PEFT's kept"]
COLUMNS += ["merge error", "compiles whole"]


def made(method: type[Method], model: nn.Module) -> Method:
    """The method with settings that compare."""
    fields = {f.name for f in dataclasses.fields(method)}
    usual = {"rank": RANK} if "rank" in fields else {}
    return method(**SETTINGS.get(method.name, usual)).fitted(model)


@torch.no_grad()
def output(model: nn.Module, ids: Tensor) -> Tensor:
    theirs: Any = getattr(model, "active_peft_config", None)
    has_tasks = hasattr(theirs, "n_tasks") or hasattr(theirs, "num_tasks")  # and they want to be told, also of one
    tasks = {"task_ids": torch.zeros(1, dtype=torch.long)} if has_tasks else {}
    logits: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **tasks).logits
    return logits[:, -ids.shape[1] :]  # of the tokens; a prompt may stand in front


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def of_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)
    except ValueError:  # of a prompt that it has loaded it trains nothing
        model: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        model.prompt_encoder.requires_grad_(True)
        return model  # type: ignore[no-any-return]


def measured(name: str, method: type[Method], base: nn.Module, rounds: int, wall_over_cpu: list[float]) -> list[Any]:
    """One row of the table; what cannot be is said in words.   wall_over_cpu: gets ratios by wall over those by CPU."""
    ids, x = torch.arange(3, 35)[None], torch.randn(1, TOKENS, 512, requires_grad=True)
    ours = copy.deepcopy(base)
    adapters = smidgen.attach(ours, made(method, ours), seed=0)
    adapters.follow(torch.optim.SGD(adapters.parameters(), 0.0), 1)  # some train only so
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    expected, there, back, theirs = output(ours, ids), "no such method", "", None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ours")
        adapters.save(path, task_type="CAUSAL_LM")
        obstacle = json.loads((path / "smidgen.json").read_text())["not_peft"]
        if method.disk.foreign and obstacle:
            there = obstacle
        elif method.disk.foreign:
            theirs = of_peft(base, path)
            there = f"{gap(output(theirs, ids), expected):.0e}"
            theirs.save_pretrained(str(Path(folder, "theirs")))
            again = copy.deepcopy(base)
            smidgen.load(again, Path(folder, "theirs"))
            back = f"{gap(output(again, ids), output(theirs, ids)):.0e}"
    variants = {FLOOR: copy.deepcopy(base).requires_grad_(False), "ours": ours}
    if theirs is not None:
        variants["theirs"] = theirs
    for model in variants.values():
        model.train()
    failed = {}
    for key, model in list(variants.items()):
        try:
            step_of(model, x)()
        except Exception as error:
            failed[key] = type(error).__name__
            del variants[key]
    kept = {key: kept_for_backward(model, functools.partial(loss_of, model, x)) for key, model in variants.items()}
    times = timed({key: step_of(m, x) for key, m in variants.items()}, rounds)
    seconds, wall = over(times.cpu, FLOOR), over(times.wall, FLOOR)
    wall_over_cpu += [wall[key].median / seconds[key].median for key in variants if key != FLOOR]
    columns = [
        [seconds.get(key, failed.get(key, "")), kept[key] / kept[FLOOR] if key in kept else ""]
        for key in ("ours", "theirs")
    ]
    return [
        name,
        there,
        back,
        columns[0][0],
        columns[1][0],
        columns[0][1],
        columns[1][1],
        merge_error(adapters, ours, ids, expected),
        compiles(ours, ids),
    ]


def merge_error(adapters: smidgen.AdapterSet, model: nn.Module, ids: Tensor, expected: Tensor) -> str:
    twin = copy.deepcopy(model)
    try:
        smidgen.adapters_of(twin).merge()  # type: ignore[union-attr]
    except SmidgenError:
        return "is not merged"
    return f"{gap(output(twin, ids), expected):.0e}"


def compiles(model: nn.Module, ids: Tensor) -> str:
    torch.compiler.reset()
    try:
        output(torch.compile(model.eval(), fullgraph=True, backend="eager"), ids)  # type: ignore[arg-type]
    except Exception as error:
        return type(error).__name__
    return "yes"


def far_apart(rows: list[list[Any]]) -> list[list[Any]]:
    """The methods of both tools whose times differ by much, with the two times."""
    both = [(row[0], row[3], row[4]) for row in rows if isinstance(row[3], Spread) and isinstance(row[4], Spread)]
    gains = {name: theirs.median / ours.median for name, ours, theirs in both}
    chosen = [list(row) for row in both if not 1 / FAR <= gains[row[0]] <= FAR]
    return sorted(chosen, key=lambda row: gains[row[0]], reverse=True)


def claims_of(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """The method that compares worst with HF PEFT's own, by time and by memory."""
    times = {
        row[0]: row[3]["median"] / row[4]["median"] for row in plain(rows) if all(type(c) is dict for c in row[3:5])
    }
    kept = {row[0]: row[5] / row[6] for row in rows if all(type(cell) is float for cell in row[5:7])}
    claims = []
    for what, ratios in (("time of a step", times), ("memory kept", kept)):
        worst = max(ratios, key=ratios.__getitem__)
        claim = f"{what} over HF PEFT's of the same method, worst of {len(ratios)}: {worst}"
        claims.append({"claim": claim, "limit": WORST, "is": ratios[worst]})
    return claims


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--only", nargs="*", help="these methods, printed and not saved")
    asked = arguments.parse_args()
    warnings.simplefilter("ignore")  # HF PEFT's own
    one_thread()
    base = llama(hidden=512, layers=2, feed_forward=1408, heads=8, dtype=torch.float32)
    rows: list[list[Any]] = []
    wall_over_cpu: list[float] = []
    for name, method in methods().items():
        if asked.only and name not in asked.only:
            continue
        try:
            row = measured(name, method, base, asked.rounds, wall_over_cpu)
        except SmidgenError as error:  # nothing on this model for it
            row = [name, str(error).partition("\n")[0][:90], *[""] * 7]
        print(*(f"{cell.median:.2f}" if hasattr(cell, "median") else cell for cell in row), sep=" | ", flush=True)
        rows.append(row)
    by_wall = Spread.of(wall_over_cpu)
    ends = f"{by_wall.low:.2f} to {by_wall.high:.2f}"
    said = f"By wall time a ratio is {by_wall.median:.2f} ({ends}) of the same by CPU time, over all methods."
    print(said)
    if not asked.only:
        drawn = [OURS, THEIRS]
        tables = [
            {"title": "All methods", "columns": COLUMNS, "rows": rows},
            {"title": "Where times differ", "columns": ["method", *drawn], "rows": far_apart(rows), "plot": [drawn]},
        ]
        save("methods", "Methods side by side", f"{described(__doc__)} {said}", tables, claims_of(rows))


if __name__ == "__main__":
    main()
