"""A whole run on a tiny model: what it leaves behind, what it says, and every number in its report."""

import math
import random
import re

import pytest
from rich.console import Console

from smidgen.core.errors import DataError, ModelError, RecipeError, TargetError
from smidgen.core.files import sha256_file
from smidgen.recipes.load import load_recipe
from smidgen.recipes.run import tune

from ..tiny import BAD, GOOD, OTHER, reviews, write_csv

RESULT = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "head.safetensors",
    "recipe.yaml",
    "report.html",
    "report.json",
    "smidgen.json",
]
LINEAR = 2 * (4 * 32 * 32 + 2 * 32 * 48)  # weights that LoRA acts on: attention and the two of the feed-forward
POOLER = 32 * 32 + 32  # of no use to this task
HEAD = 2 * 2 * 32 + 2  # two hidden states of 32, two classes


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def parameters(folder) -> int:
    from transformers import AutoModel

    return sum(p.numel() for p in AutoModel.from_pretrained(folder).parameters())


def digest(out) -> list[str]:
    return [sha256_file(out / name) for name in ("adapter_model.safetensors", "head.safetensors")]


def test_a_run_leaves_its_result_and_nothing_else(start, tmp_path):
    run = start()
    assert run.out == tmp_path / "out"
    assert names(tmp_path) == ["out"]
    assert names(run.out) == RESULT
    assert "Saved in" in run.said


