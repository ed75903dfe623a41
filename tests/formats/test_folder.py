"""What is saved comes back bit for bit, the same adapter gives the same bytes, and what does not fit is named."""

import copy
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from smidgen import Head, LoRA, Rows, Stack, Targets, Weighted, attach
from smidgen.adapters import AdapterSet, adapters_of, load
from smidgen.core.errors import AttachError, FolderError
from smidgen.core.method import Method
from smidgen.formats.read import read_extra
from smidgen.methods.bitfit import BitFit
from smidgen.methods.bottleneck import Bottleneck
from smidgen.methods.ia3 import IA3
from smidgen.methods.prefix_tuning import PrefixTuning
from smidgen.methods.prompt_tuning import PromptTuning
from smidgen.methods.selective import Selective

from .golden import IDS, Example, example, write
from .models import Attention, Mixture, Net, llama, llama_classifier

GOLDEN = Path(__file__).parent / "golden"

METHODS: dict[str, tuple[type[nn.Module], Method]] = {
    "lora": (Net, LoRA(rank=2, targets=["words", "conv", "image", "grouped", "up"], dropout_on="features")),
    "lora, experts": (Mixture, LoRA(rank=2, targets=Targets("experts").parameter("up", "out"))),
    "lora, attention": (Attention, LoRA(rank=2, targets=Targets("attention").parameter("in_proj_weight"))),
    "lora, a head": (Example, LoRA(rank=2, targets="first", heads=("classifier",), rank_pattern={"f*": 3})),
    "head": (Example, Head(targets="classifier")),
    "ia3": (Net, IA3(targets=["conv", "image", "up"], feedforward=("image",))),
    "bitfit": (Net, BitFit()),
    "bottleneck": (llama, Bottleneck(reduction_factor=4, placement="both")),
    "prefix": (llama, PrefixTuning(length=3)),
    "prefix, reparametrised": (llama, PrefixTuning(length=3, reparametrisation=6)),
    "prompt": (llama, PromptTuning(length=3, init="text", init_ids=(3, 4))),
    "selective": (Example, Selective(budget=0.3, by="magnitude", heads=("classifier",))),
    "selective, tensors": (Example, Selective(budget=0.5, by="last", grain="tensors")),
}


def trained(adapters: AdapterSet) -> AdapterSet:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters(*adapters.names):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return adapters


def same_tensors(one: AdapterSet, other: AdapterSet, name: str = "default", other_name: str = "default") -> None:
    ours = {site: part.state_dict() for site, part in one.parts(name).items()}
    theirs = {site: part.state_dict() for site, part in other.parts(other_name).items()}
    assert ours.keys() == theirs.keys()
    for site, tensors in ours.items():
        assert tensors.keys() == theirs[site].keys()
        assert all(torch.equal(tensor, theirs[site][key]) for key, tensor in tensors.items())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", METHODS)
def test_every_method_comes_back_bit_for_bit_with_its_settings(case: str, tmp_path: Path) -> None:
    make, method = METHODS[case]
    model = make()
    base = copy.deepcopy(model)
    adapters = trained(attach(model, method, seed=0))
    adapters.save(tmp_path / "a")
    again = load(base, tmp_path / "a")
    same_tensors(adapters, again)
    assert all(parameter.requires_grad for parameter in again.parameters())
    settings, found = adapters.method("default").settings(), again.method("default").settings()
    differ = {name for name in settings if settings[name] != found[name]}
    assert differ <= {"rank_pattern", "feedforward"}  # patterns come back as the places that they meant
    again.save(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_the_golden_folder_of_every_format_is_still_read() -> None:
    for folder in sorted(GOLDEN.iterdir()):
        model = Example()
        adapters = load(model, folder)
        assert adapters.active == Stack("style", "scale")
        expected = torch.tensor([[1.8539478778839111, 0.5757399797439575], [1.8524785041809082, 0.5720446109771729]])
        torch.testing.assert_close(model(IDS), expected)
        adapters.activate("shift")
        expected = torch.tensor([[2.2768325805664062, -1.8373603820800781], [3.4668350219726562, -1.8101463317871094]])
        torch.testing.assert_close(model(IDS), expected)
        assert read_extra(folder) == {"labels": ["no", "yes"]}
        for name in adapters.names:
            same_tensors(example(), adapters, name, name)


@pytest.mark.parametrize("golden", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_a_damaged_tensor_is_found_in_every_format(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "style", tmp_path / "a")
    with open(tmp_path / "a" / "adapter_model.safetensors", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1")
    model = Example()
    with pytest.raises(FolderError, match=r"1 of \d+ tensors: .* is damaged"):
        load(model, tmp_path / "a")
    assert adapters_of(model) is None


def test_what_is_read_is_built_once_and_has_memory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = trained(attach(Example(), LoRA(rank=2, targets=["first", "second"], heads=("classifier",)), seed=0))
    adapters.save(tmp_path / "a")
    built: list[str] = []
    build = LoRA.build
    monkeypatch.setattr(LoRA, "build", lambda self, site: (built.append(site.name), build(self, site))[1])
    again = load(Example(), tmp_path / "a")
    assert built == ["first", "second"]
    same_tensors(adapters, again)
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in again.parameters()}) == 6
    assert {(type(p), p.requires_grad) for p in again.parameters()} == {(nn.Parameter, True)}


def test_this_release_writes_the_newest_golden_folder_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "now")
    assert bytes_of(tmp_path / "now") == bytes_of(max(GOLDEN.iterdir()))


