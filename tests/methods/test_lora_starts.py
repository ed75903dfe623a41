"""Where LoRA starts: the papers' definitions in float64, and Hugging Face PEFT 0.21.2 on the same weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from smidgen import LoRA, Targets, attach
from smidgen.adapters import AdapterSet, load
from smidgen.core import data_starts, starts
from smidgen.core.errors import ConfigError, FolderError, NonFiniteError, TargetError
from smidgen.methods.lora import SUBTRACTED, LoRAAdapter

from ..formats.both_ways import from_peft, run_on, run_text, to_peft_and_back
from ..formats.models import Mixture, gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's and transformers' own
BOTH = Targets("first", "second")
PLAIN = ["pissa", "pissa_fast", "olora", "mica"]  # of the weight alone


class Two(nn.Module):
    """Two linear layers; input (B, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def two() -> nn.Module:
    return Two().double()


def part_of(start: str, **settings: Any) -> tuple[nn.Module, LoRAAdapter]:
    """A linear layer 6 -> 5 in float64 with LoRA of rank 2 and s = 3 / 2."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    adapters = attach(layer, LoRA(rank=2, alpha=3.0, start=start, targets="", **settings), seed=3)
    return layer, adapters.parts("default")[""]


def data(model: nn.Module, seed: int = 1) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """loss(), and the batches that it will have seen."""
    generator, seen = torch.Generator().manual_seed(seed), []

    def loss() -> Tensor:
        spread = torch.tensor([5.0, 3, 1, 0.5, 0.2, 0.1]).double()
        seen.append(torch.randn(8, 4, 6, generator=generator, dtype=torch.float64) * spread)
        return model(seen[-1]).square().mean()

    return loss, seen


@torch.no_grad()
def perturb(adapters: AdapterSet) -> None:
    for p in adapters.parameters():
        p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p)


# -- what they are


def test_gaussian_draws_A_with_deviation_one_over_rank():
    part = attach(nn.Linear(400, 10), LoRA(rank=4, start="gaussian", targets="")).parts("default")[""]
    assert math.isclose(float(part.A.std()), 1 / 4, rel_tol=0.05)
    assert not part.B.any()


def test_orthogonal_starts_with_A_and_B_that_meet_nowhere():
    _, part = part_of("orthogonal")
    assert part.A.abs().min() > 0
    assert part.B.abs().min() > 0
    assert (part.B @ part.A).abs().max() < 1e-16


@pytest.mark.parametrize("start", ["pissa", "pissa_fast"])
def test_pissa_starts_with_the_best_approximation_of_the_weight(start: str):
    layer, part = part_of(start)
    U, S, Vh = torch.linalg.svd(layer.weight)
    best = U[:, :2] @ S[:2].diag() @ Vh[:2]
    close = {"rtol": 0, "atol": 1e-12 if start == "pissa" else 1e-4}
    torch.testing.assert_close(1.5 * part.B @ part.A, best, **close)
    torch.testing.assert_close(part.A.norm(dim=1).square(), S[:2] / 1.5, **close)  # shared evenly
    torch.testing.assert_close(part.B.norm(dim=0).square(), S[:2] / 1.5, **close)


def test_olora_starts_with_the_first_columns_of_Q_and_rows_of_R():
    layer, part = part_of("olora")
    Q, R = torch.linalg.qr(layer.weight)
    assert torch.equal(part.B, Q[:, :2])
    assert torch.equal(part.A, R[:2])


def test_mica_trains_A_alone_on_the_directions_that_the_weight_uses_least():
    layer, part = part_of("mica")
    assert torch.equal(part.B, torch.linalg.svd(layer.weight, full_matrices=False).U[:, -2:])
    assert not part.A.any()
    assert [name for name, _ in part.named_parameters()] == ["A"]


@pytest.mark.parametrize("start", PLAIN)
def test_every_start_of_the_weight_is_the_base_to_the_last_bit(start: str):
    x = torch.randn(3, 6, dtype=torch.float64)
    layer, part = part_of(start)
    running = layer(x)
    weight = layer.weight.clone()
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(running, base)
    assert torch.equal(part.weight_delta(slice(None)), torch.zeros(5, 6, dtype=torch.float64))
    assert torch.equal(layer.weight, weight)


def test_what_a_subtracted_start_computes_is_the_changed_weight_with_B_A():
    layer, part = part_of("pissa")
    A0, B0 = part.A.detach().clone(), part.B.detach().clone()
    with torch.no_grad():
        part.A.add_(torch.randn_like(part.A))
        part.B.add_(torch.randn_like(part.B))
    x = torch.randn(3, 6, dtype=torch.float64)
    W = layer.weight - 1.5 * B0 @ A0 + 1.5 * part.B @ part.A  # PiSSA, equation 4
    torch.testing.assert_close(layer(x), x @ W.T + layer.bias, rtol=0, atol=1e-12)


def test_gradients_of_a_subtracted_start_are_those_of_A_and_B():
    layer, part = part_of("olora")
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        part.A.mul_(1.1)
    layer(x).square().sum().backward()
    A, B = part.A.detach().requires_grad_(), part.B.detach().requires_grad_()
    W = layer.weight + 1.5 * (B @ A - part.B0 @ part.A0)
    (x @ W.T + layer.bias).square().sum().backward()
    torch.testing.assert_close(part.A.grad, A.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(part.B.grad, B.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("start", PLAIN)
def test_experts_start_each_from_its_own_weight(start: str):
    torch.manual_seed(0)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(3, 5, 4).double())
    model = nn.ModuleDict({"experts": layer})
    method = LoRA(rank=2, alpha=3.0, start=start, targets=Targets("experts").parameter("weight"))
    (part,) = attach(model, method, seed=0).parts("default").values()
    alone = nn.Linear(4, 5, bias=False).double()
    for expert in range(3):
        alone.weight.data = layer.weight.data[expert]
        other = attach(alone, LoRA(rank=2, alpha=3.0, start=start, targets=""), seed=0)
        one = other.parts("default")[""]
        mine = part.B[5 * expert : 5 * expert + 5] @ part.A[2 * expert : 2 * expert + 2]
        torch.testing.assert_close(mine, one.B @ one.A, rtol=0, atol=1e-12 if start != "pissa_fast" else 1e-4)
        other.detach()


# -- from data


def test_eva_takes_the_principal_components_of_the_inputs_and_gives_ranks_by_what_they_explain():
    model = two()
    loss, seen = data(model)
    method = LoRA(rank=2, alpha=3.0, start="eva", targets=BOTH).choose(model, loss, batches=3)
    x = torch.cat(seen).flatten(0, 1)
    ratios, vectors = {}, {}
    for name, rows in (("first", x), ("second", torch.tanh(model.first(x)).detach())):
        centred = rows - rows.mean(0)
        _, S, vectors[name] = torch.linalg.svd(centred, full_matrices=False)
        ratios[name] = S.square() / S.square().sum()
    ranked = sorted(((float(v), n) for n in ratios for v in ratios[n][:4]), reverse=True)[:4]
    expected = {name: sum(n == name for _, n in ranked) for name in ratios}
    assert dict(method.rank_pattern) == expected
    adapters = attach(model, method)
    for name, part in adapters.parts("default").items():
        assert not part.B.any()
        assert part.scale == 3 / 2  # as it was before the ranks were given
        signs = (part.A * vectors[name][: len(part.A)]).sum(1, keepdim=True).sign()
        torch.testing.assert_close(
            part.A, signs * vectors[name][: len(part.A)], rtol=0, atol=1e-3
        )  # what was cut off is missing


def test_eva_leaves_out_what_gets_no_rank(tmp_path: Path):
    model = two()
    with torch.no_grad():
        model.first.weight.mul_(1e-3)  # its output, nearly linear in x, spreads as little as x; biases do the rest
    loss, _ = data(model)
    method = LoRA(rank=1, alpha=2.0, start="eva", targets=BOTH).choose(model, loss, batches=2)
    adapters = attach(model, method)
    assert sum(len(part.A) for part in adapters.parts("default").values()) == 2
    assert set(adapters.parts("default")) == set(method.rank_pattern)
    perturb(adapters)
    adapters.save(tmp_path / "a")
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    again = two()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "smidgen" not in k})
    load(again, tmp_path / "a")
    assert torch.equal(again(x), model(x))


def test_eva_finds_what_peft_finds():
    """HF PEFT's own test tolerances: its SVD is randomised and stops when components hardly turn any more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    spread = torch.tensor([2.0**-i for i in range(12)])
    batches = [torch.randn(64, 12, generator=torch.Generator().manual_seed(i)) * spread for i in range(12)]
    config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1))
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), config)
    peft.initialize_lora_eva_weights(
        theirs,
        dataloader=batches,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    source = iter(batches)
    chosen = LoRA(rank=3, start="eva", targets="0").choose(model, lambda: model(next(source)).sum(), batches=12)
    A = attach(model, chosen).parts("default")["0"].A
    cosines = (A * theirs.base_model.model[0].lora_A["default"].weight).sum(1).abs()
    assert cosines.min() > 0.98


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_where_peft_does(mode: str):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5, bias=False))

    x = torch.randn(40, 6).abs()  # HF PEFT divides by the largest entry, we by the largest magnitude
    from peft.tuners.lora.corda import preprocess_corda

    corda = peft.tuners.lora.config.CordaConfig(corda_method=mode)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights="corda", corda_config=corda)
    base = make()
    preprocess_corda(base, config, run_model=lambda: base(x))
    layer = peft.get_peft_model(base, config).base_model.model[0]
    theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    model = make()
    method = LoRA(rank=2, alpha=3.0, start=f"corda_{mode}", targets="0")
    part = attach(model, method.choose(model, lambda: model(x).sum(), batches=1)).parts("default")["0"]
    torch.testing.assert_close(part.B @ part.A, theirs, rtol=1e-3, atol=1e-4)
    assert torch.equal(model(x), make()(x))


