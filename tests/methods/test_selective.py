"""Selective tuning: scores and choice against a naive computation in float64; each grain and criterion on models."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen import Targets, Weighted, attach
from smidgen.adapters import AdapterSet, load
from smidgen.core.errors import ConfigError, NonFiniteError, TargetError
from smidgen.core.importance import gradient_scores
from smidgen.methods.lora import LoRA
from smidgen.methods.selective import By, Grain, Selective, SelectiveAdapter, SelectiveChosen

Loss = Callable[[], Tensor]
ALL_BY: list[By] = ["fisher", "gradient", "magnitude", "last"]
ALL_GRAINS: list[Grain] = ["weights", "tensors", "layers"]


def mlp() -> nn.Sequential:
    """78 parameters in the body, 15 in the head."""
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.LayerNorm(4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    )


BODY, TOTAL = (5 * 7 + 7) + (7 * 4 + 4) + 4, (5 * 7 + 7) + (7 * 4 + 4) + 4 + (4 * 3 + 3)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.depthwise = nn.Conv2d(6, 6, 2, groups=3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.dropout(self.norm(self.conv(x)).relu()))
        return self.head(x.mean((2, 3)))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    return transformers.BertForSequenceClassification(config).eval()


def loss_of(model: nn.Module, shape: tuple[int, ...] = (6, 5), classes: int = 3, repeat: int = 8) -> Loss:
    """The loss of the next of some fixed batches."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    batches = []
    for _ in range(repeat):
        x = torch.randn(shape, generator=generator).to(dtype)
        batches.append((x, torch.randint(classes, shape[:1], generator=generator)))
    cycle = itertools.cycle(batches)

    def loss() -> Tensor:
        x, y = next(cycle)
        return F.cross_entropy(model(x), y)

    return loss


def bert_loss(model: nn.Module) -> Loss:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (8, 4, 7), generator=generator)
    labels = (ids < 25).sum(2).gt(3).long()
    cycle = itertools.cycle(range(8))

    def loss() -> Tensor:
        i = next(cycle)
        return model(input_ids=ids[i], labels=labels[i]).loss

    return loss


def counts(method: SelectiveChosen, model: nn.Module) -> dict[str, int]:
    """How many entries are chosen of each parameter."""
    return {
        site.name: site.stored.numel()
        if (indices := method.chosen[site.path, site.parameter]) is None
        else len(indices)
        for site in method.resolve(model).sites
    }


def flat_indices(method: SelectiveChosen, model: nn.Module) -> Tensor:
    """The chosen entries as indices into all parameters of the model, one after another."""
    found, offset = [], 0
    for name, p in model.named_parameters():
        path, _, own = name.rpartition(".")
        if (path, own) in method.chosen:
            indices = method.chosen[path, own]
            found.append(offset + (torch.arange(p.numel()) if indices is None else indices))
        offset += p.numel()
    return torch.cat(found)


def part(adapters: AdapterSet, site: str) -> SelectiveAdapter:
    found = adapters.parts("default")[site]
    assert isinstance(found, SelectiveAdapter)
    return found


def randomise(adapters: AdapterSet) -> None:
    for p in adapters.parameters():
        p.data = torch.randn_like(p)


def naive_scores(model: nn.Module, loss: Loss, batches: int, by: By) -> dict[str, Tensor]:
    """The scores of the body by their definition, in the model's own dtype: float64."""
    named = {name: p for name, p in model.named_parameters() if not name.startswith("5.")}
    gradients = [torch.autograd.grad(loss(), list(named.values())) for _ in range(batches)]
    stacked = {name: torch.stack([g[i] for g in gradients]).flatten(1) for i, name in enumerate(named)}
    return {name: g.square().sum(0) if by == "fisher" else g.sum(0).abs() for name, g in stacked.items()}


# -- the choice


@pytest.mark.parametrize("by", ["fisher", "gradient"])
def test_scores_are_those_of_a_naive_computation_in_float64(by: By) -> None:
    model = mlp().double()
    expected = naive_scores(model, loss_of(model), 5, by)
    sites, scores = gradient_scores(model, Selective().candidates(model)[0], loss_of(model), 5, squared=by == "fisher")
    assert [site.name for site in sites] == list(expected)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("by", ["fisher", "gradient"])
