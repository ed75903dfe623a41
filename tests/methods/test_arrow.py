"""Arrow against its formula in float64, and against Hugging Face PEFT 0.21.2 made of the same folders."""

import peft
import pytest
import torch
from peft.tuners.lora.config import ArrowConfig
from torch import nn

from smidgen import LoRA, attach, load
from smidgen.core.errors import ConfigError, FolderError
from smidgen.methods.arrow import Arrow
from smidgen.methods.ia3 import IA3

from ..formats.both_ways import gap, run_text
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
NAMES = ("math", "code", "law")


@torch.no_grad()
def spread(adapters, *names: str) -> None:
    """Experts with one strong direction, which HF PEFT's 15 steps of power iteration find."""
    generator = torch.Generator().manual_seed(2)
    for part in [part for name in names for part in adapters.parts(name).values()]:
        sizes = torch.tensor([1.0, *[0.05] * (len(part.A) - 1)], dtype=part.A.dtype)
        part.A.copy_(torch.randn(part.A.shape, generator=generator).to(part.A) * 0.3)
        part.B.copy_(torch.randn(part.B.shape, generator=generator).to(part.B) * 0.5 * sizes)


def expected(x, layer, experts, top_k: int, t: float):
    """experts: A (R, I), B (O, R) with the scale in it."""
    P = torch.stack([torch.linalg.svd(B @ A, full_matrices=False).Vh[0] for A, B in experts])
    along = (x @ P.T).abs()
    least = along.topk(top_k).values[..., -1:]
    c = (along / t).masked_fill(along < least, float("-inf")).softmax(-1)
    return layer(x) + sum(c[..., k, None] * (x @ A.T @ B.T) for k, (A, B) in enumerate(experts))


@torch.no_grad()
@pytest.mark.parametrize("general", [(), ("wiki", "news")])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_token_is_routed_to_the_experts_that_it_points_along(top_k: int, general: tuple[str, ...]):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    model, x = nn.Sequential(layer), torch.randn(3, 4, 6, dtype=torch.float64)
    base = nn.Linear(6, 5).double()
    base.load_state_dict(layer.state_dict())
    adapters = attach(model, LoRA(rank=2, alpha=3.0, targets="0"), "math", seed=0)
    for name in (*NAMES[1:], *general):
        adapters.add(LoRA(rank=2, alpha=5.0, targets="0"), name, seed=1)
    for i, name in enumerate((*NAMES, *general)):
        for p in adapters.parameters(name):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    own = {name: (adapters.parts(name)["0"].A.clone(), adapters.parts(name)["0"].B.clone()) for name in adapters.names}
    mean = [sum(own[name][i] for name in general) / max(len(general), 1) for i in (0, 1)]
    scales = {"math": 1.5, "code": 2.5, "law": 2.5}
    experts = [(own[n][0] - mean[0], scales[n] * (own[n][1] - mean[1])) for n in NAMES]
    adapters.add(Arrow(experts=NAMES, general=general, top_k=top_k, temperature=0.7), "arrow")
    adapters.activate("arrow")
    torch.testing.assert_close(model(x), expected(x, base, experts, top_k, 0.7), rtol=0, atol=1e-12)
    assert adapters.parameters() == []
    assert all(torch.equal(adapters.parts(n)["0"].A, own[n][0]) for n in NAMES)  # the experts stay what they were


@pytest.mark.parametrize("general", [0, 2])
def test_it_is_what_hf_peft_makes_of_the_same_folders(tmp_path, general: int):
    from peft.tuners.lora import create_arrow_model

    folders = []
    for i in range(3 + general):
        model = llama()
        adapters = attach(model, LoRA(rank=2, alpha=3.0 + i, targets=["*.q_proj", "*.down_proj"]), seed=i)
        with torch.no_grad():
            sizes = torch.tensor([1.0, 0.02])
            generator = torch.Generator().manual_seed(i)
            for part in adapters.parts("default").values():
                part.A.copy_(torch.randn(part.A.shape, generator=generator) * (0.3 if i < 3 else 0.01))
                part.B.copy_(torch.randn(part.B.shape, generator=generator) * sizes * (0.3 if i < 3 else 0.01))
        adapters.save(tmp_path / str(i), task_type="CAUSAL_LM")
        folders.append(str(tmp_path / str(i)))
    config = ArrowConfig(top_k=2, router_temperature=0.5, use_gks=bool(general), rng_seed=0)
    theirs = create_arrow_model(llama(), folders[:3], config, folders[3:] or None).eval()
    ours = llama().eval()
    for i, folder in enumerate(folders):
        adapters = load(ours, folder, str(i))
    adapters.add(Arrow(experts="012", general="34"[:general], top_k=2, temperature=0.5), "arrow")
    adapters.activate("arrow")
    with torch.no_grad():
        out, their = run_text(ours), run_text(theirs)
        adapters.activate(None)
        assert gap(their, run_text(ours)) > 1e-2
    assert gap(out, their) < 1e-5


@torch.no_grad()
def test_its_folder_holds_the_experts(tmp_path):
    model = llama()
    adapters = attach(model, LoRA(rank=2, targets="*.q_proj"), "math", seed=0)
    adapters.add(LoRA(rank=3, targets=["*.q_proj", "*.v_proj"]), "code", seed=1)
    spread(adapters, "math", "code")
    adapters.add(Arrow(experts=("math", "code"), top_k=1), "arrow")
    adapters.activate("arrow")
    expected = run_text(model)
    adapters.save(tmp_path / "arrow", "arrow")
    other = llama()
    load(other, tmp_path / "arrow")
    assert torch.equal(run_text(other), expected)


def test_experts_that_are_not_there_or_cannot_be_mixed_are_named():
    model = nn.Sequential(nn.Linear(3, 5))
    adapters = attach(model, LoRA(rank=2, targets="0"), "math")
    adapters.add(LoRA(rank=3, targets="0"), "code").add(IA3(targets="0"), "scale")
    for method, message in (
        (Arrow(experts=("math", "cod"), top_k=1), "called cod"),
        (Arrow(experts=("math", "scale"), top_k=1), "not scale at 0"),
        (Arrow(experts=("math",), general=("code",), top_k=1), r"ranks are \[2, 3\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapters.add(method, "arrow")
    with pytest.raises(ConfigError, match="it is 1 to 2"):
        Arrow(experts=("math", "code"), top_k=3)


def test_hf_pefts_router_says_how_to_make_it_here(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    said = '"arrow_config": {"task_adapter_names": ["task_0", "task_1"], "top_k": 2, "router_temperature": 0.5}'
    (tmp_path / "adapter_config.json").write_text(text.replace('"arrow_config": null', said))
    message = r"Arrow\(experts=\('task_0', 'task_1'\), top_k=2, temperature=0.5\)"
    with pytest.raises(FolderError, match=message):
        load(llama(), tmp_path)
