"""DoRA against its equation in float64, and against Hugging Face PEFT 0.21.2, training steps included."""

import peft
import pytest
import torch
from torch import nn

from smidgen import LoRA, Targets, attach
from smidgen.core.errors import TargetError
from smidgen.core.quantised import BLOCK, FORMATS, Read
from smidgen.core.quantised_linear import QuantisedLinear
from smidgen.methods.dora import DoRA

from ..formats.both_ways import from_peft, gap, run_on, to_peft_and_back
from ..formats.models import Net, gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own

IDS = torch.arange(20).view(4, 5) % 10


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def cube() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 3, 2), nn.Conv3d(3, 2, 1, bias=False)).eval()


def moved(adapters, by: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapters.parameters():
            p += by * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def test_it_is_equation_5_and_the_norm_has_no_gradient():
    layer = nn.Linear(4, 6).double()
    adapters = attach(nn.Sequential(layer), DoRA(rank=2, alpha=3.0, targets="0"), seed=0)
    moved(adapters)
    part, x = adapters.parts("default")["0"], torch.randn(5, 4, dtype=torch.float64)
    m, A, B = (p.detach().clone().requires_grad_() for p in (part.magnitude, part.A, part.B))
    V = layer.weight + 1.5 * B @ A
    expected = x @ (m[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T + layer.bias
    out = adapters.model(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    expected.square().sum().backward()
    out.square().sum().backward()
    for ours, theirs in ((part.magnitude, m), (part.A, A), (part.B, B)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11)


def test_norms_in_float32_are_right_where_the_change_is_as_large_as_the_weight():
    layer = nn.Linear(300, 40)
    adapters = attach(nn.Sequential(layer), DoRA(rank=4, targets="0"), seed=0)
    moved(adapters)
    part = adapters.parts("default")["0"]
    V = layer.weight.double() + part.scale * part.B.double() @ part.A.double()
    torch.testing.assert_close(part.norms().double(), V.norm(dim=1), rtol=2e-6, atol=0)


def test_it_trains_a_magnitude_per_row_more_than_lora():
    model = nn.Sequential(nn.Linear(3, 5), nn.Conv2d(2, 4, 3))
    adapters = attach(model, DoRA(rank=2, targets=("0", "1")))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (3 + 5) + 5 + 2 * (2 * 9 + 4) + 4


def test_the_norms_follow_a_base_into_which_another_adapter_was_merged():
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5))

    x, first = torch.randn(2, 3), model()
    adapters = attach(first, LoRA(rank=1, targets="0"), "lora", seed=0)
    adapters.add(DoRA(rank=1, targets="0"), "dora", seed=1)
    adapters.activate("lora")
    moved(adapters)
    adapters.merge("lora")
    adapters.activate("dora")
    moved(adapters)
    W, part = first[0].weight.detach(), adapters.parts("dora")["0"]
    V = W + part.scale * part.B @ part.A
    torch.testing.assert_close(
        first(x), x @ (part.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).T + first[0].bias
    )


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in few bits are read in blocks of 64 rows or columns, and reading one whole is an error."""

    def small(size: int, width: int, device: torch.device) -> list[slice]:
        return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]

    def guarded(read: Read) -> Read:
        def some(rows: slice, columns: slice) -> torch.Tensor:
            found = read(rows, columns)
            assert len(found) <= BLOCK or found.shape[1] <= BLOCK, "the whole weight was made dense"
            return found

        return some

    for form in map(type, FORMATS.values()):
        monkeypatch.setattr(form, "reader", lambda *asked, reader=form.reader: guarded(reader(*asked)))
    monkeypatch.setattr("smidgen.core.quantised_linear.blocks_of", small)


def few_bits(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(QuantisedLinear(150, 200, format=name, dtype=dtype))


def in_plain_layers(model: nn.Module) -> nn.Module:
    """The same weights, dense."""
    plain = nn.Linear(150, 200, dtype=model[0].bias.dtype)
    plain.load_state_dict({"weight": model[0].weight.dense(), "bias": model[0].bias})
    return nn.Sequential(plain)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("name", FORMATS)
def test_norms_over_weights_in_few_bits_are_those_of_the_dense_ones_for_changes_of_any_size(name: str, size: float):
    model = few_bits(name)
    adapters = attach(model, DoRA(rank=4, alpha=4, targets="0"), seed=0)
    moved(adapters, size)
    part = adapters.parts("default")["0"]
    V = model[0].weight.double() + part.scale * part.B.double() @ part.A.double()
    torch.testing.assert_close(part.norms().double(), V.norm(dim=1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_change_that_takes_a_row_in_few_bits_away_leaves_a_norm_of_no_more_than_rounding(name: str):
    model = few_bits(name)
    adapters = attach(model, DoRA(rank=1, alpha=1, targets="0"), seed=0)
    part, W = adapters.parts("default")["0"], model[0].weight.dense()
    with torch.no_grad():
        part.A.copy_(W[:1])
        part.B.zero_()[0] = -1
    assert 0 < part.norms()[0] <= 1e-3 * W[0].norm()
    torch.testing.assert_close(part.norms()[1:], W[1:].norm(dim=1))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_in_few_bits_are_never_whole_and_train_as_the_dense_ones_do(
    name: str, dropout: float, request: pytest.FixtureRequest
):
    held = few_bits(name, torch.float64)
    models, found = (held, in_plain_layers(held)), []
    request.getfixturevalue("never_whole")
    for model in models:
        adapters = attach(model, DoRA(rank=2, alpha=3, dropout=dropout, targets="0"), seed=0)
        moved(adapters)
        model.train()
        x = torch.ones(3, 150, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(7)
        y = model(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *adapters.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_the_norms_follow_weights_in_few_bits_into_which_another_adapter_was_merged(name: str):
    model = few_bits(name)
    adapters = attach(model, LoRA(rank=1, targets="0"), "lora", seed=0)
    adapters.add(DoRA(rank=1, targets="0"), "dora", seed=1)
    adapters.activate("lora")
    moved(adapters)
    adapters.merge("lora", max_error=1.0)
    adapters.activate("dora")
    V, part = model[0].weight.dense(), adapters.parts("dora")["0"]
    torch.testing.assert_close(part.norms(), V.norm(dim=1))  # its B is zero


def test_a_row_of_zeros_stays_finite():
    layer = nn.Linear(3, 5)
    nn.init.zeros_(layer.weight[2:3])
    model = nn.Sequential(layer)
    before, x = layer(torch.ones(1, 3)), torch.ones(1, 3)
    attach(model, DoRA(rank=1, targets="0"), seed=0)
    assert torch.equal(model(x), before)


def test_an_unreadable_weight_is_refused():
    layer = nn.Linear(3, 5)
    layer.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match="DoRA has to read it"):
        attach(nn.Sequential(layer), DoRA(targets="0"))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ["words", "conv", "image", "up"])
def test_training_gives_hf_pefts_outputs_and_gradients(name: str, dropout: float):
    config = peft.LoraConfig(target_modules=[name], r=2, lora_alpha=3, lora_dropout=dropout, use_dora=True)
    theirs = peft.get_peft_model(net(), config).train()
    named = {n.split("lora_")[1].split(".")[0]: p for n, p in theirs.named_parameters() if p.requires_grad}
    ours = net()
    adapters = attach(ours, DoRA(rank=2, alpha=3, dropout=dropout, targets=name), seed=0)
    ours.train()
    moved(adapters)
    part = adapters.parts("default")[name]
    pairs = [
        (part.A, named.get("A", named.get("embedding_A"))),
        (part.B, named.get("B", named.get("embedding_B"))),
        (part.magnitude, named["magnitude_vector"]),
    ]
    with torch.no_grad():
        for own, their in pairs:
            their.copy_(own.view(their.shape))
    outs = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        outs.append(model(IDS))
        outs[-1].square().sum().backward()
    assert gap(outs[0], outs[1]) < 1e-6
    for own, their in pairs:
        assert gap(own.grad.flatten(), their.grad.flatten()) < 1e-5


@pytest.mark.parametrize(
    ("make", "config", "run"),
    [
        (llama, {"target_modules": ["q_proj", "down_proj"], "r": 4}, None),
        (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "alpha_pattern": {"v_proj": 5}}, None),
        (llama, {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"q_proj": 3}}, None),
        (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}, None),
        (net, {"target_modules": ["words", "conv", "image", "up"], "r": 3}, run_on(IDS)),
        (cube, {"target_modules": ["0", "1"], "r": 2}, run_on(torch.ones(1, 2, 3, 3, 3))),
    ],
)
def test_folders_of_hf_peft_are_read(make, config, run):
    from_peft(make, peft.LoraConfig(use_dora=True, **config), **({"run": run} if run else {}))


@pytest.mark.parametrize(
    ("make", "targets", "run"),
    [
        (llama, "auto", None),
        (gpt2, "auto", None),
        (net, ("words", "conv", "image", "up"), run_on(IDS)),
        (cube, ("0", "1"), run_on(torch.ones(1, 2, 3, 3, 3))),
    ],
)
def test_hf_peft_reads_ours(make, targets, run):
    method = DoRA(rank=2, alpha=5.0, targets=Targets.auto() if targets == "auto" else targets)
    to_peft_and_back(make, method, says={"use_dora": True, "r": 2}, **({"run": run} if run else {}))
