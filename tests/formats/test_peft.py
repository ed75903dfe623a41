"""Folders go to Hugging Face PEFT and come back, with the same outputs.  Against peft 0.21.2."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from smidgen import LoRA, Stack, Targets, attach
from smidgen.adapters import AdapterSet, load
from smidgen.core.errors import FolderError
from smidgen.core.method import Method
from smidgen.formats.peft_fields import FIELDS
from smidgen.methods.ia3 import IA3
from smidgen.methods.prefix_tuning import PrefixTuning
from smidgen.methods.prompt_tuning import PromptTuning

from .both_ways import from_peft, to_peft_and_back
from .models import Attention, Mixture, Net, gpt2, llama, llama_classifier

IDS = torch.arange(1, 11)[None]
pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's and transformers' own


def logits(model: nn.Module, last: int | None = None) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return out[:, -last:] if last else out


def randomised(adapters: AdapterSet) -> AdapterSet:
    """As if trained: nothing at its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapters


def fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def note(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "smidgen.json").read_text())


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Method]] = {
    "lora": (llama, LoRA(rank=4, dropout=0.1)),
    "lora, ranks and alphas": (
        llama,
        LoRA(rank=4, rank_pattern={"*.q_proj": 2, "layers.1.*.k_proj": 3}, alpha_pattern={"layers.{0-0}.*": 7.5}),
    ),
    "lora, rank-stabilised": (llama, LoRA(rank=4, rank_stabilised=True, targets=["*.q_proj", "*.down_proj"])),
    "lora, one layer": (llama, LoRA(rank=2, targets="model.layers.1.self_attn.v_proj")),
    "lora, embeddings": (llama, LoRA(rank=2, targets=["embed_tokens", "lm_head", "*.q_proj"])),
    "lora, conv1d": (gpt2, LoRA(rank=3)),
    "lora, head": (llama_classifier, LoRA(rank=2, heads=("score",))),
    "lora, no head": (gpt2, LoRA(rank=2, targets="*.c_fc")),
    "ia3": (llama, IA3()),
    "ia3, conv1d": (gpt2, IA3()),
    "ia3, head": (llama_classifier, IA3(heads=("score",))),
    "prompt": (llama, PromptTuning(length=5)),
    "prompt, head": (llama_classifier, PromptTuning(length=5, heads=("score",))),
    "prefix": (llama, PrefixTuning(length=5, shift_positions=True)),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_peft_reads_our_folder_and_we_read_it_back(case: str, tmp_path: Path) -> None:
    make, method = TRANSFORMERS[case]
    model = make()
    randomised(attach(model, method, seed=0)).save(tmp_path / "ours")
    assert note(tmp_path / "ours")["not_peft"] is None
    expected = logits(model)

    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours"))
    # rounding: our products of thin factors are made transposed; a cache is another kernel's choice
    rounding = 1e-6 if case.startswith(("lora", "prefix")) else 0
    torch.testing.assert_close(
        logits(theirs, expected.shape[1] if expected.ndim == 3 else None),
        expected,
        rtol=rounding,
        atol=rounding,
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = make()
    load(again, tmp_path / "theirs")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
        (
            llama,
            {
                "r": 4,
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"layers.1.mlp.up_proj": 3},
            },
        ),
        (llama, {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"^model.layers.1.self_attn.q_proj": 7}}),
        (llama, {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
        (llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        (llama, {"r": 2, "target_modules": ".*mlp.*_proj", "use_rslora": True, "init_lora_weights": "gaussian"}),
        (llama_classifier, {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
        (gpt2, {"r": 2, "target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    ],
)
def test_we_read_what_peft_trained(make: Callable[[], nn.Module], config: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(str(tmp_path))
    model = make()
    load(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-6, atol=1e-6)


def _same_in_peft(make: Callable[[], nn.Module], method: Method, x: Tensor, folder: Path, atol: float = 0.0) -> None:
    """Ours -> HF PEFT -> ours."""
    torch.manual_seed(0)
    base = make().eval()
    state = base.state_dict()

    def fresh() -> nn.Module:
        model = make().eval()
        model.load_state_dict(state)
        return model

    model = fresh()
    randomised(attach(model, method, seed=0)).save(folder / "ours")
    assert note(folder / "ours")["not_peft"] is None
    with torch.no_grad():
        expected = model(x)
        assert not torch.allclose(expected, base(x))
        theirs = peft.PeftModel.from_pretrained(fresh(), str(folder / "ours"))
        torch.testing.assert_close(theirs(x), expected, rtol=0, atol=atol)
        theirs.save_pretrained(str(folder / "theirs"))
        again = fresh()
        load(again, folder / "theirs")
        assert torch.equal(again(x), expected)


def test_convolutions_and_embeddings_agree_with_peft(tmp_path: Path) -> None:
    method = LoRA(rank=2, targets=["words", "conv", "image", "up"])
    _same_in_peft(Net, method, torch.randint(10, (2, 5)), tmp_path, atol=1e-6)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_experts_agree_with_peft(is_transposed: bool, tmp_path: Path) -> None:
    method = LoRA(rank=2, targets=Targets("experts").parameter("up", "down", "out"), rank_pattern={"experts.down": 3})
    _same_in_peft(lambda: Mixture(is_transposed), method, torch.randn(2, 7), tmp_path, atol=1e-4)


def test_one_of_two_stacks_agrees_with_peft(tmp_path: Path) -> None:
    method = LoRA(rank=2, targets=Targets("experts").parameter("down"))
    _same_in_peft(Mixture, method, torch.randn(2, 7), tmp_path, atol=1e-4)


def test_multihead_attention_agrees_with_peft(tmp_path: Path) -> None:
    # HF PEFT adds the change of out_proj twice
    twice = {"attention.out_proj.weight": 32.0}
    targets = Targets("attention").parameter("in_proj_weight", "out_proj.weight")
    method = LoRA(rank=2, alpha=16, alpha_pattern=twice, targets=targets)
    _same_in_peft(Attention, method, torch.randn(2, 3, 8), tmp_path, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "method", "why"),
    [
        (Net, LoRA(rank=2, targets="grouped"), "grouped"),
        (Attention, LoRA(rank=2, targets=Targets("attention").parameter("in_proj_weight")), "together"),
        (Attention, LoRA(rank=2, targets=Targets("attention").parameter("in_proj_weight", "out_proj.weight")), "twice"),
        (Mixture, LoRA(rank=2, dropout=0.5, targets=Targets("experts").parameter("up")), "dropout"),
        (llama_classifier, PromptTuning(length=3), "task_type"),
        (llama, PrefixTuning(length=3), "shift_positions"),
    ],
)
def test_what_peft_cannot_hold_is_written_under_our_own_name(
    make: Callable[[], nn.Module], method: Method, why: str, tmp_path: Path
) -> None:
    model = make()
    state = model.state_dict()
    adapters = randomised(attach(model, method, seed=0))
    adapters.save(tmp_path / "a")
    assert fields(tmp_path / "a")["peft_type"] == f"SMIDGEN_{method.name.upper()}"
    assert why in note(tmp_path / "a")["not_peft"]
    with pytest.raises(KeyError, match="SMIDGEN"):
        peft.PeftConfig.from_pretrained(str(tmp_path / "a"))
    again = make()
    again.load_state_dict(state)
    found = load(again, tmp_path / "a")
    for (name, parameter), (other, value) in zip(adapters.named_parameters(), found.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "magic"},
        {"megatron_config": {"tensor_parallel": 2}},
        {"layer_replication": [[0, 1], [0, 2]]},
    ],
)
def test_a_field_that_changes_the_numbers_is_refused_by_name(config: dict[str, Any], tmp_path: Path) -> None:
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    written = fields(tmp_path) | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(FolderError, match=f"cannot be done here.*{next(iter(config))}"):
        load(llama(), tmp_path)


def test_a_field_of_a_later_version_is_refused_only_if_it_is_on(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    written = fields(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"use_next": False, "next_config": None}))
    load(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"use_next": True}))
    with pytest.raises(FolderError, match="use_next = 'True'"):
        load(llama(), tmp_path)


def test_grouped_convolutions_of_peft_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["grouped"])).save_pretrained(str(tmp_path))
    with pytest.raises(FolderError, match="grouped"):
        load(Net(), tmp_path)