@pytest.mark.parametrize("budget", [0.02, 0.3, 0.6])
def test_the_largest_scores_of_the_whole_model_are_chosen(by: By, budget: float) -> None:
    model = mlp().double()
    flat = torch.cat(list(naive_scores(model, loss_of(model), 8, by).values()))
    expected = flat.topk(math.floor(budget * TOTAL)).indices.sort().values
    method = Selective(budget=budget, by=by).choose(model, loss_of(model))
    assert torch.equal(flat_indices(method, model), expected)


def test_batches_of_one_row_give_the_fisher_of_rows_and_larger_ones_mix_in_the_mean_gradient() -> None:
    """E[g_B^2] = F / B + (1 - 1 / B) m^2, checked over all ordered batches of B = 2 rows drawn with replacement."""
    model = mlp().double().eval()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    sites = Selective().candidates(model)[0]

    def squares(rows: list[list[int]]) -> Tensor:
        cycle = iter(rows)

        def loss() -> Tensor:
            batch = next(cycle)
            return F.cross_entropy(model(x[batch]), y[batch])

        scores = gradient_scores(model, sites, loss, len(rows), squared=True)[1]
        return torch.cat(list(scores.values())) / len(rows)

    fisher, whole = squares([[i] for i in range(4)]), squares([[0, 1, 2, 3]])  # of rows, and of their mean gradient
    pairs = squares([[i, j] for i in range(4) for j in range(4)])
    torch.testing.assert_close(pairs, fisher / 2 + whole / 2)


@pytest.mark.parametrize("by", ALL_BY)
@pytest.mark.parametrize("budget", [0.011, 0.07, 0.29, 1.0])
def test_single_weights_use_the_budget_up(by: By, budget: float) -> None:
    model = mlp()
    method = Selective(budget=budget, by=by).choose(model, loss_of(model))
    expected = min(math.floor(round(budget * TOTAL, 9)), BODY)
    assert sum(counts(method, model).values()) == expected
    assert sum(p.numel() for p in attach(model, method).parameters()) == expected


def test_a_share_is_what_it_says_in_decimal() -> None:
    model = nn.Sequential(nn.Linear(9, 10), nn.LayerNorm(5, bias=False), nn.LayerNorm(5, bias=False))  # 110 parameters
    assert Selective(budget=0.3).limit(model) == 33  # 0.3 * 110 is 32.99... in floating point
    assert Selective(budget=0.31).limit(model) == 34


@pytest.mark.parametrize("by", ALL_BY)
@pytest.mark.parametrize("grain", ["tensors", "layers"])
def test_tensors_and_layers_are_chosen_whole_and_within_the_budget(by: By, grain: Grain) -> None:
    model = mlp()
    method = Selective(budget=0.5, by=by, grain=grain).choose(model, loss_of(model))
    assert 0 < sum(counts(method, model).values()) <= 0.5 * TOTAL
    assert set(method.chosen.values()) == {None}
    if grain == "layers":
        for path in {path for path, _ in method.chosen}:
            own = {name for name, _ in model.get_submodule(path).named_parameters()}
            assert {name for at, name in method.chosen if at == path} == own


def test_tensors_are_taken_by_their_mean_score_while_they_fit() -> None:
    model = mlp()
    for value, p in zip((0.5, 2.0, -3.0, 1.0, 4.0), model.parameters(), strict=False):
        nn.init.constant_(p, value)  # 0.weight 35, 0.bias 7, 2.weight 28, 2.bias 4, 3.weight 4
    method = Selective(budget=0.2, by="magnitude", grain="tensors")  # 18 entries: 4, then 28 does not fit
    assert counts(method.choose(model), model) == {"0.bias": 7, "2.bias": 4, "3.weight": 4}


def test_the_last_layers_are_taken_without_a_gap() -> None:
    model = mlp()
    last = Selective(budget=0.4, by="last", grain="layers").choose(model)  # 37 entries: 4, then 32
    assert counts(last, model) == {"2.weight": 28, "2.bias": 4, "3.weight": 4}
    some = Selective(budget=0.1, by="last", grain="weights").choose(model)  # 9 entries: 4, 4, and the last of 28
    assert counts(some, model) == {"2.weight": 1, "2.bias": 4, "3.weight": 4}
    assert some.chosen["2", "weight"].tolist() == [27]
    with pytest.raises(ConfigError, match=r"allows 2, and the last of the layers, 3.weight, has 4: say budget=0.0434"):
        Selective(budget=0.03, by="last", grain="layers").choose(model)


