"""Every mistake in a recipe is found at once, with its line, what is there and what to write instead."""

import pytest

from smidgen.core.errors import RecipeError
from smidgen.recipes.load import load_recipe, recipe_from

GOOD = "recipe: 1\nmodel: models/minilm\ndata: reviews.csv\n"


def refusal(tmp_path, monkeypatch, text, **more):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", **more)
    return str(caught.value)


def flag_refusal(flags=None, settings=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(flags={"--model": "m", "--data": "d", **(flags or {})}, settings=settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: {name: lora,\n  dropuot: 0.1}",
         'recipe.yaml:5: "dropuot" is not a field of lora. Did you mean "dropout"? Fields: rank, alpha, '
         "rank_stabilised, dropout, dropout_on, start, bias_on_B, rank_pattern, alpha_pattern, targets, heads"),
        ("method:\n  name: lora\n  rank: 0", "recipe.yaml:6: rank is 0; it must be a whole number of at least 1"),
        ("method:\n  rank: 8.5", "recipe.yaml:5: method.rank is 8.5; expected a whole number"),
        ("method:\n  targets: [1]", "recipe.yaml:5: method.targets is a list; expected text or a list of text"),
        ("method:\n  targets: []", "recipe.yaml:5: Targets() names no place; say Targets"),
        ("method:\n  dropout_on: element",
         'recipe.yaml:5: method.dropout_on is "element" (text); it can be elements or features. '
         'Did you mean "elements"?'),
        ("method: slective", 'recipe.yaml:4: there is no method "slective". Did you mean selective? List all: '
         'smidgen methods'),
        ("train: {batch: 0}", "recipe.yaml:4: train.batch is 0; it must be at least 1"),
        ('train: {batch: "8"}', 'recipe.yaml:4: train.batch is "8" (text); expected a whole number'),
        ("train: {batch: yes}", 'recipe.yaml:4: train.batch is "yes" (text); expected a whole number'),
        ("train: {batch: true}", "recipe.yaml:4: train.batch is true; expected a whole number"),
        ("train: {warmup: 1}", "recipe.yaml:4: train.warmup is 1; it must be below 1"),
        ("train: {learning_rate: 0}", "recipe.yaml:4: train.learning_rate is 0; it must be above 0"),
        ("train: {clip: 1e999}", "recipe.yaml:4: train.clip is Infinity; expected a finite number"),
        ("train: 3", "recipe.yaml:4: train is 3; expected keys with values"),
        ("train: {epochs: 1,\n steps: 2}",
         "recipe.yaml:5: epochs and steps are both given, and each says how long to train; keep one"),
        ("train: {bacth: 1}", 'recipe.yaml:4: "bacth" is not a key of train. Did you mean "batch"? Keys: epochs,'),
        ("train: {rank: 8}", 'recipe.yaml:4: "rank" is not a key of train. It is a key of method. Keys: epochs,'),
        ("batch: 8", 'recipe.yaml:4: "batch" is not a key of a recipe. It is a key of train. Keys: recipe, model,'),
        ("task: regression",
         'recipe.yaml:4: there is no task "regression". It is a kind of text_classification: task.kind: regression'),
        ("task: {kind: binry}",
         'recipe.yaml:4: task.kind is "binry" (text); it can be binary or multiclass or multilabel or regression. '
         'Did you mean "binary"?'),
        ("method: head", 'recipe.yaml:4: a head alone, on the model as it is, is the row "base" of every report;'),
        ("task: {kind: regression}\ntrain: {label_smoothing: 0.1}",
         "recipe.yaml:5: regression has no single class to smooth; leave it out"),
        ("report: {against: [lora]}", 'recipe.yaml:4: report.against.0 is "lora" (text); it can be full'),
        ("report: {against: full}", 'recipe.yaml:4: report.against is "full" (text); expected a list'),
        ("report: {metric: ''}", "recipe.yaml:4: report.metric is empty"),
        ("out: 3", 'recipe.yaml:4: out is 3; expected text: write "3" in quotes'),
        ("out: models/minilm", "recipe.yaml:4: out is the model itself, models/minilm; choose another folder"),
        ("out: recipe.yaml", "recipe.yaml:4: out is a file, recipe.yaml; it is to be a folder"),
        ("train:\n  batch: 8\n  batch: 9", 'recipe.yaml:6: "batch" stands here again; it stands on line 5 already'),
        ("train:\n\tbatch: 8", "recipe.yaml:5: not YAML: a tab; YAML is indented with spaces"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path, monkeypatch, text, message):
    found = refusal(tmp_path, monkeypatch, GOOD + text)
    assert found.startswith(message)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: d", 'recipe.yaml: model is missing; say it with "model: PATH" in a recipe, or --model PATH'),
        ("model:\ndata: d", 'recipe.yaml:1: model is missing; say it with "model: PATH" in a recipe, or --model PATH'),
        ("model: m\ndata: {valid: d}", "recipe.yaml:2: data.train is missing; say it with --data PATH"),
        ("recipe: 2\nmodel: m\ndata: d", "recipe.yaml:1: recipe is 2; it can be 1"),
        ("model: {path: package:x, revision: v1}\ndata: d",
         "recipe.yaml:1: package:x has no revisions: it is on this machine, not on the hub"),
        ("model: m\ndata: {train: d, columns: {text: a, label: a}}",
         'recipe.yaml:2: text and label are the same column, "a"'),
        ("model: m\ndata: {train: d, columns: {txt: a}}",
         'recipe.yaml:2: text_classification has no role "txt". Did you mean "text"? Roles: text, text_pair, '
         "label, group, time, weight"),
        ("model: m\ndata:\n  train: recipe.yaml\n  test: ./recipe.yaml",
         "recipe.yaml:4: test and train are the same file: a figure measured on it would be too good"),
        ("model: m\ndata:\n  train: recipe.yaml\n  shift:\n    here: recipe.yaml",
         "recipe.yaml:5: shift.here and train are the same file: a figure measured on it would be too good"),
        ("", "recipe.yaml holds nothing; a recipe is keys with values:\nmodel: PATH\ndata: PATH"),
        ("- a", "recipe.yaml holds a list; a recipe is keys with values:\nmodel: PATH\ndata: PATH"),
    ],
)  # fmt: skip
def test_what_a_recipe_lacks_is_said(tmp_path, monkeypatch, text, message):
    assert refusal(tmp_path, monkeypatch, text) == message


