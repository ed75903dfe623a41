"""VB-LoRA against its equations in float64, and against Hugging Face PEFT 0.21.2."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smidgen import attach, load
from smidgen.core.errors import ConfigError, FolderError, TargetError
from smidgen.methods.vblora import VBLoRA

from ..formats.both_ways import from_peft, gap, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_every_piece_is_a_mixture_of_the_vectors_with_the_largest_logits():
    method = VBLoRA(rank=2, vectors=7, vector_length=3, top_k=2, targets="0")
    part = attach(nn.Sequential(nn.Linear(6, 9).double()), method, seed=0).parts("default")["0"]
    bank, matrices = part.shared.bank, {"A": torch.empty(2, 6).double(), "B": torch.empty(9, 2).double()}
    for r in range(2):
        for piece in range(3):
            for name, logits in (("A", part.logits_A[r, min(piece, 1)]), ("B", part.logits_B[piece, r])):
                best = sorted(range(7), key=lambda j: -logits[j])[:2]
                weights = torch.stack([logits[j].exp() for j in best])
                mixed = sum(w / weights.sum() * bank[j] for w, j in zip(weights, best, strict=True))
                if name == "A":
                    matrices["A"][r, 3 * min(piece, 1) : 3 * min(piece, 1) + 3] = mixed
                else:
                    matrices["B"][3 * piece : 3 * piece + 3, r] = mixed
    torch.testing.assert_close(part.weight_delta(slice(None)), matrices["B"] @ matrices["A"], rtol=0, atol=1e-14)


def test_it_trains_one_bank_and_the_logits_of_every_piece():
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3))
    adapters = attach(model, VBLoRA(rank=2, vectors=7, vector_length=3, targets=("0", "1")))
    pieces = 2 * (6 + 9) // 3 + 2 * (9 + 3) // 3
    assert sum(p.numel() for p in adapters.parameters()) == 7 * 3 + 7 * pieces


def test_a_layer_that_no_whole_number_of_vectors_fills_is_refused():
    with pytest.raises(TargetError, match=r"fan-in 6 and fan-out 10 are not both multiples of vector_length = 3"):
        attach(nn.Sequential(nn.Linear(6, 10)), VBLoRA(vector_length=3, targets="0"))


SMALL = {"r": 3, "num_vectors": 11, "vector_length": 16, "target_modules": ["q_proj", "v_proj"]}


def moved(model: nn.Module) -> None:
    torch.default_generator.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "vblora" in name:
            nn.init.normal_(parameter)


@pytest.mark.parametrize("top_k_only", [False, True])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, SMALL),
        (llama, {**SMALL, "topk": 3, "vblora_dropout": 0.1, "num_vectors": 300}),
        (gpt2, {**SMALL, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config, top_k_only):
    from_peft(make, peft.VBLoRAConfig(**config, save_only_topk_weights=top_k_only), change=moved)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    method = VBLoRA(rank=3, vectors=11, vector_length=16, top_k=3, bank_bound=0.5)
    to_peft_and_back(make, method, says={"r": 3, "num_vectors": 11, "topk": 3})


@pytest.fixture
def top_k_folder(tmp_path: Path) -> Path:
    theirs = peft.get_peft_model(llama(), peft.VBLoRAConfig(**SMALL, save_only_topk_weights=True))
    moved(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@torch.no_grad()
def test_a_folder_of_the_best_alone_is_saved_again_as_it_was_and_has_nothing_to_train(top_k_folder, tmp_path):
    model, ids = llama(), torch.arange(1, 11)[None]
    adapters = load(model, top_k_folder)
    assert not any(p.requires_grad for p in adapters.parameters())
    expected = model(input_ids=ids).logits
    adapters.save(tmp_path / "ours")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (top_k_folder, tmp_path / "ours"))
    assert {key: t.tolist() for key, t in after.items()} == {key: t.tolist() for key, t in before.items()}
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert gap(theirs(input_ids=ids).logits, expected) < 1e-5
    adapters.merge(max_error=1.0)
    assert gap(model(input_ids=ids).logits, expected) < 1e-5


def test_an_adapter_of_the_best_alone_cannot_be_started():
    with pytest.raises(ConfigError, match="train one with top_k_only=False"):
        attach(nn.Sequential(nn.Linear(6, 9)), VBLoRA(vector_length=3, top_k_only=True, targets="0"))


def test_a_place_outside_the_bank_is_refused(top_k_folder):
    file = top_k_folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("A_topk_indices"))
    tensors[key][0, 0, 0] = 11
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FolderError, match="beyond the 11 of the bank"):
        load(llama(), top_k_folder)
    assert json.loads((top_k_folder / "adapter_config.json").read_text())["num_vectors"] == 11