def test_equal_scores_are_decided_by_the_order_of_the_model() -> None:
    model = mlp()
    for p in model.parameters():
        nn.init.ones_(p)
    model[0].weight.data[6, 4] = 2
    method = Selective(budget=0.5, by="magnitude").choose(model)  # 46 entries
    assert counts(method, model) == {"0.weight": 35, "0.bias": 7, "2.weight": 4}
    assert method.chosen["0", "weight"] is None  # all of it
    assert method.chosen["2", "weight"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 13, 40, 77, 78])
def test_the_choice_is_that_of_a_stable_sort_of_everything(dtype: torch.dtype, limit: int) -> None:
    model = mlp().to(dtype)
    for p in model.parameters():
        p.data = torch.randint(-3, 4, p.shape).to(dtype) * 1.5e-3  # many ties, zeros and both signs
    flat = torch.cat([p.detach().abs().flatten() for p in list(model.parameters())[:-2]])
    expected = flat.sort(descending=True, stable=True).indices[:limit].sort().values
    method = Selective(budget=(limit + 0.5) / TOTAL, by="magnitude").choose(model)
    assert torch.equal(flat_indices(method, model), expected)


def test_choosing_leaves_the_model_as_it_was() -> None:
    model = Cnn()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.conv.weight.grad = gradient = torch.ones_like(model.conv.weight)
    state = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    loss = loss_of(model, (4, 3, 8, 8), 2)
    first = Selective(budget=0.1).choose(model, loss, batches=8)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv.bias"]
    assert model.conv.weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.norm.weight.grad is None
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    again = Selective(budget=0.1).choose(model, loss, batches=8)
    assert first.chosen.keys() == again.chosen.keys()
    for place, indices in first.chosen.items():
        assert indices is again.chosen[place] or torch.equal(indices, again.chosen[place])


def test_a_model_stays_as_it_was_when_its_loss_fails() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)

    def broken() -> Tensor:
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        Selective().choose(model, broken)
    assert model.training
    assert not model[0].weight.requires_grad
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_only_one_gradient_is_there_at_a_time() -> None:
    model, seen = mlp(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: seen.append(sum(q.grad is not None for q in model.parameters())))
    Selective(budget=0.1).choose(model, loss_of(model), batches=1)
    assert seen == [1] * 5


def test_sparse_gradients_of_embeddings_are_scored() -> None:
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.tensor([2, 2, 5])
    method = Selective(budget=0.2, targets="0").choose(
        model, lambda: F.cross_entropy(model(x), torch.tensor([0, 1, 1]))
    )
    assert method.chosen["0", "weight"].tolist()[-6:] == [
        6,
        7,
        8,
        15,
        16,
        17,
    ]  # rows 2 and 5; the rest are ties of zero


# -- what may be chosen


def test_heads_are_left_out() -> None:
    model = bert()
    sites, left_out = Selective().candidates(model)
    assert left_out == {"classifier.weight": "part of the head", "classifier.bias": "part of the head"}
    assert {site.name for site in sites} == {name for name, _ in model.bert.named_parameters(prefix="bert")}
    _, left_out = Selective(targets="*", heads=("pooler",)).candidates(model)
    assert set(left_out) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_targets_restrict_the_choice() -> None:
    model = bert()
    method = Selective(targets=["attention.self.*", "*.LayerNorm"], by="magnitude", budget=1.0).choose(model)
    names = {name for name, _ in model.named_parameters() if ".attention.self." in name or "LayerNorm" in name}
    assert {site.name for site in method.resolve(model).sites} == names
    one = Selective(targets=Targets("*.query").parameter("weight"), by="magnitude", budget=1.0).choose(model)
    assert {site.name for site in one.resolve(model).sites} == {
        f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(2)
    }
    with pytest.raises(TargetError, match="Name the modules that own them"):
        Selective(targets="encoder.layer.0", by="last").choose(model)
    with pytest.raises(TargetError, match="matches none"):
        Selective(targets="*.qery", by="last").choose(model)


