"""A model held in few bits: which layers, read without the whole ever being in memory, adapted and merged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen import LoRA, Targets, attach
from smidgen.core import quantise as module
from smidgen.core.errors import AttachError, ConfigError, FolderError, MergeError, TargetError
from smidgen.core.fingerprint import fingerprint, fingerprint_as_held, same_base
from smidgen.core.quantise import load_quantised, quantised_of
from smidgen.core.quantised import FORMATS, in_blocks
from smidgen.core.quantised_linear import QuantisedLinear, parameter_count
from smidgen.core.safe import write_tensors
from smidgen.core.storage import storage_of


class Net(nn.Module):
    """An embedding, three linear layers, a norm, a buffer that is kept and one that is not; the head may be tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 11, bias=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("steps", torch.arange(64.0) / 64, persistent=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.up(self.words(x) + self.steps).relu())))


def on_meta(model: nn.Module) -> nn.Module:
    """The model with its parameters on the meta device, tied as they were; buffers stay."""
    empty: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = empty.setdefault(id(p), nn.Parameter(p.detach().to("meta")))
    return model


def saved(model: nn.Module, folder: Path, files: int = 1) -> list[Path]:
    """The model's tensors in safetensors files, tied ones once."""
    tensors = {name: p.detach() for name, p in model.named_parameters()} | {"count": model.count}
    paths = [folder / f"{number}.safetensors" for number in range(files)]
    for number, path in enumerate(paths):
        write_tensors(path, dict(list(tensors.items())[number::files]))
    return paths


def test_linear_layers_outside_the_head_are_held_and_stay_the_same_objects():
    model = Net()
    layers, keys = (model.up, model.down), list(model.state_dict())
    before = parameter_count(model)
    found = smidgen.quantise(model, "nf4")
    assert (model.up, model.down) == layers
    assert [type(layer) for layer in layers] == [QuantisedLinear, QuantisedLinear]
    assert found.layers == ("up", "down")
    assert found.left == {"head": "part of the head"}
    linear = 4 * 2 * 64 * 96
    held = sum(piece.nbytes for layer in layers for piece in layer.pieces.values())
    assert found.plain_bytes - found.size_bytes == linear - held
    assert str(found) == (
        f"2 of 3 linear layers are held as nf4: {found.size_bytes / 1e6:.1f} MB of weights instead of "
        f"{found.plain_bytes / 1e6:.1f} MB"
    )
    assert parameter_count(model) == before
    kept = [key for key in keys if key not in ("up.weight", "down.weight")]
    assert [key for key in model.state_dict() if key in keys] == kept
    assert quantised_of(model).layers == found.layers
    assert quantised_of(Net()) is None


def test_named_layers_are_held_also_the_head():
    model = Net()
    found = smidgen.quantise(model, "int8", targets=["head"])
    assert type(model.head) is QuantisedLinear
    assert found.left == {"up": "not named", "down": "not named"}


def test_a_tied_weight_stays():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3), "z": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert smidgen.quantise(model).layers == ("c",)


@pytest.mark.parametrize(
    ("error", "text", "said"),
    [
        (ConfigError, 'there is no format "nf5"', {"format": "nf5"}),
        (TargetError, '"\\*.upp" matches none of', {"targets": "*.upp"}),
        (TargetError, "LayerNorm is not nn.Linear itself", {"targets": "norm"}),
    ],
)
def test_what_cannot_be_held_is_refused_untouched(error: type[Exception], text: str, said: dict[str, Any]):
    model = Net()
    with pytest.raises(error, match=text):
        smidgen.quantise(model, **said)
    assert quantised_of(model) is None


def test_a_model_without_linear_layers_is_refused_with_what_it_has():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(TargetError, match=r"has no linear layer to quantise: it has 2 Conv2d\. Use it unquantised"):
        smidgen.quantise(model)


def test_a_tied_layer_that_is_named_is_refused():
    with pytest.raises(TargetError, match="head: its weight is tied to another layer's"):
        smidgen.quantise(Net(tied=True), targets="head")


