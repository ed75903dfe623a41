"""A mixed batch in slots: every row as if it ran alone, what is copied and when, and what makes a copy outdated."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen import IA3, AdaLoRA, AdapterSet, LoRA, Rows, Stack, Targets, VeRA, Weighted, adapters_of, attach
from smidgen.core.attach import PLAN
from smidgen.core.composition import Expression, RowsPlan
from smidgen.core.method import Method
from smidgen.core.row_slots import Slots, _width

RANKS = {"a": 2, "b": 2, "c": 1, "d": 3}  # and scales 16 / rank


def perturb(adapters: AdapterSet, *names: str) -> None:
    with torch.no_grad():
        for p in adapters.parameters(*(names or adapters.names)):
            p.add_(0.3 * torch.randn_like(p))


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, AdapterSet]:
    """Two layers, and adapters "a" to "d" of RANKS."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype).eval()
    for name, rank in RANKS.items():
        attach(model, LoRA(rank=rank, targets=["0", "2"]), name)
    adapters = adapters_of(model)
    assert adapters is not None
    perturb(adapters)
    return model, adapters


def thin_plan(model: Any) -> Any:
    plan = model[0].__dict__[PLAN]
    assert isinstance(plan, RowsPlan)
    return plan.thin


def slots_of(model: Any) -> Slots:
    return model[0].smidgen.slots


@torch.no_grad()
def alone(model: nn.Module, adapters: AdapterSet, rows: Rows, x: Tensor) -> Tensor:
    """Each row of x run by itself in a copy of the model."""
    model = copy.deepcopy(model)
    adapters = adapters_of(model)  # type: ignore[assignment]
    repeat, outs = len(x) // len(rows.parts), []
    for i, part in enumerate(rows.parts):
        adapters.activate(part)
        outs.append(model(x[i * repeat : (i + 1) * repeat]))
    return torch.cat(outs)


MIXES = {
    "all different": Rows("a", "b", "c", "d"),
    "as they come": Rows("b", "a", "b", "a"),
    "sorted": Rows("a", "a", "b", "b"),
    "three and one": Rows("a", "a", "a", "b"),
    "with the base": Rows("a", None, "b", None, "c"),
    "one and the base": Rows(None, "c", "c", None),
    "composed": Rows(Stack("a", "b"), Weighted(a=0.5, d=-2.0), None, "a"),
    "a row": Rows("d"),
}


@torch.no_grad()
@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("repeat", [1, 2])
def test_every_row_is_as_if_run_alone(rows: Rows, shape: tuple[int, ...], repeat: int):
    model, adapters = made()
    x = torch.randn(repeat * len(rows.parts), *shape)
    adapters.activate(rows)
    torch.testing.assert_close(model(x), alone(model, adapters, rows, x), rtol=1e-5, atol=1e-5)


def test_a_slot_holds_a_change_for_as_many_rows_as_leave_few_places_empty():
    assert _width((1,) * 32) == 1
    assert _width((8, 8, 8, 8)) == 8
    assert _width((32,)) == 32
    assert _width((1, 1, 1, 29)) == 3  # 10 + 3 slots of 3 rows: 39 places for 32
    assert _width((1, 2)) == 1


@torch.no_grad()
def test_a_base_call_is_shared_by_all_rows_and_a_copy_serves_several_of_them():
    model, adapters = made()
    adapters.activate(Rows("b", "a", "b", "a", None))
    model(torch.randn(5, 3))
    assert slots_of(model).A.shape == (2, 2, 3)
    assert slots_of(model).B.shape == (2, 5, 2)


@torch.no_grad()
def test_smaller_ranks_are_filled_up_with_zeros():
    model, adapters = made()
    adapters.activate(Rows("c", "d"))
    model(torch.randn(2, 3))
    A, B = slots_of(model).A, slots_of(model).B
    c, d = (adapters.parts(name)["0"] for name in "cd")
    assert torch.equal(A, torch.stack([torch.cat([c.A, torch.zeros(2, 3)]), d.A]))
    torch.testing.assert_close(B[1], (16 / 3) / 16 * d.B)  # over the scale of the first
    assert torch.equal(B[0], torch.cat([c.B, torch.zeros(5, 2)], 1))


# -- dtypes


