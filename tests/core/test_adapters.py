"""The handle: names, what acts, adding, renaming, removing, and what it refuses."""

import copy

import pytest
import torch
from torch import Tensor, nn

from smidgen import AdapterSet, Head, LoRA, Rows, Stack, Targets, Weighted, adapters_of, attach
from smidgen.core.errors import AttachError, TargetError


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))


def perturb(adapters: AdapterSet) -> None:
    with torch.no_grad():
        for p in adapters.parameters(*adapters.names):
            p.add_(torch.randn_like(p))


@pytest.fixture
def model() -> nn.Sequential:
    return make()


@pytest.fixture
def adapters(model: nn.Sequential) -> AdapterSet:
    """ "style" and "steer", away from their start."""
    found = attach(model, LoRA(rank=2), "style").add(LoRA(rank=1, targets="0"), "steer")
    perturb(found)
    return found


X = torch.linspace(-1, 1, 6).view(2, 3)


# -- what is there


def test_attach_gives_the_one_handle_of_the_model(model: nn.Sequential):
    assert adapters_of(model) is None
    adapters = attach(model, LoRA(), "style")
    assert attach(model, LoRA(), "steer") is adapters is adapters_of(model)
    assert adapters.model is model
    assert adapters.names == ["style", "steer"]
    assert "style" in adapters
    assert "other" not in adapters


def test_the_first_adapter_acts_at_once_and_a_further_one_waits(model: nn.Sequential):
    adapters = attach(model, LoRA(), "style")
    assert adapters.active == "style"
    adapters.add(LoRA(), "steer")
    assert adapters.active == "style"


def test_the_handle_shows_what_it_holds(adapters: AdapterSet):
    assert repr(adapters) == "AdapterSet(Sequential; style: lora, steer: lora; active: 'style')"
    lines = adapters.report().splitlines()
    assert lines[0].startswith('"style": lora, 34 parameters, 2 sites holding 44 of 54 parameters (81.5%)')
    assert any(line.startswith('"steer": lora, 8 parameters, 1 sites') for line in lines)
    assert adapters.report("steer").count("lora,") == 1
    assert adapters.method("steer") == LoRA(rank=1, targets=adapters.method("steer").targets)
    assert [site.name for site in adapters.sites("style")] == ["0", "2"]


def test_parameters_are_those_of_the_active_adapters_or_of_the_named(adapters: AdapterSet):
    count = {"style": 2 * (3 + 5) + 2 * (5 + 4), "steer": 3 + 5}
    assert sum(p.numel() for p in adapters.parameters()) == count["style"]
    assert sum(p.numel() for p in adapters.parameters("steer")) == count["steer"]
    adapters.activate(Stack("style", Weighted(steer=2, style=1)))
    assert sum(p.numel() for p in adapters.parameters()) == sum(count.values())
    adapters.activate(None)
    assert adapters.parameters() == []
    assert [name for name, _ in adapters.named_parameters("steer")] == ["0.A", "0.B"]


# -- names


@pytest.mark.parametrize("name", ["", " ", " style", "style ", "a.b", "a/b", "a@b", "a\\b", ".."])
def test_a_name_that_could_not_stand_in_a_key_or_path_is_refused(model: nn.Sequential, name: str):
    with pytest.raises(AttachError, match="is no name for an adapter"):
        attach(model, LoRA(), name)
    assert adapters_of(model) is None
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "name", ["weight", "training", "forward", "get", "lora", "base_layer", "0", "päivä", "a-b c", "style:2"]
)
def test_any_other_name_will_do(model: nn.Sequential, name: str):
    adapters = attach(model, LoRA(rank=2), name)
    perturb(adapters)
    running = model(X)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), running)
    adapters.activate(None)
    assert not torch.equal(model(X), running)


def test_a_name_is_taken_once(adapters: AdapterSet):
    with pytest.raises(AttachError, match=r'has an adapter "style" already: choose another name, or adapters.delete'):
        adapters.add(LoRA(), "style")
    with pytest.raises(AttachError, match='has an adapter "style" already'):
        adapters.rename("steer", "style")


