"""`smidgen convert`: folders of ours and of HF PEFT's, to HF PEFT's and to plain LoRA."""

import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from smidgen import LoRA, Targets, attach, load
from smidgen.core.errors import RecipeError
from smidgen.methods.fourierft import FourierFT
from smidgen.recipes.convert import convert
from smidgen.recipes.use import predict

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
IDS = torch.arange(3, 13)[None]


def said(folder: Path, out: Path, **settings: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    convert(folder, out, **({"to": "same", "rank": None} | settings), console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    out = model.eval()(input_ids=IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def test_an_adapter_of_ours_becomes_a_lora_that_hf_peft_runs(bert: Path, tmp_path: Path):
    model = AutoModel.from_pretrained(bert)
    adapters = attach(model, FourierFT(frequencies=12, targets=Targets("*.query", "*.value")), seed=0)
    moved(model)
    adapters.save(tmp_path / "fourier", extra={"kept": 1})
    text = said(tmp_path / "fourier", tmp_path / "lora", model=str(bert), to="lora")
    assert "HF PEFT reads it too" in text
    assert "4 sites as LoRA" in text
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(bert), str(tmp_path / "lora"))
    torch.testing.assert_close(outputs(theirs), outputs(model), rtol=0, atol=1e-5)


def test_a_converted_result_predicts_as_before(start, bert: Path, tmp_path: Path):
    result = start(method={"name": "ia3"}, model={"path": str(bert)}).out
    console = [Console(file=io.StringIO(), width=200) for _ in range(2)]
    convert(result, tmp_path / "same", model=str(bert), to="same", rank=None, console=console[0])
    for folder, each in zip((result, tmp_path / "same"), console, strict=True):
        each.file = io.StringIO()
        predict(folder, None, model=str(bert), text=["a lovely film"], out=None, console=each)
    said = [each.file.getvalue() for each in console]  # type: ignore[attr-defined]
    assert said[0] == said[1]
    assert "prediction" in said[0]


def test_a_causal_model_of_hf_pefts_is_loaded_with_its_head(llama: Path, tmp_path: Path):
    base = tmp_path / "causal"
    LlamaForCausalLM(AutoModel.from_pretrained(llama).config).save_pretrained(base)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    moved(theirs)
    theirs.save_pretrained(str(tmp_path / "loha"))
    text = said(tmp_path / "loha", tmp_path / "lora", model=str(base), to="lora", rank=3)
    assert "rank 3" in text
    assert "relative error at most" in text
    model = AutoModelForCausalLM.from_pretrained(base)
    assert load(model, tmp_path / "lora").method("default").name == "lora"


def test_what_hf_peft_cannot_hold_is_said(bert: Path, tmp_path: Path):
    model = AutoModel.from_pretrained(bert)
    attach(model, LoRA(rank=2, targets="*.query", heads=("*.0.*.bias",)), seed=0).save(tmp_path / "a")
    assert "HF PEFT cannot read it" in said(tmp_path / "a", tmp_path / "b", model=str(bert))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"to": "gguf"}, "it is same or lora"),
        ({"to": "same", "rank": 3}, "--rank is of --to lora"),
        ({"to": "lora", "out": "."}, "is there already"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(settings: dict[str, Any], text: str, tmp_path: Path):
    out = tmp_path / settings.pop("out", "new")
    with pytest.raises(RecipeError, match=text):
        said(tmp_path / "none", out, model="none", **settings)
