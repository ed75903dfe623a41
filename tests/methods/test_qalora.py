"""QA-LoRA against the paper's algorithm 1, and against the forward of Hugging Face PEFT 0.21.2, which runs on GPTQ."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import save_file
from torch import nn

from smidgen import attach
from smidgen.adapters import load
from smidgen.core.errors import TargetError
from smidgen.methods.qalora import QALoRA

from ..formats.both_ways import from_peft, gap
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_it_is_the_papers_algorithm():
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    adapters = attach(nn.Sequential(layer), QALoRA(rank=2, alpha=3.0, group_size=3, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.B)
    pooled = nn.AvgPool1d(3)(x) * 3  # QA(x) * (D_in // L)
    expected = layer.weight @ x.T + layer.bias[:, None]
    expected = expected.T + pooled @ part.A.T @ part.B.T * 1.5
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-13)


def test_it_trains_a_column_per_group():
    adapters = attach(nn.Sequential(nn.Linear(12, 5)), QALoRA(rank=2, group_size=4, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (12 // 4 + 5)


def test_input_channels_that_do_not_make_groups_are_refused():
    with pytest.raises(TargetError, match="10 input channels do not make groups of 4"):
        attach(nn.Sequential(nn.Linear(10, 5)), QALoRA(group_size=4, targets="0"))


def test_a_folder_from_a_gptq_model_gives_what_hf_peft_gives(tmp_path):
    layer, x, A, B = nn.Linear(12, 5), torch.randn(3, 7, 12), torch.randn(2, 3), torch.randn(5, 2)
    module = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=A)},
        lora_B={"a": SimpleNamespace(weight=B)},
        lora_dropout={"a": nn.Identity()},
        scaling={"a": 2.5},
        qalora_group_size={"a": 4},
        training=False,
        in_features=12,
    )
    expected = QALoraLinearVariant.forward(module, "a", x, layer(x))
    config = LoraConfig(use_qalora=True, qalora_group_size=4, r=2, lora_alpha=5, target_modules=["0"]).to_dict()
    config = {name: value for name, value in config.items() if name != "runtime_config"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["0"]}))
    tensors = {"base_model.model.0.lora_A.weight": A, "base_model.model.0.lora_B.weight": B}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = nn.Sequential(layer)
    load(model, tmp_path)
    assert gap(model(x), expected) < 1e-6


def test_a_folder_from_another_model_is_the_plain_lora_that_hf_peft_made_of_it():
    config = LoraConfig(use_qalora=True, qalora_group_size=4, r=2, target_modules=["q_proj"])
    from_peft(llama, config)


def test_our_folder_is_our_own_and_says_why(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5))
    adapters = attach(model, QALoRA(rank=2, group_size=3, targets="0"), seed=0)
    nn.init.normal_(adapters.parts("default")["0"].B)
    adapters.save(tmp_path / "a")
    assert "only on GPTQ layers" in json.loads((tmp_path / "a" / "smidgen.json").read_text())["not_peft"]
    x = torch.randn(2, 6)
    expected = model(x)
    adapters.detach()
    load(model, tmp_path / "a")
    assert torch.equal(model(x), expected)
