"""What is on disk or in the tables is shown as it is; damage is shown, then reported."""

import re

import pytest
import torch
from rich.console import Console
from torch import nn

import smidgen
from smidgen.core.errors import CheckpointError, FolderError, ModelError
from smidgen.core.method import methods
from smidgen.recipes.inspect import inspect, list_methods
from smidgen.training import checkpoint


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.classifier = nn.Linear(3, 2)

    def forward(self, x):  # (B, 3) -> (B, 2)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


@pytest.fixture
def console():
    return Console(record=True, width=80)


@pytest.fixture
def folder(tmp_path):
    adapters = smidgen.attach(Toy(), smidgen.LoRA(rank=2, targets="layers.*", heads=("classifier",)), "mood", seed=0)
    adapters.save(
        tmp_path / "mood", base_model="models/toy", extra={"task": {"name": "text_classification", "kind": "binary"}}
    )
    return tmp_path / "mood"


def shown(what, console) -> str:
    inspect(str(what), console)
    return text_of(console)


def text_of(console) -> str:
    return re.sub(r" +", " ", console.export_text())


def flip_last_byte(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_adapter_folder_tells_all_about_itself(folder, console):
    text = shown(folder, console)
    size = 2 * 2 * (3 + 3) + 2 * 3 + 2  # two sites of rank 2, and the head
    for line in (
        "adapter mood\n",
        "method lora\n",
        "alpha 16.0, bias_on_B False, dropout 0.0, dropout_on elements, rank 2, rank_stabilised False",
        "places 2 x layers.* (linear)\n",
        "heads classifier\n",
        f"{size} parameters in 6 tensors",
        "task kind binary, name text_classification\n",
        "base models/toy Toy\n",
        "checksums 6 of 6 tensors are as they were written\n",
    ):
        assert line in text, line


def test_a_flipped_bit_is_shown_and_reported(folder, console):
    flip_last_byte(folder / "adapter_model.safetensors")
    with pytest.raises(FolderError, match=r"adapter_model.safetensors is damaged: base_model\..*Use another copy"):
        inspect(str(folder), console)
    assert "checksums 5 of 6 tensors" in text_of(console)


def test_a_folder_of_several_adapters_shows_each(tmp_path, console):
    adapters = smidgen.attach(Toy(), smidgen.LoRA(rank=2, targets="layers.*"), "one", seed=0)
    adapters.add(smidgen.LoRA(rank=1, targets="layers.0"), "two", seed=0)
    adapters.save(tmp_path / "both")
    text = shown(tmp_path / "both", console)
    assert "adapters one, two\n" in text
    assert "adapter one\n" in text
    assert "places 1 x layers.* (linear)\n" in text


def test_a_folder_that_smidgen_did_not_write_is_shown_without_checksums(folder, console):
    (folder / "smidgen.json").unlink()
    text = shown(folder, console)
    assert "method LORA\n" in text
    assert "checksums none: not written by smidgen\n" in text


def test_text_of_a_stranger_is_not_markup(folder, console):
    note = folder / "smidgen.json"
    note.write_text(note.read_text().replace("models/toy", "[red]models/toy[/blue]"))
    assert "base [red]models/toy[/blue] Toy\n" in shown(folder, console)


def test_checkpoints_are_listed_with_step_and_state(tmp_path, console):
    for step in (10, 20):
        checkpoint.save(
            tmp_path,
            checkpoint.State(
                step=step,
                tensors={"A": torch.ones(2, 3)},
                optimizer={},
                history={"best_step": 10, "best_value": 0.75, "seconds": 61.0},
                fingerprint="a",
            ),
        )
    text = shown(tmp_path, console)
    assert re.search(r"step-00000010 10 10 0\.750 1 min 1 s .*whole", text)
    flip_last_byte(tmp_path / "step-00000020" / "state.json")
    assert "whole" in shown(tmp_path / "step-00000010", console)
    with pytest.raises(CheckpointError, match=r"step-00000020 is damaged: state\.json"):
        inspect(str(tmp_path), console)
    assert "damaged" in text_of(console)


def test_what_is_nothing_of_the_kind_is_an_error(tmp_path, console):
    with pytest.raises(ModelError, match=r"is not a model: it has no config\.json"):
        inspect(str(tmp_path), console)


def test_every_method_is_listed_with_its_formula_and_paper(console):
    list_methods(console)
    text = console.export_text()
    for name, method in methods().items():
        assert name in text
        assert method.summary in text
        assert method.paper in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert re.search(r"yes +LORA", rows["lora"])
    assert re.search(r"yes +- *$", rows["head"])
    assert re.search(r"no +PREFIX_TUNING", rows["prefix_tuning"])


@pytest.fixture
def minilm_name(minilm):
    return str(minilm)


@pytest.mark.real_model
def test_a_model_is_shown_with_layers_starred_and_shares(minilm_name, console):
    text = shown(minilm_name, console)
    assert "class BertModel\n" in text
    assert "parameters 22,713,216\n" in text
    assert re.search(r"6 encoder\.layer\.\*\.intermediate\.dense Linear 384 -> 1,536 3,548,160 15\.6 % auto", text)
    assert "blocks 6 x encoder.layer.* (BertLayer)" in text
    assert len({len(line.rstrip()) > 80 for line in text.splitlines()}) == 2, "paths are not cut on a narrow terminal"


@pytest.mark.real_model
def test_methods_are_counted_on_a_model(minilm_name, console):
    list_methods(console, minilm_name)
    text = text_of(console)
    linear = 6 * (4 * (384 + 384) + 2 * (384 + 1536)) + 384 + 384  # fan-in plus fan-out of all, and of the pooler
    assert re.search(rf"LORA {8 * linear:,} 1\.5 %", text)
    assert re.search(r"head .* - -", text)
    assert "head not on" in text
