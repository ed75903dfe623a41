"""Targets: every way to name places, what "auto" means for a model, and errors that help."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from smidgen import Targets
from smidgen.core.errors import TargetError
from smidgen.core.site import Site
from smidgen.core.targets import body_layers, head_modules
from smidgen.methods.lora import LoRA


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    """12 blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.lm_head = nn.Linear(4, 7)


def anywhere(site: Site) -> str | None:
    return None


def names(targets: Targets, model: nn.Module | None = None) -> list[str]:
    return [site.name for site in targets.resolve(model or Model(), anywhere).sites]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (Targets("layers.3.q_proj"), ["layers.3.q_proj"]),
        (Targets("3.q_proj"), ["layers.3.q_proj"]),
        (Targets("layers.1?.q_proj"), ["layers.10.q_proj", "layers.11.q_proj"]),
        (Targets("layers.{2-3}.{q,v}_proj"), [f"layers.{i}.{x}_proj" for i in (2, 3) for x in "qv"]),
        (Targets("layers.{10-11}.*_proj"), [f"layers.{i}.{x}_proj" for i in (10, 11) for x in "qkv"]),
        (Targets("11.q_proj", "lm_head"), ["layers.11.q_proj", "lm_head"]),
        (Targets("11.q_proj") | Targets("lm_head"), ["layers.11.q_proj", "lm_head"]),
        (Targets("layers.0.*") & Targets.of_type(nn.Linear), [f"layers.0.{x}_proj" for x in "qkv"]),
        (Targets.of_type(nn.Linear) & ~Targets("layers.*"), ["lm_head"]),
        (Targets.of_type(nn.LayerNorm) & Targets("layers.{0-1}.*"), ["layers.0.norm", "layers.1.norm"]),
        (Targets(lambda path, module: getattr(module, "out_features", 0) == 7), ["lm_head"]),
        (Targets.exactly(["layers.5.norm"]), ["layers.5.norm"]),
        (Targets("layers.0.norm").parameter("weight", "bias"), ["layers.0.norm.weight", "layers.0.norm.bias"]),
        (Targets("0.norm").parameter("weight") | Targets("lm_head"), ["layers.0.norm.weight", "lm_head"]),
        ((Targets("0.norm") | Targets("lm_head")).parameter("bias"), ["layers.0.norm.bias", "lm_head.bias"]),
    ],
    ids=repr,
)
def test_every_form_names_these_places_in_the_order_of_the_model(targets: Targets, expected: list[str]):
    assert names(targets) == expected