def test_an_embedding_that_was_changed_is_not_taken_for_the_models_own(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.base_layer.weight[3] += 1
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(FolderError, match=r"embed_tokens\.base_layer\.weight differs"):
        load(llama(), tmp_path)


def test_pefts_sub_folders_are_read_by_name(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a")
    theirs.add_adapter("b", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    theirs.save_pretrained(str(tmp_path))
    adapters = load(llama(), tmp_path)
    assert adapters.names == ["a", "b"]
    assert load(llama(), tmp_path, "b").method("b").rank == 3  # type: ignore[attr-defined]
    with pytest.raises(FolderError, match='has no adapter "c"; it has a, b'):
        load(llama(), tmp_path, "c")


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.IA3Config, peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_the_table_of_fields_is_that_of_the_installed_package(kind: type, tmp_path: Path) -> None:
    config = kind(num_virtual_tokens=1) if "Prompt" in kind.__name__ or "Prefix" in kind.__name__ else kind()
    config.save_pretrained(str(tmp_path))
    theirs = fields(tmp_path)
    ours = FIELDS[theirs["peft_type"]] | {"peft_type": theirs["peft_type"], "inference_mode": False}  # true in a model
    if "num_virtual_tokens" in theirs:
        ours |= {"num_virtual_tokens": 1}
    assert ours == theirs


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_are_heads_here(bias: str) -> None:
    adapters = from_peft(gpt2, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias=bias))
    trained = [site.name for site in adapters.sites("default") if site.parameter == "bias"]
    assert len(trained) == (2 if bias == "lora_only" else 2 * 6 + 1)


@pytest.mark.parametrize(("heads", "bias"), [("*.c_attn.bias", "lora_only"), ("*.bias", "all")])
def test_biases_among_the_heads_are_written_as_pefts_bias(heads: str, bias: str) -> None:
    to_peft_and_back(gpt2, LoRA(rank=2, targets="*.c_attn", heads=(heads,)), says={"bias": bias})


def test_some_biases_are_no_bias_of_pefts(tmp_path: Path) -> None:
    attach(gpt2(), LoRA(rank=2, targets="*.c_attn", heads=("h.0.*.bias",))).save(tmp_path / "a")
    assert "single parameters" in note(tmp_path / "a")["not_peft"]


@pytest.mark.parametrize("tokens", [[3, 5], {"embed_tokens": [5, 3, 9]}])
def test_tokens_that_peft_trained_beside_lora_are_a_second_adapter(tokens: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    adapters = from_peft(llama, config)
    assert adapters.names == ["default", "default_tokens"]
    assert adapters.active == Stack("default", "default_tokens")


def test_tokens_of_a_tied_embedding_act_at_the_head_too() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    adapters = from_peft(lambda: llama(tie_word_embeddings=True), config)
    assert "lm_head" in [site.name for site in adapters.sites("default_tokens")]