def test_corda_keeps_all_of_the_weight_in_its_two_halves():
    model = two()
    W = model.first.weight.detach()
    halves = []
    for start, rank in (("corda_ipm", 2), ("corda_kpm", 3)):
        loss, _ = data(model)
        method = LoRA(rank=rank, alpha=float(rank), start=start, targets="first")
        adapters = attach(model, method.choose(model, loss, batches=2))
        part = adapters.parts("default")["first"]
        halves.append((part.B @ part.A).detach())
        adapters.detach()
    torch.testing.assert_close(sum(halves), W, rtol=0, atol=1e-10)


def test_lora_ga_starts_along_the_gradient_of_the_weight():
    model = two()
    loss, seen = data(model)
    chosen = LoRA(rank=2, alpha=3.0, start="lora_ga", targets=BOTH).choose(model, loss, batches=2)
    model.requires_grad_(True)
    total = sum(model(x).square().mean() for x in seen)
    G = torch.autograd.grad(total, model.second.weight)[0]
    part = attach(model, chosen).parts("default")["second"]
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    size = 4**0.25 / math.sqrt(16)  # theorem 3.2 with gamma = 16
    projector = part.A.T @ part.A / size**2, part.B @ part.B.T / size**2  # whatever the signs
    torch.testing.assert_close(projector[0], Vh[:2].T @ Vh[:2], rtol=0, atol=1e-10)
    torch.testing.assert_close(projector[1], U[:, 2:4] @ U[:, 2:4].T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", ["eva", "corda_ipm", "corda_kpm", "lora_ga"])
def test_choosing_leaves_the_model_as_it_was_and_starts_from_the_base(start: str, tmp_path: Path):
    model = two().train()
    model.first.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    base = model(x)
    loss, _ = data(model)
    chosen = LoRA(rank=2, start=start, targets=BOTH).choose(model, loss, batches=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    adapters = attach(model, chosen)
    assert torch.equal(model(x), base)
    perturb(adapters)
    adapters.save(tmp_path / "a")
    again = two()
    load(again, tmp_path / "a")
    assert torch.equal(again(x), model(x))


def test_a_start_from_data_asks_for_data():
    for start in ("eva", "corda_ipm", "lora_ga"):
        with pytest.raises(ConfigError, match=r"found on data: attach\(model, method.choose\(model, loss\)\)"):
            attach(two(), LoRA(rank=2, start=start))
    with pytest.raises(ConfigError, match="needs no data"):
        LoRA(start="pissa").choose(two(), lambda: torch.zeros(()))


def test_what_data_cannot_say_is_an_error():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    method = LoRA(rank=1, targets=["used", "idle"])
    for start in ("eva", "lora_ga"):
        with pytest.raises(ConfigError, match=r"1 of 2 targets play no part in the loss.*idle"):
            LoRA(rank=1, targets=method.targets, start=start).choose(
                model, lambda: model["used"](torch.ones(4, 3)).sum()
            )
    with pytest.raises(NonFiniteError, match="not finite at used"):
        LoRA(rank=1, start="eva", targets="used").choose(
            model, lambda: model["used"](torch.full((4, 3), math.nan)).sum()
        )
    with pytest.raises(ConfigError, match="all zero"):
        LoRA(rank=1, start="corda_ipm", targets="used").choose(model, lambda: model["used"](torch.zeros(4, 3)).sum())
    with pytest.raises(ConfigError, match="have 1 components, and the ranks come to 3"):
        LoRA(rank=3, start="eva", targets="used").choose(
            model, lambda: model["used"](torch.eye(3)[:2]).sum(), batches=1
        )


def test_components_of_batches_are_those_of_all_rows():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).double() + 3
    found = data_starts.Components(7)
    for rows in x.split(9):
        found.add(rows)
    S = torch.linalg.svdvals(x - x.mean(0))
    torch.testing.assert_close(found.S, S)
    torch.testing.assert_close(found.share, S.square() / S.square().sum())
    assert float(found.share.sum()) == pytest.approx(1)


# -- settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"start": "pisa"}, 'start is "pisa"; it is one of kaiming, gaussian'),
        ({"start": "orthogonal", "rank": 3}, "rank is 3.*has to be even"),
        ({"start": "pissa", "alpha": 0.0}, "alpha is 0.0.*one above 0"),
    ],
)
def test_starts_that_cannot_be_are_refused(settings: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        LoRA(**settings)


def test_a_start_of_the_weight_needs_a_weight_that_has_it():
    with pytest.raises(TargetError, match="takes 4 directions of its weight, which has 3"):
        attach(nn.Linear(3, 5), LoRA(rank=4, start="pissa", targets=""))
    with pytest.raises(TargetError, match="reads the inputs of linear layers"):
        LoRA(rank=2, start="eva", targets="").choose(nn.Conv2d(3, 5, 2), lambda: torch.zeros(()))


# -- Hugging Face PEFT's folders


@pytest.mark.parametrize("start", ["pissa", "olora", "mica", "gaussian", "orthogonal"])
@pytest.mark.parametrize("scale", [{"lora_alpha": 8}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_we_read_what_peft_started(start: str, scale: dict[str, Any]):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=start, **scale)
    from_peft(llama, config)


def test_we_read_pissa_on_transposed_layers_and_refuse_olora_there(tmp_path: Path):
    from_peft(gpt2, peft.LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True))
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        gpt2(),
        peft.LoraConfig(r=3, target_modules=["attn.c_proj"], init_lora_weights="olora", fan_in_fan_out=True),
    )
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(FolderError, match=r"init_lora_weights is olora at .*Conv1D HF PEFT takes something else"):
        load(gpt2(), tmp_path)