def test_a_pattern_matches_a_whole_path_or_its_end_after_a_dot_and_no_other_text():
    model = nn.ModuleDict(
        {"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2), "inner": nn.ModuleDict({"proj": nn.Linear(2, 2)})}
    )
    assert names(Targets("proj"), model) == ["proj", "inner.proj"]
    assert names(Targets("*proj"), model) == ["proj", "q_proj", "inner.proj"]
    assert names(Targets(""), model) == [""]


def test_special_characters_of_regular_expressions_have_no_meaning():
    with pytest.raises(TargetError):
        names(Targets("layers.0.(q|k)_proj"))


def test_a_place_that_two_terms_name_is_one_site():
    assert names(Targets("11.q_proj", "*.11.q_proj") | Targets("layers.11.q_proj")) == ["layers.11.q_proj"]


def test_a_module_that_stands_in_two_places_is_one_site():
    shared = nn.Linear(3, 3)
    assert names(Targets.of_type(nn.Linear), nn.ModuleDict({"a": shared, "b": shared})) == ["a"]


def test_values_from_recipes_become_targets():
    assert Targets.of("auto").is_auto
    assert names(Targets.of("lm_head")) == ["lm_head"]
    assert names(Targets.of(["lm_head", "11.q_proj"])) == ["layers.11.q_proj", "lm_head"]
    assert Targets.of(targets := Targets("x")) is targets


def test_targets_show_what_they_say_and_can_be_pickled():
    targets = (Targets("*.q_proj") | Targets.of_type(nn.LayerNorm)) & ~Targets("layers.{1-11}.*")
    assert repr(targets) == 'Targets(("*.q_proj" | LayerNorm) & (~("layers.{1-11}.*")))'
    assert names(pickle.loads(pickle.dumps(targets))) == names(targets) == ["layers.0.q_proj", "layers.0.norm"]


# -- errors


@pytest.mark.parametrize(
    "targets",
    [
        Targets("*.q_prj"),
        Targets("*.q_proj", "*.q_prj"),
        Targets("*.q_proj") | Targets("*.q_prj"),
        Targets.of_type(nn.Linear) & ~Targets("*.q_prj"),
        Targets("*.q_proj", "*.q_prj").parameter("weight"),
    ],
    ids=repr,
)
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_nearest(targets: Targets):
    with pytest.raises(TargetError) as error:
        targets.resolve(Model(), anywhere)
    assert (
        str(error.value)
        == '"*.q_prj" matches none of 63 modules of Model. Near it: *.q_proj (12), *.v_proj (12), *.k_proj (12).'
    )


def test_all_idle_patterns_are_reported_together():
    with pytest.raises(TargetError) as error:
        Targets("*.qproj", "*.zzz").resolve(Model(), anywhere)
    first, second = str(error.value).splitlines()
    assert first.startswith('"*.qproj" matches none')
    assert second.startswith('"*.zzz" matches none')
    assert "It has: *.q_proj (12), *.k_proj (12)" in second


def test_a_predicate_or_type_that_matches_nothing_says_what_there_is():
    with pytest.raises(
        TargetError, match=r"Conv2d\) matches none of the 63 modules of Model. It has: \*.q_proj \(12\)"
    ):
        Targets.of_type(nn.Conv2d).resolve(Model(), anywhere)


def test_a_named_place_that_the_method_cannot_act_on_is_an_error_with_the_reason():
    with pytest.raises(TargetError, match=r"layers.0.norm: LayerNorm is a diagonal map; lora needs a matrix"):
        LoRA(targets=Targets("layers.0.norm", "lm_head")).resolve(Model())
    with pytest.raises(TargetError, match=r"layers.0.norm: LayerNorm is a diagonal map"):
        LoRA(targets=Targets("layers.0.norm") | Targets.of_type(nn.Linear)).resolve(Model())


def test_a_place_that_was_swept_up_is_passed_over_with_the_reason():
    resolution = LoRA(targets=Targets.of_type(nn.Linear, nn.LayerNorm)).resolve(Model())
    assert len(resolution.sites) == 37
    assert dict(resolution.passed_over)["layers.0.norm"] == "LayerNorm is a diagonal map; lora needs a matrix"


def test_a_parameter_that_is_not_there_is_an_error_that_lists_those_that_are():
    with pytest.raises(TargetError, match=r"layers.0.q_proj \(Linear\) has no parameter wieght. It has weight, bias"):
        Targets("0.q_proj").parameter("wieght").resolve(Model(), anywhere)
    with pytest.raises(TargetError, match=r"has no parameter bias. It has weight$"):
        Targets("*").parameter("bias").resolve(nn.Linear(2, 2, bias=False), anywhere)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Targets(),
        lambda: Targets.auto() | Targets("x"),
        lambda: Targets("x") & Targets.auto(),
        lambda: ~Targets.auto(),
        lambda: Targets("x").parameter("weight") & Targets("y"),
        lambda: ~Targets("x").parameter("weight"),
    ],
)
def test_what_cannot_be_combined_is_refused_when_it_is_said(wrong):
    with pytest.raises(TargetError):
        wrong()


# -- weights that are read without a call


def test_the_output_layer_of_multihead_attention_is_reached_as_a_parameter():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    (site,) = Targets("*.out_proj").resolve(model, anywhere).sites
    assert (site.path, site.parameter) == ("attn", "out_proj.weight")
    assert names(Targets("*.out_proj").parameter("bias"), model) == ["attn.out_proj.bias"]


# -- auto


def auto(model: nn.Module) -> list[str]:
    return body_layers(model)[0]


class ResNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.fc = nn.Linear(8, 10)


class TimmLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.block = nn.Linear(8, 2), nn.Linear(8, 8)

    def get_classifier(self) -> nn.Module:
        return self.head


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(9, 4), nn.Embedding(8, 4)


def test_auto_takes_the_linear_layers_of_a_bert_and_not_its_head():
    import transformers

    config = transformers.BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    found = auto(transformers.BertForSequenceClassification(config))
    assert len(found) == 2 * 6 + 1
    assert "bert.encoder.layer.1.attention.self.query" in found
    assert "bert.pooler.dense" in found
    assert "classifier" not in found
    assert len(auto(transformers.BertModel(config))) == 2 * 6 + 1