def test_the_names_of_the_pieces_are_those_of_the_state_dict():
    model = Net()
    smidgen.quantise(model, "int8")
    names = [f"{path}.{name}" for path in ("up", "down") for name in model.get_submodule(path).pieces]
    assert names == ["up.packed", "up.scales", "down.packed", "down.scales"]
    assert set(names) <= set(model.state_dict())


def test_under_adapters_it_is_refused():
    model = Net()
    attach(model, LoRA(rank=2, targets=["up"]))
    with pytest.raises(AttachError, match=r"up: adapters live there\. Quantise the base first, then attach"):
        smidgen.quantise(model)


def test_twice_is_refused_with_the_reason():
    model = Net()
    smidgen.quantise(model)
    with pytest.raises(TargetError, match="QuantisedLinear is not nn"):
        smidgen.quantise(model)


def test_the_fingerprint_is_stable_and_agrees_with_the_unquantised_base():
    model = Net()
    plain = fingerprint(model)
    smidgen.quantise(model)
    held = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == held
    assert same_base(plain, held)
    assert held.split("-")[2] == "?"
    model.words.weight.data.add_(1)
    assert not same_base(plain, fingerprint(model))


def test_a_run_tells_quantised_bases_apart_and_finds_one_that_is_quantised_again():
    def held(path: str = "", scale: float = 1.0, name: str = "nf4") -> str:
        model = copy.deepcopy(plain)
        if path:
            model.get_submodule(path).weight.data.mul_(scale)
        smidgen.quantise(model, name)
        return fingerprint_as_held(model)

    plain = Net()
    before = fingerprint_as_held(plain)
    assert before == fingerprint(plain)
    assert held() == held()
    assert not same_base(before, held())
    # scales alone, codes, a plain layer beside them, an embedding, a norm, the format
    others = [held("up", 1.01), held("up", torch.linspace(0.9, 1.1, 64)), held("head", 1.01), held("words", 1.01)]
    others += [held("norm", 1.01), held(name="int8"), held("down", 1.01, "int8")]
    assert len({held(), *others}) == 1 + len(others)
    model = copy.deepcopy(plain)
    smidgen.quantise(model)
    attach(model, LoRA(rank=2, targets=["up", "head"]))
    assert fingerprint_as_held(model) == held()


def test_the_scales_are_the_same_whatever_the_number_of_threads():
    W = torch.randn(2048, 2048).abs_()
    pieces, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pieces.append(FORMATS["nf4"].quantised((2048, 2048), in_blocks(W), W.device))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(piece, pieces[0][name]) for other in pieces for name, piece in other.items())


# -- reading


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_read_from_files_it_equals_the_model_quantised_in_memory(name: str, files: int, tied: bool, tmp_path: Path):
    model = Net(tied).eval()
    paths = saved(model, tmp_path, files)
    read = on_meta(copy.deepcopy(model))
    found = load_quantised(read, paths, name)
    assert found == smidgen.quantise(model, name)
    x = torch.arange(6).view(2, 3) % 11
    assert torch.equal(read(x), model(x))
    assert not any(t.is_meta for t in [*read.parameters(), *read.buffers()])
    assert (read.head.weight is read.words.weight) == tied


def test_a_body_is_read_from_a_file_with_its_head_and_the_other_way_round(tmp_path: Path):
    model = Net()
    model.base_model_prefix = "body"
    write_tensors(tmp_path / "f.safetensors", {f"body.{name}": t.detach() for name, t in model.state_dict().items()})
    read = on_meta(copy.deepcopy(model))
    assert load_quantised(read, [tmp_path / "f.safetensors"], "int8") is not None
    assert torch.equal(read.norm.weight, model.norm.weight)


def test_parameters_get_the_dtype_that_the_model_has_and_weights_are_read_in_it(tmp_path: Path):
    model = Net()
    paths = saved(model, tmp_path)
    read = on_meta(copy.deepcopy(model).to(torch.bfloat16))
    load_quantised(read, paths, "nf4")
    assert {p.dtype for p in read.parameters()} == {torch.bfloat16}
    assert read.up.weight.dtype == torch.bfloat16
    expected = smidgen.quantise(model, "nf4") and model.up.packed
    assert torch.equal(read.up.packed, expected)  # of what the file says, not of what 16 bits make of it