def test_all_mistakes_come_at_once_in_the_order_of_the_lines(tmp_path, monkeypatch):
    text = "model: {dtype: float31}\nmethod:\n  rank: 0\n  dropuot: 1\ntrain:\n  batch: 0\n  batch: 1\n"
    found = refusal(
        tmp_path, monkeypatch, text, flags={"--epochs": "many", "--task": "regression"}, settings=["train.seed=-1"]
    )
    places = [line.partition(": ")[0] for line in found.splitlines()]
    assert places == [
        "recipe.yaml",
        "recipe.yaml:1",
        "recipe.yaml:1",
        "recipe.yaml:3",
        "recipe.yaml:4",
        "recipe.yaml:6",
        "recipe.yaml:7",
        "--task",
        "--epochs",
        "--set train.seed",
    ]


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        ({"--learning-rate": "fast"}, [], '--learning-rate: train.learning_rate is "fast" (text); expected a number'),
        ({"--batch": "0"}, [], "--batch: train.batch is 0; it must be at least 1"),
        (
            {"--method": "slective"},
            [],
            '--method: there is no method "slective". Did you mean selective? List all: smidgen methods',
        ),
        ({"--on-bad-row": "ignore"}, [], '--on-bad-row: data.on_bad_row is "ignore" (text); it can be fail or skip'),
        (
            {"--against": ["ful"]},
            [],
            '--against: report.against.0 is "ful" (text); it can be full. Did you mean "full"?',
        ),
        ({"--shift": ["tweets.csv"]}, [], '--shift: "tweets.csv" is not NAME=PATH, such as tweets=tweets.csv'),
        ({}, ["train.bacth=8"], '--set train.bacth: "bacth" is not a key of train. Did you mean "batch"?'),
        ({}, ["trian.batch=8"], '--set trian.batch: "trian" is not a key of a recipe. Did you mean "train"?'),
        ({}, ["train.batch"], '--set: "train.batch" is not KEY=VALUE, such as train.batch=8'),
        ({}, ["out.x=8", "out.y=9"], "--set out.x: out is keys with values; expected text"),
        ({}, ["train=8", "train.x=1"], "--set train.x: train is 8; it has no x"),
        (
            {},
            ["data.columns.label=1"],
            '--set data.columns.label: data.columns.label is 1; expected text: write "1" in quotes',
        ),
        ({}, ["data.label=x"], '--set data.label: "label" is not a key of data. It is a key of data.columns. Keys: '),
        ({"--column": ["label"]}, [], '--column: "label" is not ROLE=NAME, such as label=stars'),
    ],
)
def test_a_mistake_in_a_flag_is_named_with_the_flag(flags, settings, message):
    assert message in flag_refusal(flags, settings)