def test_auto_takes_the_linear_layers_of_a_llama_and_not_its_head():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=9,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)
    assert [path.rpartition(".")[2] for path in auto(model)] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ] * 2
    assert head_modules(model) == ["lm_head"]


def test_auto_takes_the_transposed_linear_layers_of_a_gpt2():
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=2, n_positions=8)
    )
    assert auto(model) == [f"transformer.h.0.{x}" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_auto_takes_the_linear_layers_of_a_vision_transformer_and_not_the_patches():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    found, left_out = body_layers(transformers.ViTForImageClassification(config))
    assert len(found) == 6
    assert left_out["classifier"] == "part of the head"
    assert [reason for path, reason in left_out.items() if "patch" in path] == [
        "conv layer; the body of this model is linear"
    ]


def test_auto_takes_the_convolutions_where_they_hold_most_weights():
    assert auto(ResNetLike()) == ["stem", "body.0", "body.2"]


def test_auto_asks_a_model_for_its_head_before_it_guesses():
    assert auto(TimmLike()) == ["block"]


def test_auto_takes_embeddings_where_there_is_nothing_else():
    assert auto(Recommender()) == ["users", "items"]


def test_auto_takes_the_last_layer_of_a_plain_model_for_its_head():
    assert auto(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 2))) == ["0", "2"]
    assert auto(nn.Sequential(nn.Linear(3, 5))) == ["0"]
    assert auto(nn.Linear(3, 5)) == [""]


def test_auto_in_a_model_without_layers_is_an_error():
    with pytest.raises(TargetError, match="matches none of the 2 modules of Sequential"):
        LoRA().resolve(nn.Sequential(nn.LayerNorm(3)))


def test_one_settings_object_serves_two_models_and_stays_as_it_was():
    method = LoRA()
    assert len(method.resolve(Model()).sites) == 36
    assert len(method.resolve(ResNetLike()).sites) == 3
    assert method == LoRA(targets=method.targets)
    assert method.targets.is_auto


# -- the report


def test_the_report_says_what_is_adapted_which_share_what_is_left_out_and_what_untouched():
    report = LoRA().resolve(Model()).report()
    linear, norm, head = 4 * 4 + 4, 2 * 4, 7 * 4 + 7
    total = 12 * (3 * linear + norm) + head
    covered = 36 * linear
    assert report.splitlines()[0] == f"36 sites holding {covered} of {total} parameters ({covered / total:.1%})"
    assert "    12 x layers.*.q_proj  linear 4 -> 4" in report
    assert "  left out lm_head: part of the head" in report
    assert "  untouched   12 x layers.*.norm  LayerNorm" in report


def test_the_report_counts_the_base_alone_also_once_adapters_live_there():
    from smidgen import attach

    model = Model()
    before = LoRA().resolve(model).report()
    attach(model, LoRA(rank=2))
    assert LoRA().resolve(model).report() == before


def test_the_report_of_a_parameter_counts_that_parameter():
    resolution = Targets("0.norm").parameter("weight").resolve(Model(), anywhere)
    assert resolution.report().startswith("1 sites holding 4 of ")


def test_no_weight_is_needed_to_resolve():
    with torch.device("meta"):
        model = Model()
    assert len(LoRA().resolve(model).sites) == 36
    assert isinstance(model.lm_head.weight, Tensor)


def test_a_text_names_parameters_behind_a_colon():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "up": nn.Linear(4, 5), "out": nn.Linear(5, 2)})
    said = Targets.of(["lstm:weight_ih_l0", "lstm:weight_hh_l0", "up"])
    assert [site.name for site in said.resolve(model, anywhere).sites] == [
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "up",
    ]
    assert [site.name for site in LoRA(targets="lstm:weight_hh_l0").resolve(model).sites] == ["lstm.weight_hh_l0"]
    with pytest.raises(TargetError, match=r"lstm \(LSTM\) has no parameter weight_hh_l1"):
        LoRA(targets="lstm:weight_hh_l1").resolve(model)
    with pytest.raises(TargetError, match='"lstn" matches none'):
        LoRA(targets=["lstn:weight_hh_l0"]).resolve(model)