def test_a_single_adapter_is_at_the_root_and_takes_another_name(tmp_path: Path) -> None:
    adapters = trained(attach(Example(), LoRA(rank=2, targets="first"), "style", seed=0))
    adapters.activate(Weighted(style=0.5))
    adapters.save(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "smidgen.json",
    ]
    model = Example()
    again = load(model, tmp_path / "a", "manner")
    assert again.active == Weighted(manner=0.5)
    assert torch.equal(model(IDS), adapters.model(IDS))


def test_of_several_one_can_be_saved_and_one_can_be_loaded(tmp_path: Path) -> None:
    adapters = example()
    adapters.save(tmp_path / "one", "scale")
    assert load(Example(), tmp_path / "one").names == ["scale"]
    adapters.save(tmp_path / "all")
    again = load(Example(), tmp_path / "all", "scale")
    assert again.names == ["scale"]
    assert again.active == "scale"
    with pytest.raises(FolderError, match='no adapter "polite"; it has scale, shift, style'):
        load(Example(), tmp_path / "all", "polite")
    with pytest.raises(AttachError, match="polite"):
        adapters.save(tmp_path / "none", "polite")


def test_rows_of_one_batch_are_not_kept_as_a_composition(tmp_path: Path) -> None:
    adapters = attach(Example(), LoRA(rank=2, targets="first"), "a", seed=0)
    adapters.activate(Rows("a", None))
    adapters.save(tmp_path / "a")
    assert load(Example(), tmp_path / "a").active == "a"


def test_a_second_adapter_waits_and_a_taken_name_is_refused(tmp_path: Path) -> None:
    attach(Example(), LoRA(rank=2, targets="first"), "a", seed=0).save(tmp_path / "a")
    model = Example()
    adapters = attach(model, LoRA(rank=2, targets="second"), "b", seed=0)
    load(model, tmp_path / "a")
    assert adapters.names == ["b", "a"]
    assert adapters.active == "b"
    with pytest.raises(AttachError, match='"a" already'):
        load(model, tmp_path / "a")


def test_loading_touches_neither_modes_nor_bits_of_the_model(tmp_path: Path) -> None:
    attach(Example(), LoRA(rank=2, targets="first"), seed=0).save(tmp_path / "a")
    model = Example().train()
    model.second.eval()
    before = copy.deepcopy(model)
    load(model, tmp_path / "a")
    modes = {path: module.training for path, module in model.named_modules() if "smidgen" not in path}
    assert modes == {path: module.training for path, module in before.named_modules()}
    adapters_of(model).detach()  # type: ignore[union-attr]
    assert type(model.first) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    example().save(tmp_path / "a")
    path = tmp_path / "a" / "style" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    model = Example()
    with pytest.raises(FolderError, match=r"classifier\.weight is damaged|is damaged"):
        load(model, tmp_path / "a")
    assert adapters_of(model) is None
    assert type(model.first) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_fresh_head_is_no_other_base(tmp_path: Path) -> None:
    model = llama_classifier()
    adapters = trained(attach(model, LoRA(rank=2, targets="*.q_proj", heads=("score",)), seed=0))
    adapters.save(tmp_path / "a")
    again = llama_classifier()
    assert not torch.equal(again.score.weight, model.score.weight)
    load(again, tmp_path / "a")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_base_of_the_same_shape_but_other_weights_is_refused(tmp_path: Path) -> None:
    attach(Example(), LoRA(rank=2, targets="first"), seed=0).save(tmp_path / "a", base_model="models/example")
    other = Example()
    with torch.no_grad():
        other.second.weight.mul_(2)
    with pytest.raises(FolderError, match=r"trained on other weights.*models/example.*check_base=False"):
        load(other, tmp_path / "a")
    load(other, tmp_path / "a", check_base=False)


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    class Wider(Example):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    attach(Example(), LoRA(rank=2, targets=["first", "second"]), seed=0).save(tmp_path / "a")
    with pytest.raises(FolderError) as caught:
        load(Wider(), tmp_path / "a")
    assert "2 of 4 tensors" in str(caught.value)
    assert re.search(r"first\.lora_B\.weight is \(5, 2\), .* need \(6, 2\)", str(caught.value))
    assert re.search(r"second\.lora_A\.weight is \(2, 5\), .* need \(2, 6\)", str(caught.value))