def test_tied_tensors_are_left_out_with_the_reason() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[2].weight = model[0].weight
    sites, left_out = Selective().candidates(model)
    assert [site.name for site in sites] == ["1.weight", "1.bias"]
    assert left_out["0.weight"] == "0.weight and 2.weight are one tied tensor; one cannot change alone"
    assert Selective(budget=0.5).limit(model) == (9 * 4 + 4 * 4 + 4) // 2
    with pytest.raises(TargetError, match=r"leaves no parameter of Sequential.*one tied tensor"):
        Selective(targets="0", by="last").choose(model)


def test_integer_weights_are_refused_with_the_reason() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(torch.ones(7, 5, dtype=torch.int8), requires_grad=False)
    _, left_out = Selective().candidates(model)
    assert left_out["0.weight"].startswith("held as Parameter of torch.int8; only plain floating point")


def test_data_driven_criteria_say_that_they_need_the_loss() -> None:
    for by in ("fisher", "gradient"):
        with pytest.raises(ConfigError, match=rf'by "{by}" needs the loss.*method.choose\(model, loss\)'):
            attach(mlp(), Selective(by=by))


def test_wrong_settings_and_losses_are_refused() -> None:
    for wrong, message in (({"budget": 0}, "budget is 0"), ({"by": "size"}, "fisher"), ({"grain": "rows"}, "layers")):
        with pytest.raises(ConfigError, match=message):
            Selective(**wrong)
    model = mlp()
    with pytest.raises(
        ConfigError, match=r"budget of 0.001 of 93 parameters allows 0, and an entry is 1: say budget=0.0109 or more"
    ):
        Selective(budget=0.001, by="magnitude").choose(model)
    with pytest.raises(ConfigError, match="without a gradient"):
        Selective().choose(model, lambda: torch.tensor(1.0))
    with pytest.raises(ConfigError, match="depends on no candidate"):
        Selective().choose(model, lambda: model[5](torch.ones(4)).sum())
    with pytest.raises(NonFiniteError, match="loss of batch 0 is nan"):
        Selective().choose(model, lambda: loss_of(model)() * math.nan)
    with pytest.raises(NonFiniteError, match=r"not finite at 0\.weight"):
        Selective().choose(
            model,
            lambda: model(torch.ones(1, 5)).sum() * 0 + model[0].weight[0, 0].sub(model[0].weight[0, 0].item()).sqrt(),
        )
    with pytest.raises(ConfigError, match="meta device"):
        Selective(by="magnitude", budget=0.5).choose(mlp().to("meta"))


def test_a_choice_of_another_model_is_refused() -> None:
    method = Selective(by="magnitude", budget=0.5).choose(mlp())
    with pytest.raises(TargetError, match="Choose again"):
        attach(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2)), method)


# -- attached


@pytest.mark.parametrize("by", ALL_BY)
@pytest.mark.parametrize("grain", ALL_GRAINS)
def test_every_grain_and_criterion_starts_as_the_base_and_merges_to_what_runs(by: By, grain: Grain) -> None:
    model, x = Cnn().eval(), images()
    base, state = model(x), copy.deepcopy(model.state_dict())
    adapters = attach(model, Selective(budget=0.4, by=by, grain=grain).choose(model, loss_of(model, (4, 3, 8, 8), 2)))
    assert torch.equal(model(x), base)
    randomise(adapters)
    running = model(x)
    assert not torch.allclose(running, base)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    adapters.merge()
    torch.testing.assert_close(model(x), running)


@pytest.mark.parametrize("by", ALL_BY)
@pytest.mark.parametrize("grain", ALL_GRAINS)
def test_bert_starts_as_the_base_trains_and_merges(by: By, grain: Grain) -> None:
    model = bert()
    loss = bert_loss(model)
    method = Selective(budget=0.3, by=by, grain=grain, heads=("classifier",)).choose(model, loss, batches=2)
    ids = torch.randint(50, (3, 7))
    base = model(ids).logits
    adapters = attach(model, method)
    assert torch.equal(model(ids).logits, base)
    loss().backward()
    adapters.check_gradients()
    randomise(adapters)
    running = model(ids).logits
    adapters.merge()
    torch.testing.assert_close(model(ids).logits, running, rtol=1e-4, atol=1e-4)