def test_the_report_says_what_each_model_costs(start, bert):
    run = start(report={"against": ["full"]})
    report, rows = run.report, run.rows
    assert report["metric"] == "accuracy"
    assert list(rows) == ["majority", "base", "tuned", "full"]
    keys = {"name", "value", "low", "high", "trainable", "share", "peak_bytes", "seconds", "disk_bytes", "others"}
    body = parameters(bert)
    lora = 4 * 2 * (4 * (32 + 32) + (32 + 48) + (48 + 32))  # rank 4, two layers
    assert {name: row["trainable"] for name, row in rows.items()} == {
        "majority": 0,
        "base": HEAD,
        "tuned": lora + HEAD,
        "full": body - POOLER + HEAD,
    }
    for name, row in rows.items():
        assert set(row) == keys
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
        assert row["share"] == row["trainable"] / (body + HEAD)
        if name == "majority":
            assert (row["peak_bytes"], row["seconds"], row["disk_bytes"]) == (None, 0, 0)
        else:
            assert row["peak_bytes"] is None or 1e8 < row["peak_bytes"] < 4e9
            assert 0 < row["seconds"] < 60
    files = ("adapter_model.safetensors", "head.safetensors")
    assert rows["tuned"]["disk_bytes"] == sum((run.out / file).stat().st_size for file in files)
    assert rows["base"]["disk_bytes"] == 4 * HEAD
    assert rows["full"]["disk_bytes"] == 4 * (body + HEAD)
    assert rows["majority"]["value"] == 0.5
    difference, over_full = report["difference"], report["over_full"]
    assert over_full["value"] == pytest.approx(rows["tuned"]["value"] - rows["full"]["value"])
    assert over_full["low"] <= over_full["value"] <= over_full["high"]
    assert report["full_curves"].keys() == report["curves"].keys()
    assert difference["value"] == pytest.approx(rows["tuned"]["value"] - rows["base"]["value"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    # 24 test rows, and the confusion matrix is of them
    assert sum(map(sum, report["confusion"])) == 24
    assert sum(report["confusion"][i][i] for i in range(2)) / 24 == pytest.approx(rows["tuned"]["value"])


def test_the_same_run_twice_is_the_same_result(start, tmp_path):
    one, two = start(out=str(tmp_path / "one")), start(out=str(tmp_path / "two"))
    assert digest(one.out) == digest(two.out)
    figures = [
        [{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")} for row in run.report["rows"]]
        for run in (one, two)
    ]
    assert figures[0] == figures[1]
    assert one.report["curves"] == two.report["curves"]
    assert digest(start(out=str(tmp_path / "three"), train={"seed": 1}).out) != digest(one.out)


def test_a_run_learns_what_the_probe_cannot_see(start, tmp_path, llama):
    data = write_csv(tmp_path / "many.csv", reviews(300))
    train = {"steps": 40, "evaluate_every": 5, "batch": 16, "patience": 20}
    run = start(model=str(llama), data=str(data), train=train)
    assert run.rows["tuned"]["value"] > run.rows["base"]["value"] > run.rows["majority"]["value"]
    assert run.report["best_step"] > 0
    steps = [step for step, _ in run.report["curves"]["valid accuracy"]]
    assert steps == [0, *range(5, 41, 5)]


def test_the_recipe_of_a_result_runs_the_same_again(start, tmp_path):
    """Also what was measured, such as steps and precision, is said in it."""
    train = dict.fromkeys(["steps", "batch", "evaluate_every", "learning_rate", "precision"]) | {"epochs": 1}
    first = start(train=train)
    recipe = load_recipe(first.out / "recipe.yaml", flags={"--out": str(tmp_path / "again")})
    assert None not in (recipe.train.steps, recipe.train.precision, recipe.train.learning_rate, recipe.task.max_length)
    again = tune(recipe, resume=False, fresh=False, console=Console(quiet=True))
    assert digest(again) == digest(first.out)


def test_the_precision_that_was_said_is_used(start, tmp_path):
    one, two = (start(out=str(tmp_path / p), train={"precision": p}) for p in ("fp32", "bf16"))
    assert (one.plan["precision"], two.plan["precision"]) == ("fp32", "bf16")
    assert one.report["curves"]["train loss"] != two.report["curves"]["train loss"]


def test_the_defaults_choose_everything_and_say_why(start):
    run = start(
        train={
            "steps": None,
            "batch": None,
            "evaluate_every": None,
            "learning_rate": None,
            "precision": None,
            "epochs": 1,
        }
    )
    assert run.plan["steps"] == "40"  # 11 steps of 8 rows would be an epoch; so few rows are seen more often
    assert run.plan["batch"] == "8"
    assert run.plan["training rows"] == "86"
    assert all(entry["why"] for entry in run.report["plan"])
    assert "None" not in run.plan.values()


def test_the_plan_says_how_much_of_the_work_is_padding(start, tmp_path):
    run = start()
    entry = next(entry for entry in run.report["plan"] if entry["setting"] == "padding")
    shares = [float(number) for text in (entry["value"], entry["why"]) for number in re.findall(r"([\d.]+)%", text)]
    assert entry["value"] == f"{shares[0]}% of the tokens"
    assert 0 < shares[0] < shares[1] / 2  # in buckets, and at random
    same = [(f"{word} {other}", label) for word, label in (("good", "yes"), ("bad", "no")) for other in OTHER]
    same_length = write_csv(tmp_path / "same.csv", same)
    assert "padding" not in start(data=str(same_length), dry_run=True, fresh=True).said


def test_settings_that_were_said_stand_in_the_plan(start):
    run = start(method={"name": "lora", "rank": 2, "dropout": 0.25}, task={"max_length": 12})
    said = {e["setting"]: e["value"] for e in run.report["plan"] if e["why"] == "you said so"}
    assert said.items() >= {"method": "lora", "rank": "2", "dropout": "0.25", "max_length": "12", "steps": "6"}.items()


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ([], {"training rows": 86, "validation rows": 10, "test rows": 24}),
        (["test"], {"training rows": 108, "validation rows": 12, "test rows": 40}),
        (["valid"], {"training rows": 108, "validation rows": 12, "test rows": 40}),  # they judge; others choose
        (["valid", "test"], {"training rows": 120, "validation rows": 40, "test rows": 40}),
    ],
)
def test_rows_that_are_not_given_are_held_out(start, data, tmp_path, given, counts):
    files = {name: str(write_csv(tmp_path / f"{name}.csv", reviews(40, seed=7 + len(name)))) for name in given}
    run = start(data={"train": str(data), **files})
    assert {name: int(run.plan[name]) for name in counts} == counts


def test_data_from_elsewhere_is_judged_too(start, data, tmp_path):
    others = {
        name: str(write_csv(tmp_path / f"{name}.csv", reviews(30 + i, seed=3 + i))) for i, name in enumerate("ab")
    }
    run = start(data={"train": str(data), "shift": others})
    assert [(row["name"], row["count"]) for row in run.report["shift"]] == [("a", 30), ("b", 31)]
    for row in run.report["shift"]:
        assert row["difference"]["value"] == pytest.approx(row["tuned"]["value"] - row["base"]["value"])


def rated(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts whose number is the share of good words, and a little noise."""
    generator, texts = random.Random(seed), {}
    while len(texts) < count:
        words = generator.choices([*GOOD, *BAD], k=generator.randint(3, 8))
        texts[" ".join(words)] = f"{sum(word in GOOD for word in words) / len(words) + generator.gauss(0, 0.01):.3f}"
    return list(texts.items())


def tagged(count: int, seed: int = 0) -> list[tuple[str, str]]:
    generator, texts = random.Random(seed), {}
    while len(texts) < count:
        tags = [tag for tag in ("film", "music", "plot") if generator.random() < 0.5]
        words = [*tags, *generator.choices(GOOD, k=4)]
        generator.shuffle(words)
        if tags:
            texts[" ".join(words)] = ";".join(tags)
    return list(texts.items())


def paired(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    one = reviews(2 * count, seed)
    pairs = zip(one[:count], one[count:], strict=True)
    return [(a, b, ("different", "same")[i % 3 > 0]) for i, ((a, _), (b, _)) in enumerate(pairs)]


def starred(count: int, seed: int = 0) -> list[tuple[str, str]]:
    return [
        (text, {"positive": "good", "negative": ("bad", "mixed")[i % 4 < 2]}[label])
        for i, (text, label) in enumerate(reviews(count, seed))
    ]


KINDS = {
    "binary": (reviews, ("text", "label"), ["accuracy", "macro_f1", "mcc"], "majority"),
    "multiclass": (starred, ("text", "label"), ["accuracy", "macro_f1", "mcc"], "majority"),
    "multilabel": (tagged, ("text", "label"), ["macro_f1", "micro_f1", "exact_match"], "majority"),
    "regression": (rated, ("text", "score"), ["spearman", "r2", "mae"], "mean"),
    "pairs": (paired, ("sentence1", "sentence2", "label"), ["accuracy", "macro_f1", "mcc"], "majority"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_each_kind_of_label_is_learned_and_judged_again_alike(start, tmp_path, request, kind, model, evaluated):
    make, header, metrics, ignorant = KINDS[kind]
    train, test = (write_csv(tmp_path / f"{i}.csv", make(60, seed=i), header) for i in (0, 1))
    folder = request.getfixturevalue(model)
    run = start(model=str(folder), data={"train": str(train), "test": str(test)})
    assert run.plan["kind"] == ("binary" if kind == "pairs" else kind)
    assert list(run.rows) == [ignorant, "base", "tuned"]
    tuned = run.rows["tuned"]
    assert [run.report["metric"], *sorted(tuned["others"])] == [metrics[0], *sorted(metrics[1:])]
    # read again from disk, the result gives the same figures on the same rows
    found = evaluated(run.out, test)
    assert (found["rows"], found["metric"]) == (60, metrics[0])
    expected = {metrics[0]: tuned["value"], **tuned["others"]}
    assert {name: found[name] for name in metrics} == pytest.approx(expected, abs=1e-5)


def test_an_adapter_is_chosen_by_the_metric_that_was_asked_for(start, tmp_path, evaluated):
    data = write_csv(tmp_path / "rated.csv", rated(60), ("text", "score"))
    run = start(data=str(data), report={"metric": "mae"})
    assert (run.report["metric"], run.report["higher_is_better"]) == ("mae", False)
    curve = dict(run.report["curves"]["valid mae"])
    assert curve[run.report["best_step"]] == min(curve.values())
    assert evaluated(run.out, data)["metric"] == "mae"


def test_a_metric_that_does_not_fit_is_refused(start):
    with pytest.raises(RecipeError, match=r'"mae" is no metric of binary; there are: accuracy, macro_f1, mcc'):
        start(report={"metric": "mae"})


def damaged(tmp_path):
    rows = reviews(60)
    rows[10] = ("", "positive")
    rows[20] = (rows[20][0], "")
    rows[30] = ("a \ufffd b", "negative")
    return write_csv(tmp_path / "damaged.csv", rows)


def test_bad_rows_are_named_with_file_and_line_before_anything_is_loaded(start, tmp_path):
    with pytest.raises(DataError) as caught:
        start(data=str(damaged(tmp_path)))
    message = str(caught.value)
    assert message.startswith("3 of 60 rows cannot be used:")
    assert message.endswith("--on-bad-row skip")
    for line, what in [(12, "the text is empty"), (22, "the label is missing"), (32, "replacement characters")]:
        assert any(f"damaged.csv:{line}" in said and what in said for said in message.splitlines()), message
    assert names(tmp_path) == ["damaged.csv"]


def test_rows_that_cannot_be_read_are_named_where_the_rest_makes_no_task(start, tmp_path):
    rows = [("A lovely film.", "positive"), ("Dull.", "positive"), ("A mess.", "negative", "or not"), ("Poor.",)]
    with pytest.raises(DataError) as caught:
        start(data=str(write_csv(tmp_path / "ragged.csv", rows)))
    first, second, *others = str(caught.value).splitlines()
    assert first.startswith('Every label is "positive"')
    assert second == "Perhaps because 2 of 4 rows cannot be used:"
    assert [line.strip().split(": ")[0] for line in others[:2]] == ["ragged.csv:4", "ragged.csv:5"]


def test_bad_rows_can_be_left_out_and_the_report_says_so(start, tmp_path):
    run = start(data={"train": str(damaged(tmp_path)), "on_bad_row": "skip"})
    parts = ("training rows", "validation rows", "test rows")
    assert sum(int(run.plan[part]) for part in parts) == 57
    assert any("3 bad rows were left out" in note and "damaged.csv:12" in note for note in run.report["notes"])


def test_the_longest_rows_are_tried_before_training(start, tmp_path, bert):
    """A prompt of 20 and a text of 44 are what 64 positions hold; one token more is refused, in words."""
    rows = [(f"{text} " * (8 if i % 9 == 5 else 1), label) for i, (text, label) in enumerate(reviews(90))]
    data = str(write_csv(tmp_path / "long.csv", rows))
    run = start(data=data, method="prompt_tuning", train={"learning_rate": None})
    assert int(run.plan["max_length"]) <= 44
    with pytest.raises(RecipeError, match=r"max_length is 45, and .*bert has 44 positions beside a prompt of 20"):
        start(data=data, method="prompt_tuning", task={"max_length": 45}, fresh=True)


def test_a_note_says_how_many_texts_were_cut_and_counts_no_other(start, data):
    longest = max(len(text.split()) for text, _ in reviews(120)) + 2
    assert not any("were cut" in note for note in start(task={"max_length": longest}).report["notes"])
    cut = [note for note in start(task={"max_length": 8}, fresh=True).report["notes"] if "were cut to 8 tokens" in note]
    assert len(cut) == 2  # of the training and of the test texts


def test_a_dry_run_plans_and_checks_and_writes_nothing(start, tmp_path):
    run = start(dry_run=True)
    assert names(tmp_path) == []
    assert "nothing was trained" in run.said
    assert "learning_rate" in run.said
    assert "trained tensors get a finite gradient" in run.said


def test_a_model_that_is_not_there_is_named_before_the_data_is_read(start, tmp_path):
    with pytest.raises(ModelError, match="there is no folder"):
        start(model=str(tmp_path / "nothing"), data=str(tmp_path / "nothing.csv"))


def test_steps_and_minutes_both_hold(start):
    run = start(train={"steps": 100_000, "minutes": 0.01, "evaluate_every": None})
    assert int(run.plan["steps"]) < 1000
    assert "100,000 steps would take" in next(e["why"] for e in run.report["plan"] if e["setting"] == "steps")


METHODS = ("lora", "bottleneck", "ia3", "bitfit", "prefix_tuning", "prompt_tuning", "selective")


@pytest.mark.parametrize(
    ("method", "model"),
    [(method, model) for method in METHODS for model in ("bert", "llama") if (method, model) != ("bitfit", "llama")],
)
def test_each_method_passes_its_checks_trains_and_is_read_again(start, request, data, evaluated, method, model):
    run = start(
        model=str(request.getfixturevalue(model)),
        data={"train": str(data), "test": str(write_csv(data.with_name("test.csv"), reviews(40, seed=9)))},
        method=method,
        train={"steps": 3, "evaluate_every": 3, "learning_rate": None, "patience": None},
    )
    tuned = run.rows["tuned"]
    assert tuned["trainable"] > HEAD
    assert 0 < tuned["share"] <= 1
    assert math.isfinite(run.report["curves"]["train loss"][-1][1])
    assert evaluated(run.out, data.with_name("test.csv"))["accuracy"] == tuned["value"]


def test_a_method_that_does_not_fit_the_model_says_so(start, llama):
    with pytest.raises(TargetError, match="LlamaModel has no biases"):
        start(model=str(llama), method="bitfit")


def test_a_base_in_sixteen_bits_is_used_again_as_it_was(start, bert, data, tmp_path, evaluated):
    test = write_csv(tmp_path / "test.csv", reviews(60, seed=9))
    run = start(model={"path": str(bert), "dtype": "bfloat16"}, data={"train": str(data), "test": str(test)})
    assert evaluated(run.out, test)["accuracy"] == run.rows["tuned"]["value"]
    assert run.rows["tuned"]["share"] == pytest.approx(run.rows["tuned"]["trainable"] / (parameters(bert) + HEAD))


def test_eva_gives_each_layer_the_rank_that_its_inputs_ask_for(start, bert):
    from transformers import AutoModel

    from smidgen import load

    run = start(method={"name": "lora", "start": "eva", "rank": 5})
    found = load(AutoModel.from_pretrained(bert), run.out)
    method, parts = found.method("default"), found.parts("default")
    ranks = {name: part.A.shape[0] for name, part in parts.items()}
    assert method.start == "eva"
    assert sum(ranks.values()) == 5 * 12  # two layers of six; the pooler is of no use to the task
    assert len(set(ranks.values())) > 1
    assert load_recipe(run.out / "recipe.yaml").method_object().start == "eva"


def test_lora_plus_lets_B_learn_faster(start, tmp_path, bert):
    from transformers import AutoModel

    from smidgen import load

    def moved(run) -> float:
        parts = load(AutoModel.from_pretrained(bert), run.out).parts("default").values()
        return sum(float(part.B.detach().abs().mean()) for part in parts)

    train = {"learning_rate": 1e-4, "steps": 6, "evaluate_every": 6}
    plain = start(out=str(tmp_path / "plain"), train=train)
    fast = start(out=str(tmp_path / "fast"), train={**train, "lora_plus": 16.0})
    assert "lora_plus" not in plain.plan
    assert fast.plan["lora_plus"] == "16"
    assert load_recipe(fast.out / "recipe.yaml").train.lora_plus == 16
    assert moved(fast) > 5 * moved(plain)