def test_all_weights_that_are_quantised_pass_through_one_memory_as_large_as_the_largest(tmp_path: Path, monkeypatch):
    model = Net()
    paths = saved(model, tmp_path)
    passed: list[tuple[int, int]] = []  # where, how large
    whole: list[str] = []
    into, reads = module.read_into, module.read_tensors

    def counted(memory: Tensor, *args: Any) -> Tensor:
        passed.append((memory.data_ptr(), memory.nbytes))
        return into(memory, *args)

    def noted(path: Path, header: Any, names: list[str]) -> dict[str, Tensor]:
        whole.extend(names)
        return reads(path, header, names)

    monkeypatch.setattr(module, "read_into", counted)
    monkeypatch.setattr(module, "read_tensors", noted)
    read = on_meta(copy.deepcopy(model))
    load_quantised(read, paths, "nf4")
    assert len(passed) == 2
    assert set(passed) == {(passed[0][0], model.up.weight.nbytes)}
    assert sorted(whole) == sorted({*model.state_dict()} - {"up.weight", "down.weight"})
    held = sum(t.nbytes for t in [*read.parameters(), *read.buffers()])
    assert held == smidgen.quantise(model, "nf4").size_bytes


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_files_with_other_names_or_shapes_are_left_to_others_and_nothing_is_changed(change: str, tmp_path: Path):
    model = Net()
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    if change == "missing":
        del tensors["down.weight"]
    elif change == "unknown":
        tensors["other.weight"] = torch.zeros(2)
    else:
        tensors["up.weight"] = torch.zeros(2, 3)
    write_tensors(tmp_path / "f.safetensors", tensors)
    read = on_meta(model)
    assert load_quantised(read, [tmp_path / "f.safetensors"], "nf4") is None
    assert all(p.is_meta for p in read.parameters())


def test_a_damaged_file_is_an_error(tmp_path: Path):
    (tmp_path / "f.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      more")
    with pytest.raises(FolderError, match="has 4 bytes of data, its header describes 0"):
        load_quantised(on_meta(Net()), [tmp_path / "f.safetensors"], "nf4")


# -- merging


def tuned(name: str, size: float = 0.1) -> tuple[Net, smidgen.AdapterSet, Tensor]:
    """A quantised model with an adapter whose update is of this size, and its output."""
    model = Net().eval()
    smidgen.quantise(model, name)
    adapters = attach(model, LoRA(rank=2, alpha=2.0, targets=Targets("up", "down")), seed=0)
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(size * torch.randn_like(p))
    return model, adapters, model(torch.arange(11)[None])


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_merging_into_the_same_format_refuses_to_lose_the_update_and_says_what_to_do(name: str):
    model, adapters, running = tuned(name, 0.03)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(MergeError) as error:
        adapters.merge()
    text = str(error.value)
    assert f"rounding to {name} would lose up to " in text
    assert "2 of 2 sites above max_error=0.05" in text
    assert 'make plain layers with merge(into="dense")' in text
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert torch.equal(model(torch.arange(11)[None]), running)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_where_it_is_allowed_the_report_says_what_was_lost_at_every_site(name: str):
    model, adapters, _ = tuned(name, 1.0)
    wanted = {
        site.name: (
            site.weight(),
            site.weight() + adapters.parts("default")[site.name].weight_delta(slice(None)).detach(),
        )
        for site in adapters.sites("default")
    }
    report = adapters.merge(max_error=10.0)
    assert set(report.errors) == {"up", "down"}
    for path, (old, new) in wanted.items():
        layer = model.get_submodule(path)
        assert type(layer) is QuantisedLinear
        lost = float((layer.dense(slice(None)) - new).norm() / (new - old).norm())
        assert report.errors[path] == pytest.approx(lost, rel=1e-4)
        assert 0 < lost < 0.2