def test_only_the_chosen_entries_change_and_only_they_have_optimiser_state() -> None:
    model = mlp()
    method = Selective(budget=0.2).choose(model, loss_of(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = attach(model, method)
    optimiser = torch.optim.AdamW(adapters.parameters(), lr=0.1)
    loss = loss_of(model)
    for _ in range(3):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    state = sum(t.numel() for moments in optimiser.state.values() for t in moments.values() if t.ndim)
    assert state == 2 * math.floor(0.2 * TOTAL)  # two moments of each chosen entry
    names = [site.name for site in adapters.sites("default")]
    adapters.merge()
    for name, p in model.named_parameters():
        path, _, own = name.rpartition(".")
        changed = (p != before[name]).flatten().nonzero().flatten()
        if name not in names:
            assert not len(changed)
        elif (indices := method.chosen[path, own]) is not None:
            assert torch.equal(changed, indices)


@pytest.mark.parametrize(("optimiser", "rate"), [(torch.optim.SGD, 0.5), (torch.optim.AdamW, 0.1)])
def test_a_few_steps_reduce_the_loss(optimiser: Callable[..., torch.optim.Optimizer], rate: float) -> None:
    model, x = mlp(), torch.randn(64, 5)
    y = (x[:, 0] > 0).long() + (x[:, 1] > x[:, 2]).long()

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    adapters = attach(model, Selective(budget=0.1).choose(model, loss, batches=1))
    steps, before = optimiser(adapters.parameters(), lr=rate), loss().item()
    for _ in range(30):
        steps.zero_grad()
        loss().backward()
        steps.step()
    assert loss().item() < 0.8 * before


def test_bfloat16_weights_keep_fp32_values() -> None:
    model, x = mlp().bfloat16(), torch.randn(6, 5).bfloat16()
    base = model(x)
    adapters = attach(model, Selective(budget=0.3).choose(model, loss_of(model)))
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    assert torch.equal(model(x), base)
    randomise(adapters)
    assert model(x).dtype == torch.bfloat16


class Reader(nn.Module):
    """Reads the parameters of modules that it never calls, and of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scales = nn.ParameterList([torch.ones(4)])
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.GRU(4, 4)
        self.own = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.inner.weight, self.inner.bias) * self.scales[0] + self.own
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.recurrent(x)[0]


def test_parameters_are_reached_where_their_owner_is_never_called() -> None:
    model = nn.Sequential(Reader(), nn.Linear(4, 3))
    x = torch.randn(5, 2, 4)
    method = Selective(budget=1.0).choose(model, lambda: model(x).square().mean())
    places = set(method.chosen)
    assert {("0", "inner.weight"), ("0", "scales.0"), ("0", "own"), ("0.attention", "out_proj.weight")} <= places
    assert {("0.attention", "out_proj.bias"), ("0.recurrent", "weight_hh_l0")} <= places
    adapters = attach(model, method)
    model(x).square().mean().backward()
    adapters.check_gradients()
    randomise(adapters)
    with torch.no_grad():
        running = model(x)
        adapters.merge()
        torch.testing.assert_close(model(x), running)


def test_without_data_lists_and_attentions_are_reached_too() -> None:
    model = nn.Sequential(Reader(), nn.Linear(4, 3))
    places = set(Selective(by="magnitude", budget=1.0).choose(model).chosen)
    assert {("0", "scales.0"), ("0.attention", "out_proj.weight"), ("0.attention", "in_proj_weight")} <= places


def test_parameters_that_the_loss_does_not_reach_are_not_chosen() -> None:
    model = Cnn()
    model.unused = nn.Linear(2, 2)
    method = Selective(budget=1.0).choose(model, loss_of(model, (4, 3, 8, 8), 2))
    assert not any(path == "unused" for path, _ in method.chosen)


def test_it_composes_with_lora_and_weights() -> None:
    model, x = mlp(), torch.randn(6, 5)
    adapters = attach(model, Selective(budget=0.3, by="magnitude"), "default")
    adapters.add(LoRA(rank=2, targets="0"), "style")
    base = model(x)
    randomise(adapters)
    whole = model[0](x)
    adapters.activate(Weighted(default=0.5, style=1.0))
    torch.testing.assert_close(model[0](x), (whole + F.linear(x, model[0].weight, model[0].bias)) / 2)
    adapters.detach()
    assert torch.equal(model(x), base)


def test_the_base_is_scored_beside_another_adapter() -> None:
    model = mlp()
    alone = Selective(budget=0.3).choose(model, loss_of(model))
    adapters = attach(model, LoRA(rank=2, targets="0"), "style")
    beside = Selective(budget=0.3).choose(model, loss_of(model))
    assert torch.equal(flat_indices(beside, adapters.detach()), flat_indices(alone, model))


def test_rows_of_a_batch_can_have_it_or_not() -> None:
    model, x = mlp(), torch.randn(2, 5)
    base = model(x)
    adapters = attach(model, Selective(budget=0.3, by="magnitude"))
    randomise(adapters)
    changed = model(x)
    with adapters.rows(["default", None]):
        torch.testing.assert_close(model(x), torch.stack([changed[0], base[1]]))


def test_compiles_without_a_graph_break_forward_and_backward() -> None:
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), torch.randn(6, 5)
    adapters = attach(model, Selective(budget=0.3, by="magnitude"))
    randomise(adapters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    gradients = [p.grad.clone() for p in adapters.parameters()]
    for p in adapters.parameters():
        p.grad = None
    model(x).sum().backward()
    for p, gradient in zip(adapters.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_merging_in_blocks_of_rows_gives_the_whole() -> None:
    model = mlp()
    adapters = attach(model, Selective(budget=0.4, by="gradient").choose(model, loss_of(model)))
    randomise(adapters)
    for site in adapters.sites("default"):
        W = site.linear.read_rows(site.stored.detach(), slice(None))
        whole, _ = part(adapters, site.name).merged(W, None, slice(None))
        blocks = [slice(i, i + 2) for i in range(0, len(W), 2)]
        parts = [part(adapters, site.name).merged(W[rows], None, rows)[0] for rows in blocks]
        assert torch.equal(torch.cat(parts), whole)


# -- saved


@pytest.mark.parametrize("grain", ALL_GRAINS)
def test_a_saved_adapter_needs_neither_data_nor_a_choice(grain: Grain, tmp_path: Path) -> None:
    model, fresh, third = (nn.Sequential(Reader(), nn.Linear(4, 3)).eval() for _ in range(3))
    for other in (fresh, third):
        other.load_state_dict(model.state_dict())
    x = torch.randn(5, 2, 4)
    method = Selective(budget=0.3, grain=grain).choose(model, lambda: model(x).square().mean())
    adapters = attach(model, method)
    randomise(adapters)
    adapters.save(tmp_path / "saved")
    again = load(fresh, tmp_path / "saved")
    assert torch.equal(fresh(x), model(x))
    assert again.method("default").settings() == {"budget": 0.3, "by": "fisher", "grain": grain}
    for name, tensors in again.parts("default").items():
        place = next(place for place in method.chosen if ".".join(place) == name)
        indices = method.chosen[place]
        assert set(dict(tensors.state_dict())) == ({"values"} if indices is None else {"indices", "values"})
        assert indices is None or torch.equal(tensors.get_buffer("indices"), indices.int())
    attach(third, again.method("default"))  # the choice goes on to another model of the kind
    assert counts(again.method("default"), third) == counts(method, model)


def test_sizes_come_from_tensors_without_memory() -> None:
    model = mlp()
    site = Selective().candidates(model)[0][0]
    sized = Selective().with_tensors({site: {"indices": torch.empty(4, dtype=torch.int32, device="meta")}})
    assert sized.chosen["0", "weight"].is_meta
    assert sized.chosen["0", "weight"].shape == (4,)
    whole = Selective().with_tensors({site: {"values": torch.empty(7, 5, device="meta")}})
    assert whole.build(site).values.shape == (7, 5)


@pytest.mark.parametrize(
    "wrong",
    [[0, 35], [-1, 3], [3, 2], [2, 2], [], [[1, 2]], [0.5], list(range(36))],
    ids=["beyond the end", "negative", "unsorted", "twice", "none", "matrix", "fraction", "too many"],
)
def test_indices_of_a_file_that_cannot_be_are_refused(wrong: list[float]) -> None:
    site = Selective().candidates(mlp())[0][0]  # 0.weight: 35 entries
    with pytest.raises(ConfigError, match=r"0.weight are not sorted, different whole numbers below 35.*\(7, 5\)"):
        Selective().with_tensors({site: {"indices": torch.tensor(wrong), "values": torch.ones(2)}})


def test_a_copy_of_the_model_gives_the_same() -> None:
    model, x = mlp(), torch.randn(6, 5)
    adapters = attach(model, Selective(budget=0.2, by="magnitude"))
    randomise(adapters)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