@pytest.mark.parametrize(
    ("start", "text"),
    [
        ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "path_initial_model_for_weight_conversion"),
        ("loftq", "the base that LoftQ quantised"),
        ("magic", "cannot be done here.*init_lora_weights = 'magic'"),
    ],
)
def test_what_the_folder_does_not_say_is_refused(start: str, text: str, tmp_path: Path):
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    with pytest.raises(FolderError, match=text):
        load(llama(), tmp_path)


@pytest.mark.parametrize("start", [*PLAIN, "orthogonal"])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_peft_reads_every_start_as_a_plain_lora(start: str, rank_stabilised: bool):
    says = {"init_lora_weights": True, "r": 8 if start in SUBTRACTED else 4}
    method = LoRA(
        rank=4,
        alpha=6.0,
        start=start,
        rank_stabilised=rank_stabilised,
        targets=["*.q_proj", "*.down_proj"],
        rank_pattern={"*.q_proj": 2},
    )
    to_peft_and_back(llama, method, says=says)


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_reads_started_experts(transposed: bool):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Mixture(transposed)

    method = LoRA(rank=2, start="pissa", targets=Targets("experts").parameter("up", "down"))
    to_peft_and_back(make, method, run=run_on(torch.randn(5, 7)))


def test_our_folder_keeps_the_start_so_that_training_goes_on(tmp_path: Path):
    model = llama()
    adapters = attach(model, LoRA(rank=4, start="pissa", targets="*.q_proj"))
    perturb(adapters)
    adapters.save(tmp_path / "a")
    again = llama()
    found = load(again, tmp_path / "a")
    assert found.method("default").start == "pissa"
    assert found.method("default").rank == 4
    for name, part in adapters.parts("default").items():
        other = found.parts("default")[name]
        for tensor in ("A", "B", "A0", "B0"):
            assert torch.equal(getattr(part, tensor), getattr(other, tensor))
    with torch.no_grad():
        assert torch.equal(run_text(again), run_text(model))