@pytest.mark.parametrize("name", ["nf4", "int8"])
@torch.no_grad()
def test_merging_into_dense_gives_the_plain_model_that_ran(name: str):
    model, adapters, running = tuned(name)
    smidgen_keys = list(Net().state_dict())
    report = adapters.merge(into="dense")
    assert report.worst < 1e-6
    assert list(model.state_dict()) == smidgen_keys
    assert {type(m) for m in model.modules()} == {Net, nn.Embedding, nn.Linear, nn.LayerNorm}
    assert torch.allclose(model(torch.arange(11)[None]), running, atol=1e-5)


def test_merging_into_another_dtype_reports_its_rounding_and_makes_the_whole_model_so():
    model, adapters, _ = tuned("nf4")
    report = adapters.merge(into="dense", dtype=torch.bfloat16, max_error=0.5)
    assert 1e-3 < report.worst < 0.5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_dense_merge_that_is_refused_leaves_the_layers_quantised():
    model, adapters, running = tuned("nf4", 0.01)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(MergeError, match="rounding to bfloat16 would lose"):
        adapters.merge(into="dense", dtype=torch.bfloat16)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert torch.equal(model(torch.arange(11)[None]), running)
    assert type(adapters.detach().up) is QuantisedLinear


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"into": "plain"}, 'into is "plain"; it is "same" or "dense"'),
        ({"dtype": torch.float32}, "dtype is of plain layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(said: dict[str, Any], text: str):
    _, adapters, _ = tuned("nf4")
    with pytest.raises(AttachError, match=text):
        adapters.merge(**said)


def test_another_adapter_stays_on_the_layers_that_become_plain():
    model, adapters, _ = tuned("nf4")
    adapters.add(LoRA(rank=2, targets=Targets("up")), "other", seed=1)
    adapters.merge("default", into="dense")
    adapters.activate("other")
    assert adapters.names == ["other"]
    model(torch.arange(11)[None]).sum().backward()
    assert type(adapters.detach().up) is nn.Linear


# -- other libraries' layers


def test_bitsandbytes_layers_are_read_adapted_and_merged_into_plain_ones():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain = nn.Linear(128, 96)
    layer = bitsandbytes.nn.Linear4bit(128, 96, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer.to("cpu"))
    assert storage_of(layer.weight).name == "bitsandbytes 4-bit"
    _merges(model, plain, 0.12)


def test_bitsandbytes_eight_bits_are_merged_into_plain_layers_also_after_a_call():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain = nn.Linear(128, 96)
    layer = bitsandbytes.nn.Linear8bitLt(128, 96, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer.to("cpu"))
    adapters = attach(model, LoRA(rank=2, targets=["0"]), seed=0)
    model(torch.randn(4, 128))
    adapters.merge(into="dense")
    assert type(model[0]) is nn.Linear
    assert (model[0].weight - plain.weight).norm() <= 0.02 * plain.weight.norm()


def test_torchaos_tensors_are_read_adapted_and_merged_into_plain_ones():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain = nn.Linear(128, 96)
    model = nn.Sequential(copy.deepcopy(plain))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert storage_of(model[0].weight).name == "torchao"
    _merges(model, plain, 0.02)


def _merges(model: nn.Sequential, plain: nn.Linear, error: float) -> None:
    adapters = attach(model, LoRA(rank=2, targets=["0"], start="pissa"), seed=0)
    W = adapters.sites("default")[0].weight()
    assert W.shape == plain.weight.shape
    assert (W - plain.weight).norm() <= error * plain.weight.norm()
    with torch.no_grad():
        for p in adapters.parameters():
            p += 0.1 * torch.randn_like(p)
        x = torch.randn(4, 128)
        running = model(x)
        with pytest.raises(MergeError, match=r'merge\(into="dense"\)'):
            adapters.merge()
        adapters.merge(into="dense")
        assert type(model[0]) is nn.Linear
        assert (model(x) - running).norm() <= 2e-3 * running.norm()
