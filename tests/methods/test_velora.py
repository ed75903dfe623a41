"""VeLoRA against its equations, and against Hugging Face PEFT 0.21.2, gradients included."""

import peft
import pytest
import torch
from peft.tuners.lora.config import VeloraConfig
from torch import nn

from smidgen import LoRA, attach
from smidgen.methods.velora import VeLoRA

from ..formats.both_ways import from_peft, gap, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5))


def test_the_gradient_of_A_is_that_of_the_reconstructed_input_and_of_x_is_exact():
    layer = nn.Linear(6, 5).double()
    adapters = attach(
        nn.Sequential(layer), VeLoRA(rank=2, alpha=3.0, groups=3, gradient_scale=2.0, targets="0"), seed=0
    )
    part, x = adapters.parts("default")["0"], torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(part.B)
    adapters.model.train()
    y = adapters.model(x)
    y.square().sum().backward()
    parts = x.detach().view(4, 3, 2)
    v = parts.mean((0, 1)) / parts.mean((0, 1)).norm()
    rebuilt = 2.0 * ((parts @ v)[..., None] * v).reshape(4, 6)
    dy = 2 * y.detach()
    torch.testing.assert_close(part.A.grad, (1.5 * dy @ part.B).T @ rebuilt)
    torch.testing.assert_close(x.grad, dy @ (layer.weight + part.weight_delta(slice(None))))


def test_it_keeps_groups_and_not_inputs():
    def kept(method) -> int:
        layer, sizes = nn.Linear(64, 8), []
        model = nn.Sequential(nn.Identity(), layer)
        attach(model, method, seed=0)
        model.train()
        own = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel() if t.data_ptr() not in own else 0), t)[1], lambda t: t
        ):
            model(torch.randn(100, 64))
        return sum(sizes)

    assert kept(LoRA(rank=2, targets="1")) >= 100 * 64
    assert kept(VeLoRA(rank=2, groups=4, targets="1")) <= 100 * (4 + 2) + 64 // 4 + 2 * 64 + 2 * 8


def test_it_trains_as_many_numbers_as_lora():
    adapters = attach(layers(), VeLoRA(rank=2, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (7 + 6)


@pytest.mark.parametrize("projection", ["batch_average", "batch_average_once", "random"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_gives_hf_pefts_outputs_and_gradients(projection: str, dropout: float):
    settings = {"num_groups": 3, "scale": 1.5, "init_type": projection}
    config = peft.LoraConfig(
        target_modules=["0", "1"], r=2, lora_alpha=3, lora_dropout=dropout, velora_config=VeloraConfig(**settings)
    )
    theirs, ours = peft.get_peft_model(layers(), config).train(), layers()
    method = VeLoRA(
        rank=2, alpha=3, dropout=dropout, groups=3, gradient_scale=1.5, projection=projection, targets=("0", "1")
    )
    adapters = attach(ours, method, seed=0)
    ours.train()
    pairs = []
    for path, part in adapters.parts("default").items():
        their = theirs.base_model.model.get_submodule(path)
        pairs += [(part.A, their.lora_A.default.weight), (part.B, their.lora_B.default.weight)]
        their.lora_velora_embed["default"].copy_(part.v)
    with torch.no_grad():
        for own, their in pairs:
            their.copy_(own.normal_())
    for _ in range(2):
        x, outs = torch.randn(8, 7), []
        for model in (ours, theirs):
            torch.manual_seed(1)
            outs.append(model(x))
            outs[-1].square().sum().backward()
        assert gap(*outs) < 1e-6
    for own, their in pairs:
        assert gap(own.grad, their.grad) < 1e-5


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"target_modules": ["q_proj", "down_proj"], "velora_config": VeloraConfig(num_groups=5, scale=0.5)}),
        (llama, {"target_modules": ["q_proj"], "velora_config": VeloraConfig(init_type="random")}),
        (gpt2, {"target_modules": ["c_attn"], "velora_config": VeloraConfig(), "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    from_peft(make, peft.LoraConfig(r=4, **config))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    says = {"velora_config": {"num_groups": 5, "scale": 2.0, "init_type": "random"}}
    to_peft_and_back(make, VeLoRA(rank=2, groups=5, gradient_scale=2.0, projection="random"), says=says)
