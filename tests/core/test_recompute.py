"""Recompute: the same gradients to the bit, less kept, undone without a trace."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import smidgen
from smidgen import LoRA, LoReFT
from smidgen.core.errors import AttachError, ConfigError, TargetError
from smidgen.core.recompute import _calls, blocks_of, kept_bytes, recompute
from smidgen.training.memory import kept_for_backward

LEVELS = ("cheap", "all")


def llama(**changed) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **{**sizes, **changed})).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=20, **sizes), add_pooling_layer=False).eval()


class Block(nn.Module):
    """One that no table knows, with all that is hard: dropout, statistics, changes in place, an output read twice."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        g = torch.sigmoid(h)
        h.mul_(2)  # read by the line above, and then changed
        y = self.down(self.dropout(torch.tanh(h) * g))
        y.add_(0.5)  # changed before anybody reads it
        return x + self.norm(y.relu())


class Tower(nn.Module):
    def __init__(self, dropout: float = 0.0, cls: type = nn.ModuleList):
        super().__init__()
        self.layers, self.head = cls([Block(dropout), Block(dropout), Block(dropout)]), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tower(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return Tower(dropout)


IDS = torch.arange(14).reshape(2, 7) % 20
MODELS = {
    "llama": (llama, lambda model: model(input_ids=IDS, labels=IDS).loss),
    "llama, eager attention": (
        lambda: llama(attn_implementation="eager"),
        lambda model: model(input_ids=IDS, labels=IDS).loss,
    ),
    "bert": (bert, lambda model: model(input_ids=IDS).last_hidden_state.square().mean()),
    "tower": (tower, lambda model: model(torch.linspace(-1, 1, 30).reshape(5, 6)).square().mean()),
}


def gradients(model: nn.Module, loss, seed: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    torch.default_generator.manual_seed(seed)
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert any(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("trained", ["all", "lora", "lora with dropout"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_the_same_to_the_bit(kind, level, trained):
    build, loss = MODELS[kind]
    model = build()
    if trained != "all":
        smidgen.attach(model, LoRA(rank=2, dropout=0.3 if "dropout" in trained else 0.0), seed=0)
        model.apply(lambda m: nn.init.normal_(m.B) if hasattr(m, "B") else None)
    plain = gradients(model, loss)
    with recompute(model, level):
        assert_equal(gradients(model, loss), plain)
    assert_equal(gradients(model, loss), plain)
    assert not list(_calls)  # nothing stays when the graph is gone


@pytest.mark.parametrize("level", LEVELS)
def test_it_acts_in_eval_mode_and_in_training_mode(level):
    model, loss = llama(), MODELS["llama"][1]
    for mode in (False, True):
        model.train(mode)
        whole = kept_for_backward(model, lambda: loss(model))
        with recompute(model, level):
            assert kept_for_backward(model, lambda: loss(model)) < 0.8 * whole


def test_all_keeps_the_inputs_of_blocks_and_cheap_what_is_dear_too():
    """Of a block of BERT: its input; q, k, v, attention, its output, up and down: 6 D + F, and what attention sums."""
    model, x = bert().requires_grad_(False), torch.randn(3, 5, 16, requires_grad=True)
    tokens = 15

    def run():
        return model.encoder(x).last_hidden_state

    with recompute(model, "all"):
        assert kept_for_backward(model, run) == 4 * 2 * tokens * 16
    with recompute(model, "cheap"):
        sums = 4 * 3 * 2 * 5  # (B, H, T)
        dear = 4 * tokens * (6 * 16 + 40) + sums
        assert kept_for_backward(model, run) == 4 * 2 * tokens * 16 + 2 * dear


def test_products_of_low_rank_and_scores_that_are_written_out_are_computed_again():
    class Layer(nn.Module):
        def forward(self, x):  # (B, T, 2)
            scores = torch.bmm(x, x.transpose(1, 2))  # (B, T, T), T = 40
            return x + torch.bmm(scores.tanh(), x).sin()

    model, x = nn.ModuleList([Layer()]), torch.randn(3, 40, 2, requires_grad=True)
    with recompute(model, "cheap", blocks=["0"]):
        output = model[0](x)
        assert kept_bytes() == 4 * 3 * 40 * 2  # the second product alone
        output.sum().backward()
    found, x.grad = x.grad, None
    model[0](x).sum().backward()
    assert torch.equal(found, x.grad)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_random_numbers_go_on_as_they_would(level, dropout):
    model, x = tower(dropout).train(), torch.randn(5, 6)
    states = []
    for chosen in ("off", level):
        with recompute(model, chosen):
            torch.default_generator.manual_seed(3)
            model(x).sum().backward()
            states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("level", LEVELS)
def test_running_statistics_move_once(level):
    model, x = tower().train(), torch.randn(5, 6)
    other = copy.deepcopy(model)
    other(x).sum().backward()
    with recompute(model, level):
        model(x).sum().backward()
    for name, buffer in other.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize("level", LEVELS)
def test_what_acted_in_the_forward_acts_in_the_backward_whatever_was_switched_since(level):
    model = bert()
    adapters = smidgen.attach(model, LoRA(rank=2), "a", seed=0)
    adapters.add(LoRA(rank=3), "b", seed=1)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    loss = MODELS["bert"][1]

    def found(switch) -> list[Tensor | None]:
        model.zero_grad()
        with adapters.rows(["a", "b"]):
            value = loss(model)
        switch()
        value.backward()
        return [None if p.grad is None else p.grad.clone() for p in adapters.parameters()]

    plain = found(lambda: None)
    with recompute(model, level):
        again = found(lambda: adapters.activate(None))
    assert all(map(torch.equal, again, plain))
    assert adapters.active is None


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("first", ["adapters", "recompute"])
def test_adapters_at_a_block_come_before_or_after(level, first):
    model, loss = llama(), MODELS["llama"][1]
    method = LoReFT(rank=2, targets=("model.layers.0", "model.layers.2"))
    if first == "adapters":
        adapters = smidgen.attach(model, method, seed=0)
        handle = recompute(model, level)
    else:
        handle = recompute(model, level)
        adapters = smidgen.attach(model, method, seed=0)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    found = gradients(model, loss)
    handle.undo()
    assert_equal(found, gradients(model, loss))
    adapters.detach()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_it_is_undone_without_a_trace_and_gives_back_what_stood_there():
    model = tower()
    own = model.layers[1].forward
    model.layers[1].forward = own  # as accelerate does
    before = [dict(module.__dict__) for module in model.modules()]
    with recompute(model, "all"):
        assert type(model.layers[0].__dict__["forward"]).__name__ == "_Recomputing"
        model(torch.randn(5, 6)).sum().backward()
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_a_graph_that_is_alive_stays_right_when_it_is_undone():
    model, loss = bert(), MODELS["bert"][1]
    plain = gradients(model, loss)
    model.zero_grad()
    with recompute(model, "cheap"):
        value = loss(model)
    value.backward()
    assert_equal({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, plain)


def test_a_backward_may_be_repeated():
    model, loss = bert(), MODELS["bert"][1]
    plain = gradients(model, loss)
    for level in LEVELS:
        model.zero_grad()
        with recompute(model, level):
            value = loss(model)
            value.backward(retain_graph=True)
            model.zero_grad()
            value.backward()
        assert_equal({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, plain)


def test_copies_and_pickles_recompute_by_themselves():
    model, x = tower(), torch.randn(5, 6)
    plain = gradients(model, lambda m: m(x).sum())
    recompute(model, "all")
    file = io.BytesIO()
    pickle.dump(model, file)
    for other in (copy.deepcopy(model), pickle.loads(file.getvalue())):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2)  # of the copy alone
        assert other.layers[0].__dict__["forward"].block is other.layers[0]
        assert not torch.equal(other(x), model(x))
    assert_equal(gradients(model, lambda m: m(x).sum()), plain)


@pytest.mark.parametrize("level", LEVELS)
def test_a_cache_that_a_model_makes_by_itself_is_left_out_and_one_with_tokens_is_read(level):
    model = llama()
    with torch.no_grad():
        first = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    expected = model(input_ids=IDS[:, 4:], past_key_values=copy.deepcopy(first)).logits
    with recompute(model, level):
        assert torch.equal(model(input_ids=IDS[:, 4:], past_key_values=copy.deepcopy(first)).logits, expected)
        assert model(input_ids=IDS).past_key_values.get_seq_length() == 0
        with torch.no_grad():
            assert model(input_ids=IDS).past_key_values.get_seq_length() == 7


@pytest.mark.parametrize("level", LEVELS)
def test_autocast_is_as_it_was(level):
    model, loss = bert(), MODELS["bert"][1]

    def under_autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model)

    plain = gradients(model, under_autocast)
    with recompute(model, level):
        assert_equal(gradients(model, under_autocast), plain)


def test_blocks_are_found_by_structure_else_in_lists_of_like_modules():
    assert blocks_of(llama()) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert blocks_of(tower()) == ["layers.0", "layers.1", "layers.2"]
    assert blocks_of(Tower(cls=lambda blocks: nn.Sequential(*blocks))) == ["layers.0", "layers.1", "layers.2"]
    assert blocks_of(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))) == []


def test_what_cannot_be_is_said():
    model = tower()
    with pytest.raises(ConfigError, match='level is "some"; there are: off, cheap, all'):
        recompute(model, "some")
    with pytest.raises(ConfigError, match='offload="cpu" moves the inputs of blocks, and goes with level "all"'):
        recompute(model, "cheap", offload="cpu")
    with pytest.raises(ConfigError, match=r"moves what is kept from a GPU to the memory of the host; this .* on cpu"):
        recompute(model, "all", offload="cpu")
    with pytest.raises(TargetError, match=r"Tower has no layers\.7"):
        recompute(model, blocks=["layers.0", "layers.7"])
    with pytest.raises(TargetError, match=r"no blocks are recognised in Linear.*recompute\(model, blocks="):
        recompute(nn.Linear(3, 5))
    with recompute(model), pytest.raises(AttachError, match="these blocks recompute already; call undo"):
        recompute(model, "all")


@pytest.mark.parametrize("level", LEVELS)
def test_a_compiled_model_recomputes_too(level):
    model, x = bert().requires_grad_(False), torch.randn(3, 5, 16)
    adapters = smidgen.attach(model, LoRA(rank=2), seed=0)
    loss = lambda m: m(inputs_embeds=x).last_hidden_state.square().mean()  # noqa: E731
    plain = gradients(model, loss)
    with recompute(model, level):
        compiled = torch.compile(model, backend="aot_eager")
        found = gradients(model, lambda _: loss(compiled))
    assert len(found) == len(adapters.parameters())
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)


class Written(torch.autograd.Function):
    """x W with a product into a buffer, a change of it by another product, and one of several tensors together."""

    @staticmethod
    def forward(ctx, x, W):
        buffer, other = x.new_empty(len(x), W.shape[1]), torch.mm(x, W)
        torch.mm(x, W, out=buffer)
        torch._foreach_mul_([other], 2.0)
        other.addmm_(x, W, beta=0.5)  # 2 x W
        ctx.save_for_backward(buffer, other, W)
        return buffer + other  # 3 x W

    @staticmethod
    def backward(ctx, dy):
        buffer, other, W = ctx.saved_tensors
        return (dy * buffer * other) @ W.T, None


def test_products_into_buffers_and_changes_of_several_tensors_are_computed_again():
    class Layer(nn.Module):
        def forward(self, x):
            return Written.apply(x, torch.linspace(-1, 1, 12).reshape(4, 3)).tanh()

    model, x = nn.ModuleList([Layer()]), torch.randn(5, 4, requires_grad=True)
    (plain,) = torch.autograd.grad(model[0](x).sum(), x)
    with recompute(model, "cheap", blocks=["0"]):
        assert torch.equal(torch.autograd.grad(model[0](x).sum(), x)[0], plain)