def test_a_folder_of_pefts_own_pissa_can_be_saved_again_as_a_plain_one(tmp_path: Path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = llama()
    load(model, tmp_path / "theirs").save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 8
    with torch.no_grad():
        plain = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours"))
        torch.testing.assert_close(run_text(plain.eval()), run_text(model), rtol=0, atol=1e-5)


# -- a bias on B


def test_the_bias_on_B_is_scaled_added_and_merged():
    layer, part = part_of("kaiming", bias_on_B=True)
    x = torch.randn(3, 6, dtype=torch.float64)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), base)
    with torch.no_grad():
        part.B.normal_()
        part.bias.normal_()
    expected = base + 1.5 * (x @ part.A.T @ part.B.T + part.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
def test_peft_has_the_bias_on_B_too(targets: list[str]):
    """Llama's layers have no bias of their own."""
    from_peft(llama, peft.LoraConfig(r=2, target_modules=targets, lora_bias=True))
    to_peft_and_back(llama, LoRA(rank=2, bias_on_B=True, targets=[f"*.{t}" for t in targets]), says={"lora_bias": True})
    from_peft(gpt2, peft.LoraConfig(r=2, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True))


def test_without_a_bias_to_merge_into_the_merge_is_refused_and_nothing_changed():
    from smidgen.core.errors import NotMergeable

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    adapters = attach(model, LoRA(rank=1, bias_on_B=True, targets=["0", "1"]))
    perturb(adapters)
    before = [p.clone() for p in model[0].parameters()]
    with pytest.raises(NotMergeable, match="LoRAAdapter at 1"):
        adapters.merge()
    assert all(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))


def test_balanced_factors_share_singular_values():
    U, S, Vh = torch.linalg.svd(torch.randn(4, 3).double(), full_matrices=False)
    A, B = starts.balanced(U, S, Vh, 2.0)
    torch.testing.assert_close(2 * B @ A, U @ S.diag() @ Vh)
