"""X-LoRA against its formula in float64, and against Hugging Face PEFT 0.21.2."""

import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from smidgen import LoRA, attach, load
from smidgen.core.errors import AttachError, ConfigError, FolderError, TargetError
from smidgen.methods.ia3 import IA3
from smidgen.methods.xlora import XLoRA

from ..formats.both_ways import gap, run_text
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
IDS = torch.tensor([[3, 9, 4, 1], [8, 2, 2, 7]])


@torch.no_grad()
def with_experts(**settings):
    """A Llama with two LoRA adapters that were moved, and a mixture of them."""
    model = llama().double()
    adapters = attach(model, LoRA(rank=2, targets="*.q_proj"), "math", seed=0)
    adapters.add(LoRA(rank=3, alpha=9.0, targets=["*.q_proj", "*.v_proj"]), "code", seed=1)
    for p in adapters.parameters("math", "code"):
        p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    adapters.add(XLoRA(experts=("math", "code"), **settings), "mix", seed=3)
    return model, adapters


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"layerwise": True}, {"top_k": 1}, {"temperature": 0.3, "scale": 2.0}])
def test_each_token_and_layer_has_its_own_mixture(settings):
    model, adapters = with_experts(**settings)
    adapters.activate(None)
    h = model.model(input_ids=IDS).last_hidden_state
    shared = adapters.parts("mix")["model"].shared
    logits = (h @ shared.weight[0].T + shared.bias[0]).view(2, 4, -1, 2)
    s = torch.softmax(logits / settings.get("temperature", 1.0), -1) * settings.get("scale", 1.0)
    if "top_k" in settings:
        s = s * (s == s.amax(-1, keepdim=True))
    seen = {}
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    layer.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    adapters.activate("mix")
    model(input_ids=IDS)
    site = "model.layers.1.self_attn.v_proj"
    assert site not in adapters.parts("math")
    expert = adapters.parts("code")[site]
    number = [site.name for site in adapters.sites("mix")[1:]].index(site) if settings.get("layerwise") else 0
    change = 3.0 * seen["x"] @ expert.A.T @ expert.B.T  # alpha / R = 9 / 3
    expected = seen["x"] @ layer.weight.T + s[:, :, number, 1, None] * change
    torch.testing.assert_close(seen["y"], expected, rtol=0, atol=1e-12)


def test_the_experts_stay_and_the_classifier_learns():
    model, adapters = with_experts(depth=3, width=6, layerwise=True)
    adapters.activate("mix")
    L, K, D, H = 4, 2, 32, 6
    assert sum(p.numel() for p in adapters.parameters()) == (D + 1) * H + (H + 1) * H + (H + 1) * L * K
    before = adapters.parts("mix")["model.layers.0.self_attn.q_proj"].A.clone()
    model.train()
    model(input_ids=IDS).logits.square().sum().backward()
    adapters.check_gradients()
    assert torch.equal(adapters.parts("mix")["model.layers.0.self_attn.q_proj"].A, before)


def test_the_experts_may_go_once_they_are_mixed(tmp_path):
    model, adapters = with_experts()
    adapters.activate("mix")
    expected = model(input_ids=IDS).logits
    adapters.delete("math")
    adapters.delete("code")
    assert torch.equal(model(input_ids=IDS).logits, expected)
    adapters.save(tmp_path / "mix")
    other = llama().double()
    load(other, tmp_path / "mix")
    assert torch.equal(other(input_ids=IDS).logits, expected)


def test_a_cache_is_refused_and_generation_without_one_works():
    model, adapters = with_experts()
    adapters.activate("mix")
    with pytest.raises(AttachError, match="use_cache=False"):
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, use_cache=False).shape == (2, 6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 6},
        {
            "xlora_depth": 2,
            "xlora_size": 6,
            "xlora_dropout_p": 0.0,
            "scaling_pass_value": 0.3,
            "softmax_temperature": 2.0,
        },
        {"top_k_lora": 1, "global_scaling_weight": 0.5, "enable_softmax": False},
        {"top_k_lora": 1, "enable_softmax_topk": True, "enable_softmax": False},
    ],
)
def test_mixtures_of_hf_peft_are_read(settings, tmp_path):
    paths = {}
    for i, names in enumerate((["q_proj"], ["q_proj", "v_proj"])):
        expert = peft.get_peft_model(llama(), peft.LoraConfig(r=2 + i, lora_alpha=6, target_modules=names))
        for p in filter(lambda p: p.requires_grad, expert.parameters()):
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
        paths[str(i)] = str(tmp_path / str(i))
        expert.save_pretrained(paths[str(i)])
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths, **settings)
    theirs = peft.get_peft_model(llama(use_cache=False), config).eval()
    theirs.save_pretrained(tmp_path / "mix")
    classifier = theirs.base_model.internal_xlora_classifier.state_dict()
    # 0.21.2 leaves out every tensor with ".0." or ".1." in its name, because the experts are called so
    whole = {f"base_model.internal_xlora_classifier.{name}": p.contiguous() for name, p in classifier.items()}
    save_file(whole, tmp_path / "mix" / "adapter_model.safetensors")
    model = llama()
    with pytest.raises(FolderError, match=r"Load\s+them first"):
        load(model, tmp_path / "mix", "mix")
    for name in paths:
        adapters = load(model, paths[name], name)
    load(model, tmp_path / "mix", "mix")
    adapters.activate(None)
    base = run_text(model)
    adapters.activate("mix")
    assert gap(run_text(model), base) > 1e-2
    assert gap(run_text(model), run_text(theirs)) < 1e-5


def test_a_folder_is_ours_because_hf_peft_finds_experts_by_path(tmp_path):
    _, adapters = with_experts()
    adapters.save(tmp_path / "mix", "mix")
    assert "finds it by a path" in json.loads((tmp_path / "mix" / "smidgen.json").read_text())["not_peft"]


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match="softmax_top_k needs top_k"):
        XLoRA(softmax_top_k=True)
    with pytest.raises(ConfigError, match="no adapter of the model is called 0, 1"):
        attach(llama(), XLoRA())
    with pytest.raises(ConfigError, match="no adapter of the model is called other"):
        with_experts()[1].add(XLoRA(experts=("math", "other")), "second")
    with pytest.raises(TargetError, match="no hidden states"):
        attach(nn.Sequential(nn.Linear(2, 2)), XLoRA(train_experts=True, targets="0"))
    adapters = attach(llama(), IA3(), "a")
    with pytest.raises(ConfigError, match="only low-rank adapters"):
        adapters.add(XLoRA(experts=("a",)), "mix")