@torch.no_grad()
def test_on_a_bf16_base_the_copies_are_bf16_and_the_parameters_stay_fp32():
    model, adapters = made(torch.bfloat16)
    rows, x = MIXES["all different"], torch.randn(4, 2, 3).bfloat16()
    adapters.activate(rows)
    out = model(x)
    assert out.dtype == slots_of(model).A.dtype == torch.bfloat16
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    torch.testing.assert_close(out, alone(model, adapters, rows, x), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_under_autocast_the_copies_are_of_its_dtype_and_come_back_after_it():
    model, adapters = made()
    rows, x = MIXES["with the base"], torch.randn(5, 3)
    adapters.activate(rows)
    before = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(x)
        assert slots_of(model).A.dtype == torch.bfloat16
        torch.testing.assert_close(inside, alone(model, adapters, rows, x), rtol=0.05, atol=0.05)
    assert torch.equal(model(x), before)


def test_inference_mode_leaves_copies_that_others_can_use():
    model, adapters = made()
    x = torch.randn(2, 3)
    adapters.activate(Rows("a", "b"))
    with torch.inference_mode():
        inside = model(x)
    perturb(adapters, "a")
    with torch.no_grad():
        assert not torch.equal(model(x), inside)
        torch.testing.assert_close(model(x), alone(model, adapters, Rows("a", "b"), x))


@torch.no_grad()
def test_parameters_without_a_version_are_copied_for_every_call():
    model = nn.Sequential(nn.Linear(3, 5)).eval()
    with torch.inference_mode():
        adapters = attach(model, LoRA(rank=2, targets="0"), "a").add(LoRA(rank=2, targets="0"), "b")
        adapters.activate(Rows("a", "b"))
        for p in adapters.parameters("a", "b"):
            p.fill_(0.5)
        x = torch.ones(2, 3)
        before = model(x)
        adapters.parameters("a")[1].fill_(1.0)
        change = model(x) - before
    torch.testing.assert_close(change, torch.tensor([[16 / 2 * 2 * 0.5 * 1.5] * 5, [0.0] * 5]))


# -- what makes a copy outdated


def optimiser_step(model: Any, adapters: AdapterSet) -> None:
    optimizer = torch.optim.AdamW(adapters.parameters("a"), lr=0.1, fused=True)  # raises no version
    with torch.enable_grad():
        model(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained_under_another_composition(model: Any, adapters: AdapterSet) -> None:
    rows = adapters.active
    adapters.activate("a")
    optimiser_step(model, adapters)
    adapters.activate(rows)


def other_data(model: Any, adapters: AdapterSet) -> None:
    for p in adapters.parameters("a"):
        p.data = torch.randn_like(p)


def other_parameter(model: Any, adapters: AdapterSet) -> None:
    part = adapters.parts("a")["0"]
    part.B = nn.Parameter(torch.randn_like(part.B))


def loaded(model: Any, adapters: AdapterSet) -> None:
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


def assigned(model: Any, adapters: AdapterSet) -> None:
    values = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


def replaced(model: Any, adapters: AdapterSet) -> None:
    rows = adapters.active
    adapters.activate(None)
    adapters.delete("a")
    adapters.add(LoRA(rank=2, targets=["0", "2"]), "a")
    perturb(adapters, "a")
    adapters.activate(rows)


def scaled(model: Any, adapters: AdapterSet) -> None:
    adapters.parts("a")["0"].scale = 0.3


CHANGES: list[Callable[[Any, AdapterSet], None]] = [
    *(optimiser_step, trained_under_another_composition, other_data, other_parameter, loaded, assigned, replaced),
    *(scaled, lambda model, adapters: perturb(adapters, "a"), lambda model, adapters: model.to(torch.float64)),
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_parameter_is_noticed(change: Callable[[Any, AdapterSet], None]):
    model, adapters = made()
    rows, x = Rows("a", "b"), torch.randn(2, 3)
    adapters.activate(rows)
    before = model(x)
    change(model, adapters)
    x = x.to(model[0].weight.dtype)  # type: ignore[index]
    after = model(x)
    torch.testing.assert_close(after, alone(model, adapters, rows, x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(after, before)


@torch.no_grad()
def test_a_functional_call_runs_with_the_values_it_was_given():
    model, adapters = made()
    adapters.activate(Rows("a", "b"))
    x = torch.randn(2, 3)
    before = model(x)
    values = {name: torch.randn_like(p) for name, p in model.named_parameters() if ".a." in name}
    given = torch.func.functional_call(model, values, (x,))
    assert torch.equal(model(x), before)
    model.load_state_dict(values, strict=False)
    torch.testing.assert_close(given, model(x))


# -- what is kept


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots that are written, of every layer."""
    found: list[int] = []
    put = Slots._put
    monkeypatch.setattr(Slots, "_put", lambda self, slot, *rest: found.append(slot) or put(self, slot, *rest))
    return found


@torch.no_grad()
def test_of_a_new_composition_only_what_is_not_there_is_copied(written: list[int]):
    model, adapters = made()
    x = torch.randn(3, 3)

    def run(*parts: Expression) -> list[int]:
        written.clear()
        with adapters.rows(parts):
            torch.testing.assert_close(model(x), alone(model, adapters, Rows(*parts), x), rtol=1e-5, atol=1e-5)
            count = len(written)
            model(x)
            assert len(written) == count  # nothing more is copied in a further call
        return written.copy()

    adapters.activate(None)
    assert run("a", "b", "c") == [0, 1, 2] * 2  # of two layers
    assert run("a", "b", "c") == []
    assert run("c", "a", "b") == []  # slots serve rows in any order
    assert run("b", "c", None) == [0] * 2  # two slots, one of which has "b"
    assert run("b", "a", "c") == [2] * 2
    assert run("a", "a", "b") == [0] * 2  # where "c" was, "a" for a second row


@torch.no_grad()
def test_a_row_less_or_more_copies_no_others(written: list[int]):
    model, adapters = made()
    adapters.activate(Rows("a", "b", None))
    model(torch.randn(3, 3))
    written.clear()
    adapters.activate(Rows(None, "b", None))
    model(torch.randn(3, 3))
    assert written == [0] * 2
    perturb(adapters, "b")
    model(torch.randn(3, 3))
    assert written == [0] * 4


@torch.no_grad()
def test_a_larger_rank_that_left_stays_as_zeros_up_to_twice_what_is_needed(written: list[int]):
    model, adapters = made()
    for parts, rank in ((("a", "d"), 3), (("a", "b"), 3), (("c", None), 1)):
        adapters.activate(Rows(*parts))
        x = torch.randn(2, 3)
        torch.testing.assert_close(model(x), alone(model, adapters, Rows(*parts), x), rtol=1e-5, atol=1e-5)
        assert slots_of(model).A.shape[1] == rank


@torch.no_grad()
def test_an_error_while_copying_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch):
    model, adapters = made()
    x = torch.randn(3, 3)
    adapters.activate(Rows("a", "b", None))
    before = model(x)
    perturb(adapters, "a", "b")
    after = alone(model, adapters, Rows("a", "b", None), x)
    zero = torch.Tensor.__setitem__
    calls = iter(range(100))

    def fails(tensor: Tensor, *rest: Any) -> None:
        if next(calls) == 5:
            raise RuntimeError("out of memory")
        zero(tensor, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__setitem__", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x)
    torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, after)


@torch.no_grad()
def test_copies_go_with_the_adapters_they_are_of():
    model, adapters = made()
    layer: Any = model[0]  # type: ignore[index]
    adapters.activate(Rows("a", "b"))
    model(torch.randn(2, 3))
    adapters.activate(None)
    assert slots_of(model).A.numel()
    adapters.delete("c")
    assert layer.smidgen.slots is None
    adapters.activate(Rows("a", "b"))
    model(torch.randn(2, 3))
    adapters.detach()
    assert not hasattr(layer, "smidgen")


@torch.no_grad()
def test_a_renamed_adapter_acts_on_in_its_rows():
    model, adapters = made()
    x = torch.randn(2, 3)
    adapters.activate(Rows("a", "b"))
    before = model(x)
    adapters.rename("a", "z")
    assert adapters.active == Rows("z", "b")
    assert torch.equal(model(x), before)


@torch.no_grad()
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_model_has_no_copies_of_its_own_until_it_runs(way: Callable[[nn.Module], nn.Module]):
    model, adapters = made()
    x = torch.randn(3, 3)
    adapters.activate(Rows("a", None, "b"))
    expected = model(x)
    other = way(model)
    assert not slots_of(other).A.numel()
    assert torch.equal(other(x), expected)
    assert slots_of(other) is thin_plan(other).slots is not slots_of(model)


# -- gradients, dropout, other methods and layers


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_rows_run_alone(rows: Rows, dtype: torch.dtype):
    model, adapters = made(dtype)
    x = torch.randn(len(rows.parts), 2, 3, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(rows.parts), 2, 4, dtype=dtype)
    wanted = [x, *adapters.parameters(*adapters.names)]

    def gradients(out: Tensor) -> Iterator[Tensor]:
        found = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True, retain_graph=True)
        return (torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True))

    adapters.activate(rows)
    mixed = gradients(model(x))
    outs = []
    for i, part in enumerate(rows.parts):
        adapters.activate(part)
        outs.append(model(x[i : i + 1]))
    for ours, theirs in zip(mixed, gradients(torch.cat(outs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_while_adapters_train_each_drops_for_itself():
    model = nn.Sequential(nn.Linear(3, 5))
    attach(model, LoRA(rank=2, dropout=0.5, targets="0"), "a").add(LoRA(rank=2, targets="0"), "b")
    adapters = adapters_of(model)
    assert adapters is not None
    perturb(adapters)
    adapters.activate(Rows("a", "b", None))
    x, base = torch.ones(3, 3), nn.Linear.forward(model[0], torch.ones(3, 3))  # type: ignore[arg-type]
    outs = [model.train()(x) for _ in range(20)]
    assert len({tuple(out[0].tolist()) for out in outs}) > 1
    assert len({tuple(out[1].tolist()) for out in outs}) == 1
    assert torch.equal(outs[0][2], base[2])
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))


METHODS: dict[str, Method] = {
    "lora with a bias": LoRA(rank=2, bias_on_B=True, targets="0"),
    "adalora": AdaLoRA(rank=2, targets="0"),
    "vera": VeRA(rank=4, targets="0"),
    "ia3": IA3(targets="0"),
}


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_changes_of_other_kinds_run_beside_low_rank_ones(method: Method):
    model = nn.Sequential(nn.Linear(3, 5)).eval()
    adapters = attach(model, LoRA(rank=2, targets="0"), "a").add(LoRA(rank=3, targets="0"), "b").add(method, "other")
    perturb(adapters)
    rows, x = Rows("other", "a", None, "b", "other", Stack("other", "a")), torch.randn(6, 2, 3)
    adapters.activate(rows)
    torch.testing.assert_close(model(x), alone(model, adapters, rows, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(3, 5, 2), torch.randn(4, 3, 6)),
        (nn.Embedding(7, 5), torch.randint(7, (4, 2))),
        (nn.Linear(3, 5, bias=False), torch.randn(4, 2, 3).transpose(1, 2).contiguous().transpose(1, 2)),
    ],
    ids=["convolution", "embedding", "strided input"],
)
def test_rows_on_other_layers_and_inputs(layer: nn.Module, x: Tensor):
    model = nn.Sequential(layer).eval()
    adapters = attach(model, LoRA(rank=2, targets="0"), "a").add(LoRA(rank=3, targets="0"), "b")
    perturb(adapters)
    for rows in (Rows("a", "b", None, "a"), Rows("b", "a", "a", "b")):
        adapters.activate(rows)
        torch.testing.assert_close(model(x), alone(model, adapters, rows, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compiled_rows_are_as_eager_also_after_a_change():
    model, adapters = made()
    x = torch.randn(4, 2, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows in (MIXES["all different"], MIXES["composed"], MIXES["three and one"]):
        adapters.activate(rows)
        torch.testing.assert_close(compiled(x), model(x))
        perturb(adapters)
        torch.testing.assert_close(compiled(x), model(x))


# -- a language model


@torch.no_grad()
def test_a_mixed_batch_generates_what_each_row_generates_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=31, pad_token_id=0, bos_token_id=1, **sizes)).eval()
    adapters = attach(model, LoRA(rank=2, targets=Targets("*_proj")), "a")
    for name, rank in (("b", 3), ("c", 2)):
        adapters.add(LoRA(rank=rank, targets=Targets("*_proj")), name)
    perturb(adapters)
    ids = torch.randint(2, 31, (5, 6))
    parts: list[Expression] = ["a", None, "c", "b", "a"]
    for search in ({"num_beams": 1}, {"num_beams": 3}):
        asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True, **search}
        with adapters.rows(parts):
            mixed = model.generate(ids, return_dict_in_generate=True, **asked)
        for i, part in enumerate(parts):
            adapters.activate(part)
            one = model.generate(ids[i : i + 1], return_dict_in_generate=True, **asked)
            assert torch.equal(mixed.sequences[i : i + 1], one.sequences)
            if search["num_beams"] == 1:
                for ours, theirs in zip(mixed.logits, one.logits, strict=True):
                    assert float((ours[i] - theirs[0]).abs().max()) <= 1e-5


@torch.no_grad()
def test_an_error_in_the_middle_of_a_call_leaves_no_trace():
    model, adapters = made()
    x = torch.randn(2, 3)
    before = alone(model, adapters, Rows("a", "b"), x)
    adapters.activate("a")

    def fails(*_: Any) -> None:
        raise RuntimeError("on the way")

    handle = model[1].register_forward_hook(fails)  # type: ignore[index]
    with pytest.raises(RuntimeError, match="on the way"), adapters.rows(["a", "b"]):
        model(x)
    handle.remove()
    assert adapters.active == "a"
    torch.testing.assert_close(model(x[:1]), before[:1])
    with adapters.rows(["a", "b"]):
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