def test_an_unknown_name_is_an_error_that_says_the_nearest(adapters: AdapterSet):
    for ask in (adapters.activate, adapters.delete, adapters.sites, adapters.merge, adapters.parameters):
        with pytest.raises(
            AttachError, match=r'no adapter "stile" in this model; it has style, steer. Did you mean "style"\?'
        ):
            ask("stile")
    assert adapters.active == "style"


# -- what acts


def test_an_unknown_name_anywhere_in_an_expression_changes_nothing(adapters: AdapterSet):
    before = adapters.model(X)
    for expression in (Stack("style", "x"), Weighted(style=1, x=2), Rows("x", None)):
        with pytest.raises(AttachError, match='no adapter "x"'):
            adapters.activate(expression)
        assert adapters.active == "style"
        assert torch.equal(adapters.model(X), before)


def test_rows_end_with_their_context_also_after_an_error(adapters: AdapterSet):
    adapters.activate(Stack("style", "steer"))
    before = adapters.model(X)

    def fail_in_context() -> None:
        with adapters.rows(["style", None]):
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail_in_context()
    assert adapters.active == Stack("style", "steer")
    assert torch.equal(adapters.model(X), before)


def test_an_adapter_acts_only_where_it_lives(adapters: AdapterSet):
    adapters.activate("steer")
    assert [layer._smidgen_plan is None for layer in (adapters.model[0], adapters.model[2])] == [False, True]


def test_within_off_the_base_answers_and_afterwards_what_was_active(adapters: AdapterSet):
    adapters.activate(Stack("style", "steer"))
    acting = adapters.model(X)
    with adapters.off():
        assert torch.equal(adapters.model(X), base_output(adapters.model))
    assert adapters.active == Stack("style", "steer")
    assert torch.equal(adapters.model(X), acting)


# -- removing and renaming


def test_deleting_the_active_adapter_leaves_the_base_active(adapters: AdapterSet):
    adapters.activate("steer")
    adapters.delete("steer")
    assert adapters.active is None
    assert adapters.names == ["style"]
    assert torch.equal(adapters.model(X), base_output(adapters.model))


def test_deleting_one_leaves_the_others_as_they_act(adapters: AdapterSet):
    before = adapters.model(X)
    adapters.delete("steer")
    assert torch.equal(adapters.model(X), before)
    assert not any("steer" in key for key in adapters.model.state_dict())


def test_an_adapter_that_acts_among_others_is_not_deleted(adapters: AdapterSet):
    adapters.activate(Stack("style", "steer"))
    with pytest.raises(AttachError, match=r'"steer" acts in Stack.*activate something without it first'):
        adapters.delete("steer")


def test_deleting_the_last_gives_the_base_back(adapters: AdapterSet):
    model = adapters.model
    adapters.delete("style")
    adapters.delete("steer")
    assert type(model[0]) is nn.Linear
    assert adapters_of(model) is None
    assert all(p.requires_grad for p in model.parameters())
    assert adapters.names == []
    assert attach(model, LoRA(), "again").names == ["again"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("style", "manner"),
        ("steer", "steer"),
        (Stack("steer", "style"), Stack("steer", "manner")),
        (Weighted(style=0.5, steer=2), Weighted(manner=0.5, steer=2)),
        (Rows("style", None), Rows("manner", None)),
        (None, None),
    ],
    ids=repr,
)
def test_a_renamed_adapter_does_what_it_did_and_stays_active(adapters: AdapterSet, before, after):
    adapters.activate(before)
    output, own = adapters.model(X), adapters.parameters("style")
    adapters.rename("style", "manner")
    assert adapters.names == ["manner", "steer"]
    assert adapters.active == after
    assert all(one is other for one, other in zip(adapters.parameters("manner"), own, strict=True))
    assert torch.equal(adapters.model(X), output)