def test_bf16_and_meta_bases_get_the_same_fp32_adapter(tmp_path: Path) -> None:
    adapters = trained(attach(llama(), LoRA(rank=2), seed=0))
    adapters.save(tmp_path / "a")
    half = load(llama().bfloat16(), tmp_path / "a")
    same_tensors(adapters, half)
    same_tensors(adapters, load(llama().to("meta"), tmp_path / "a"))


def test_a_compiled_model_takes_and_gives_the_same_folder(tmp_path: Path) -> None:
    adapters = trained(attach(Example(), LoRA(rank=2, targets="first", heads=("classifier",)), seed=0))
    adapters.save(tmp_path / "a")
    compiled = torch.compile(Example(), backend="eager")
    load(compiled, tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()


def test_what_is_there_is_replaced_only_on_request_and_only_if_it_is_an_adapter(tmp_path: Path) -> None:
    adapters = attach(Example(), LoRA(rank=2, targets="first"), seed=0)
    adapters.save(tmp_path / "a")
    with pytest.raises(FolderError, match="replace=True"):
        adapters.save(tmp_path / "a")
    trained(adapters).save(tmp_path / "a", replace=True)
    same_tensors(adapters, load(Example(), tmp_path / "a"))
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match=r"other things than adapters \(thesis\.tex\)"):
        adapters.save(tmp_path / "a", replace=True)
    assert (tmp_path / "a" / "thesis.tex").exists()


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    adapters = attach(Example(), LoRA(rank=2, targets="first"), seed=0)
    with torch.no_grad():
        adapters.parameters()[0][0, 0] = torch.nan
    with pytest.raises(FolderError, match=r"NaN or infinity in 1 of 2 tensors.*first\.lora_A"):
        adapters.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_values_too_large_for_a_sum_are_still_finite(tmp_path: Path) -> None:
    adapters = attach(Example(), LoRA(rank=2, targets="first"), seed=0)
    with torch.no_grad():
        adapters.parameters()[0].fill_(3e38)
    adapters.save(tmp_path / "a")
    same_tensors(adapters, load(Example(), tmp_path / "a"))


def test_extra_is_json_and_comes_back(tmp_path: Path) -> None:
    adapters = attach(Example(), LoRA(rank=2, targets="first"), seed=0)
    adapters.save(tmp_path / "a", extra={"task": "sentiment", "labels": ["no", "yes"]}, task_type="SEQ_CLS")
    assert read_extra(tmp_path / "a") == {"task": "sentiment", "labels": ["no", "yes"]}
    with pytest.raises(FolderError, match="cannot be written as JSON"):
        adapters.save(tmp_path / "b", extra={"labels": {1, 2}})


def test_a_plain_suffix_of_another_name_is_not_taken_for_it(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 3)
            self.inner = nn.ModuleDict({"up": nn.Linear(3, 3), "down": nn.Linear(3, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["down"](self.inner["up"](self.up(x)))

    torch.manual_seed(0)
    model = Nested()
    base = copy.deepcopy(model)
    method = LoRA(rank=2, targets="*", rank_pattern={"up": 3, "inner.up": 1}, alpha_pattern={"inner.up": 5})
    method = LoRA(**{**method.settings(), "targets": Targets.of_type(nn.Linear)})
    adapters = trained(attach(model, method, seed=0))
    assert [adapters.parts("default")[s].A.shape[0] for s in ("up", "inner.up", "inner.down")] == [3, 1, 2]
    adapters.save(tmp_path / "a")
    load(base, tmp_path / "a")
    x = torch.randn(2, 3)
    assert torch.equal(model(x), base(x))
    (tmp_path / "a" / "smidgen.json").unlink()  # as HF PEFT's reader sees it
    adapters_of(base).detach()  # type: ignore[union-attr]
    load(base, tmp_path / "a")
    assert torch.equal(model(x), base(x))


def test_loading_costs_little_beyond_reading_the_file(tmp_path: Path) -> None:
    layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(112)])
    attach(layers, LoRA(rank=16), seed=0).save(tmp_path / "a")
    adapters_of(layers).detach()  # type: ignore[union-attr]
    costs = []
    for _ in range(3):
        start = time.process_time()
        load(layers, tmp_path / "a")
        costs.append(time.process_time() - start)
        adapters_of(layers).detach()  # type: ignore[union-attr]
    assert min(costs) < 0.2  # about 0.03 s; HF PEFT needs 0.2 s


def test_a_moved_folder_and_an_unused_hub_file_do_not_matter(tmp_path: Path) -> None:
    attach(Example(), LoRA(rank=2, targets="first"), seed=0).save(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("a card")
    load(Example(), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["peft_type"] == "LORA"
