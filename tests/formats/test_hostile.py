"""Folders that a stranger made: refused in one line, quickly, with nothing run, allocated or changed."""

import copy
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smidgen import LoRA, attach
from smidgen.adapters import adapters_of, load
from smidgen.core.errors import AttachError, FolderError, SmidgenError
from smidgen.core.safe import read_tensors, tensor_sha256, write_tensors

from .golden import Example, example


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Change fields of a JSON file; "settings.rank" is a field of a field."""
    data = json.loads((folder / file).read_text())
    for dotted, value in changes.items():
        *owners, name = dotted.split("__")
        inner = data
        for owner in owners:
            inner = inner[owner]
        inner[name] = value
    (folder / file).write_text(json.dumps(data))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "adapter_config.json", **changes)


def note(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "smidgen.json", **changes)


def without_note(then: Callable[[Path], None]) -> Callable[[Path], None]:
    """As if HF PEFT had written it."""

    def change(folder: Path) -> None:
        (folder / "smidgen.json").unlink()
        then(folder)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], seal: bool = False) -> Callable[[Path], None]:
    """Change the tensors; seal: with checksums that fit."""

    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        held = read_tensors(path)
        change(held)
        write_tensors(path, held)
        if seal:
            note(tensors={key: tensor_sha256(tensor) for key, tensor in held.items()})(folder)

    return rewrite


A = "base_model.model.first.lora_A.weight"


def set_to(key: str, value: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda held: held.__setitem__(key, value(held[key]) if callable(value) else value)


def raw(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(data)


def a_million_levels(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"a":' * 10**5 + "1" + "}" * 10**5)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "config is no JSON": (raw("adapter_config.json", b"{"), "not valid JSON"),
    "config is a list": (raw("adapter_config.json", b"[]"), "not an object"),
    "duplicate keys": (raw("adapter_config.json", b'{"r": 1, "r": 2}'), "more than once"),
    "deep": (a_million_levels, "nested deeper"),
    "tensors are a pickle": (raw("adapter_model.safetensors", pickle.dumps(print)), "is a pickle"),
    "tensors are cut": (
        lambda folder: os.truncate(folder / "adapter_model.safetensors", 400),
        "bytes of data|header is",
    ),
    "unknown method": (without_note(config(peft_type="ADANEXT")), "ADANEXT.*these are read: ADALORA|'ADANEXT'"),
    "ours without a note": (without_note(config(peft_type="SMIDGEN_LORA")), "smidgen.json is missing"),
    "another's note": (config(peft_type="IA3"), "belong to different adapters"),
    "fields that disagree": (config(lora_alpha=3), "disagree on lora_alpha"),
    "rank of 50 million": (without_note(config(r=50_000_000)), "need .50000000, 6"),
    "rank beyond all numbers": (without_note(config(r=10**30)), "not a whole number"),
    "rank that is none": (without_note(config(r="8")), "not a whole number"),
    "rank below one": (without_note(config(r=-1)), "must be a whole number"),
    "alpha that is none": (without_note(config(lora_alpha=[1])), "not a number"),
    "pattern that hangs": (without_note(config(rank_pattern={"(a+)+!": 3})), "are not run"),
    "pattern that is none": (without_note(config(rank_pattern=[1])), "not a mapping"),
    "heads by pattern": (without_note(config(modules_to_save=["(a|a)*$"])), "are not run"),
    "heads as text": (without_note(config(modules_to_save="classifier")), "not a list"),
    "heads nobody named": (without_note(config(modules_to_save=None)), "classifier.weight has no place"),
    "our pattern that hangs": (note(settings__rank_pattern={"*a*a*a*a*a*a*a*a*!": 3}), "are not run"),
    "our heads by pattern": (note(heads=["*"]), "are not run"),
    "a later format": (note(format=3), "format is '3'.*upgrade"),
    "a misspelt field": (note(setings={}), "setings"),
    "a setting there is none of": (note(settings__dropuot=0.1), "dropuot"),
    "a setting of another type": (note(settings__dropout="much"), "dropout|settings cannot be"),
    "a place there is none of": (note(sites=[{"path": "third", "parameter": None, "kind": "linear"}]), "third"),
    "a parameter that is none": (note(sites=[{"path": "first", "parameter": "__class__", "kind": None}]), "__class__"),
    "a place with more": (note(sites=[{"path": "first", "run": "me"}]), "not path, parameter and kind"),
    "a place of another kind": (note(sites=[{"path": "first", "parameter": None, "kind": "conv"}]), "was conv"),
    "a composition that is none": (note(composition={"run": ["rm"]}), "composition"),
    "a name that is a path": (note(name="../../x"), "no name for an adapter"),
    "a method there is none of": (note(method="os.system"), "no method"),
    "a missing tensor": (tensors(lambda held: held.pop(A)), f"{A} is missing"),
    "one tensor too many": (
        tensors(set_to("base_model.model.first.lora_C", torch.ones(2))),
        "first.lora_C has no place",
    ),
    "two names for one place": (tensors(set_to("first.lora_A.weight", torch.ones(3, 4))), "the same place"),
    "a tensor of another shape": (
        tensors(set_to(A, lambda t: t.T)),
        "is .4, 3., the model and the settings need .3, 4",
    ),
    "a tensor of whole numbers": (
        tensors(set_to(A, lambda t: t.to(torch.int32))),
        "is I32, it should be torch.float32",
    ),
    "a bit flipped": (tensors(set_to(A, lambda t: t + 2**-20)), "first.lora_A.weight is damaged"),
    "NaN": (tensors(set_to(A, lambda t: t * torch.nan), seal=True), "holds NaN or infinity"),
    "infinity": (tensors(set_to(A, lambda t: t / 0), seal=True), "holds NaN or infinity"),
    "another base": (note(base={"fingerprint": "1-0-0-0"}), "trained on other weights"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    example().save(tmp_path / "a", "style")
    return tmp_path / "a"


@pytest.fixture
def untouched() -> Iterator[nn.Module]:
    """A model that the test must leave as it was, in no time."""
    model = Example()
    before, modules, start = copy.deepcopy(model), set(sys.modules), time.perf_counter()
    yield model
    assert time.perf_counter() - start < 1
    assert {name for name in set(sys.modules) - modules if "smidgen" not in name} == set()
    assert adapters_of(model) is None
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_with_its_reason(case: str, folder: Path, untouched: nn.Module) -> None:
    change, reason = HOSTILE[case]
    change(folder)
    with pytest.raises((FolderError, AttachError), match=reason) as caught:
        load(untouched, folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"megatron_core": "antigravity"},
        {"target_modules": "(a+)+!", "exclude_modules": "(a+)+!"},
        {"layers_pattern": "(a+)+!"},
        {"base_model_name_or_path": "https://example.org/evil", "revision": "../.."},
    ],
)
def test_fields_that_name_code_places_or_patterns_are_not_followed(fields: dict[str, Any], folder: Path) -> None:
    without_note(config(**fields))(folder)
    modules = set(sys.modules)
    load(Example(), folder)
    assert not {"antigravity", "megatron"} & (set(sys.modules) - modules)


@pytest.mark.parametrize("name", ["..", "../b", "/etc", "a/../..", "", "."])
def test_sub_folders_are_names_and_never_paths(name: str, tmp_path: Path) -> None:
    example().save(tmp_path / "a")
    edit(tmp_path / "a", "smidgen.json", adapters=[name])
    with pytest.raises(FolderError, match="not names of different sub-folders"):
        load(Example(), tmp_path / "a")


def test_a_sub_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    example().save(tmp_path / "a")
    example().save(tmp_path / "elsewhere", "scale")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    edit(tmp_path / "a", "smidgen.json", adapters=["link"], composition=None)
    with pytest.raises(FolderError, match="is a link"):
        load(Example(), tmp_path / "a")


def _replaced(data: Any, junk: Any) -> Iterator[Any]:
    """The data with each of its values in turn replaced."""
    for key in data if isinstance(data, dict) else range(len(data)):
        changed = copy.copy(data)
        changed[key] = junk
        yield changed
        if isinstance(data[key], dict | list) and data[key]:
            for inner in _replaced(data[key], junk):
                changed = copy.copy(data)
                changed[key] = inner
                yield changed


JUNK = [None, 2**70, "(a+)+!", [[]], {"": {}}]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: str(junk)[:8])
def test_whatever_stands_in_a_field_is_read_or_refused(junk: Any, tmp_path: Path) -> None:
    adapters = attach(Example(), LoRA(rank=2, targets="first", heads=("classifier",), rank_pattern={"first": 3}))
    adapters.save(tmp_path / "a", extra={"a": 1})
    model = Example()
    for file in ("adapter_config.json", "smidgen.json"):
        path = tmp_path / "a" / file
        text = path.read_text()
        for changed in _replaced(json.loads(text), junk):
            for alone in (False, True):  # as ours, and as HF PEFT's
                if alone and file == "smidgen.json":
                    continue
                path.write_text(json.dumps(changed))
                kept = (tmp_path / "a" / "smidgen.json").read_bytes()
                if alone:
                    (tmp_path / "a" / "smidgen.json").unlink()
                try:
                    load(model, tmp_path / "a").detach()
                except SmidgenError:
                    assert adapters_of(model) is None
                (tmp_path / "a" / "smidgen.json").write_bytes(kept)
        path.write_text(text)