def test_flags_win_over_the_file_and_settings_over_both(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD + "train: {batch: 8, epochs: 2, seed: 1}\nmethod: {name: lora, rank: 4}\n")
    recipe = load_recipe(
        file,
        flags={
            "--batch": "16",
            "--seed": "2",
            "--learning-rate": "2e-4",
            "--shift": ["tweets=t=1.csv"],
            "--dry-run": True,
        },
        settings=["train.seed=3", 'method.targets=["*.query"]', "report.against=[full]", "task.kind=binary"],
    )
    assert (recipe.train.batch, recipe.train.epochs, recipe.train.seed, recipe.train.learning_rate) == (16, 2, 3, 2e-4)
    assert recipe.method.settings == {"rank": 4, "targets": ["*.query"]}
    assert recipe.data.shift == {"tweets": "t=1.csv"}
    assert recipe.report.against == ("full",)
    assert recipe.task.settings == {"kind": "binary"}
    assert recipe.dry_run


def test_another_method_does_not_inherit_fields_of_the_one_before(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD + "method: {name: lora, rank: 4}\n")
    assert load_recipe(file, flags={"--method": "bitfit"}).method.settings == {}
    assert load_recipe(file, settings=["method=bitfit"]).method.settings == {}
    assert load_recipe(file, flags={"--method": "lora"}).method.settings == {"rank": 4}


def test_a_text_flag_is_taken_as_it_is():
    recipe = load_recipe(flags={"--model": "1", "--data": "true", "--text-column": "2024", "--label-column": "[x]"})
    assert (recipe.model.path, recipe.data.train) == ("1", "true")
    assert recipe.data.columns == {"text": "2024", "label": "[x]"}


def test_keys_with_nothing_behind_them_were_not_said(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD + "method:\ntrain:\n  # batch: 8\ntask:\n  kind:\n")
    assert load_recipe(file) == recipe_from({"model": "models/minilm", "data": "reviews.csv"})


def test_a_recipe_that_is_not_there_is_named_with_what_is_near(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(
        RecipeError, match=r"^recipes\.yaml is not there; a recipe is a YAML file\. Near it: recipe\.yaml\.$"
    ):
        load_recipe("recipes.yaml")
    with pytest.raises(RecipeError, match=r"is a folder; a recipe is a YAML file\."):
        load_recipe(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"model: \xff\n")
    with pytest.raises(RecipeError, match="is not UTF-8 text: byte 7 cannot be read"):
        load_recipe(file)
    file.write_bytes(b"#" * (1 << 21))
    with pytest.raises(RecipeError, match="is larger than 1,048,576 bytes"):
        load_recipe(file)
