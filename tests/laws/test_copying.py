"""Copies, pickles and saved adapters do what the original does and share nothing with it."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from smidgen import Rows, Stack, Weighted, adapters_of, load

from .cases import Case, cases


def storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


@torch.no_grad()
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_gives_the_same_output_and_shares_no_storage(typical_case: Case, way: Callable[[nn.Module], nn.Module]):
    case = typical_case
    model, adapters = case.attached("a", "b")
    other = way(model)
    theirs = adapters_of(other)
    assert theirs is not None
    assert theirs is not adapters
    assert theirs.model is other
    assert not storages(other) & storages(model)
    weighted = [Weighted(a=0.5, b=2.0)] if case.is_weightable else []
    for expression in ("a", "b", *weighted, Rows("a", None, "b"), None):
        adapters.activate(expression)
        expected = case.run(model)
        theirs.activate(expression)
        assert torch.equal(case.run(other), expected)
    theirs.activate("b")
    adapters.activate("a")
    before = case.run(model)
    for p in theirs.parameters():
        p.zero_()
    theirs.detach()
    assert torch.equal(case.run(model), before)
    assert torch.equal(case.run(other), case.run(case.model()))


def test_a_copy_made_while_rows_are_mixed_does_the_same(typical_case: Case):
    case = typical_case
    model, adapters = case.attached("a", "b")
    adapters.activate(Rows("a", None, "b"))
    assert torch.equal(case.run(copy.deepcopy(model)), case.run(model))


def test_pickles_open_in_a_fresh_process(tmp_path: Path):
    bundle = {}
    for case in cases():
        if not type(case.model()).__module__.startswith("transformers."):  # the other process has no classes of tests
            continue
        model, _ = case.attached()
        bundle[str(case)] = (model, case.batch(), case.run(model).detach())
    assert len(bundle) > 10
    (tmp_path / "models").write_bytes(pickle.dumps(bundle))
    program = (
        "import pickle, torch, pathlib\n"
        "torch.set_num_threads(1)\n"
        f"bundle = pickle.loads(pathlib.Path({str(tmp_path / 'models')!r}).read_bytes())\n"
        "for name, (model, batch, expected) in bundle.items():\n"
        "    out = model(**batch)\n"
        "    assert torch.equal(getattr(out, 'logits', out), expected), name\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@torch.no_grad()
def test_saved_and_loaded_equals_itself(case: Case, tmp_path: Path):
    model, adapters = case.attached("a", "b")
    adapters.activate(Stack("a", "b"))
    adapters.save(tmp_path / "folder")
    other = case.model()
    theirs = load(other, tmp_path / "folder")
    assert theirs.active == adapters.active
    for name in ("a", "b"):
        ours = dict(adapters.named_parameters(name))
        assert {n: torch.equal(p, ours[n]) for n, p in theirs.named_parameters(name)} == dict.fromkeys(ours, True)
    assert torch.equal(case.run(other), case.run(model))


@torch.no_grad()
def test_one_adapter_loads_under_another_name(typical_case: Case, tmp_path: Path):
    case = typical_case
    model, adapters = case.attached("a", "b")
    adapters.save(tmp_path / "folder", "b")
    other = case.model()
    load(other, tmp_path / "folder", "renamed")
    adapters.activate("b")
    assert torch.equal(case.run(other), case.run(model))