def test_detach_gives_back_which_parameters_were_trained(model: nn.Sequential):
    model[2].requires_grad_(False)
    adapters = attach(model, LoRA())
    assert not any(p.requires_grad for layer in (model[0], model[3]) for p in layer.parameters(recurse=False))
    adapters.detach()
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]


def test_detaching_while_rows_run_apart_leaves_no_trace(model: nn.Sequential):
    adapters = attach(model, LoRA(rank=2, targets=Targets("0").parameter("weight")))
    adapters.activate(Rows("default", None))
    adapters.detach()
    assert type(model) is nn.Sequential
    assert [key for key in model.__dict__ if "smidgen" in key] == []
    assert list(model.state_dict()) == list(make().state_dict())


# -- refusals that change nothing


def test_adapters_of_a_part_and_of_the_whole_do_not_mix():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 5)), nn.Linear(5, 2))
    attach(model[0], LoRA(targets="0"))
    with pytest.raises(AttachError, match=r"0\.0: adapters live there that were attached to another model"):
        attach(model, LoRA(targets=Targets.of_type(nn.Linear)))
    assert adapters_of(model) is None
    assert attach(model, LoRA(targets="1")).names == ["default"]


def test_a_place_that_is_both_target_and_head_is_refused(model: nn.Sequential):
    with pytest.raises(AttachError, match='adapter "default" would live twice at 3: it is both a target and a head'):
        attach(model, LoRA(targets=["0", "3"], heads=("3",)))
    assert type(model[0]) is nn.Linear


def test_auto_leaves_out_what_is_trained_whole(model: nn.Sequential):
    adapters = attach(model, LoRA(heads="2"))
    assert [site.name for site in adapters.sites("default")] == ["0", "2"]
    assert "left out 2: trained whole, as a head" in adapters.report()


def test_a_head_that_is_not_there_is_refused(model: nn.Sequential):
    with pytest.raises(TargetError, match='"clasifier" matches none of 5 modules'):
        attach(model, LoRA(heads="clasifier"))
    assert type(model[0]) is nn.Linear


# -- seeds


def test_a_start_depends_on_the_seed_alone():
    torch.manual_seed(5)
    one = attach(make(), LoRA(rank=2), seed=1).parameters()
    torch.manual_seed(6)
    two = attach(make(), LoRA(rank=2), seed=1).parameters()
    other = attach(make(), LoRA(rank=2), seed=2).parameters()
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], other[0])


def test_without_a_seed_the_global_generator_is_drawn_from():
    starts = []
    for _ in range(2):
        torch.manual_seed(5)
        starts.append(attach(make(), LoRA(rank=2)).parameters()[0])
    assert torch.equal(*starts)


# -- heads beside an adapter


def test_heads_travel_with_the_adapter_and_the_base_keeps_its_own(model: nn.Sequential):
    own = model[3].weight.detach().clone()
    adapters = attach(model, LoRA(rank=2, targets="0", heads=("3",)), "style")
    assert [site.name for site in adapters.sites("style")] == ["0", "3"]
    assert [name for name, _ in adapters.named_parameters()] == ["0.A", "0.B", "3.module.weight", "3.module.bias"]
    perturb(adapters)
    running = model(X)
    assert torch.equal(model[3].weight, own)
    adapters.activate(None)
    assert not torch.equal(model(X), running)
    adapters.activate("style")
    adapters.merge()
    torch.testing.assert_close(model(X), running)
    assert not torch.equal(model[3].weight, own)


def test_two_adapters_have_heads_of_their_own_in_one_batch(model: nn.Sequential):
    adapters = attach(model, LoRA(rank=2, targets="0", heads=("3",)), "one")
    adapters.add(Head(targets="3"), "two")
    perturb(adapters)
    with adapters.rows(["one", "two"]):
        mixed = model(X)
    for row, name in enumerate(("one", "two")):
        adapters.activate(name)
        torch.testing.assert_close(mixed[row], model(X)[row])


def base_output(model: nn.Sequential) -> Tensor:
    plain = make()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "smidgen" not in key})
    return plain(X)
