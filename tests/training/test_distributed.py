"""Two processes over gloo: a sharded base gives the same numbers as a whole one, gradients add up, and so they do in
PyTorch's DistributedDataParallel.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from smidgen.core.errors import RecipeError
from smidgen.recipes.schema import Recipe

from ..tiny import reviews, tiny_bert, write_csv
from ..tiny_lm import tiny_lm

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launched(*arguments: str | Path, cwd: Path) -> str:
    """Run in two processes, and what they said."""
    with subprocess.Popen(
        [*LAUNCH, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd
    ) as ran:
        try:
            said, _ = ran.communicate(timeout=200)
        finally:
            ran.terminate()  # a rank that waits for ever ends with the launcher
    assert ran.returncode == 0, said.decode()
    return said.decode()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launched(Path(__file__).with_name("sharded.py"), folder, cwd=Path.cwd())
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_a_sharded_base_gives_the_outputs_and_gradients_of_a_whole_one(ranks):
    for found in ranks:
        gaps = {name: value for name, value in found.items() if "torch." in name}
        assert len(gaps) == 18
        assert all(value <= (2e-6 if "float32" in name else 2e-2) for name, value in gaps.items()), gaps


def test_adapters_attached_before_fsdp2_are_sharded_with_their_blocks(ranks):
    assert max(found["attached first"] for found in ranks) <= 1e-2


@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_in_ddp_gradients_are_those_of_one_process_with_all_rows_and_one_folder_is_saved(ranks, base):
    for found in ranks:
        assert found["ddp"][base]["apart"] <= 1e-5
        assert found["ddp"][base]["loaded"] == 0


def test_gradients_are_summed_over_processes_and_missing_ones_stay_missing(ranks):
    for found in ranks:
        assert found["summed"] == {"first": [3.0, 3.0], "second": [3.0, 3.0, 3.0], "third": None, "same": [0.0, 7.0]}


def test_a_model_without_blocks_is_not_sharded(ranks):
    assert "no blocks are recognised in Sequential" in ranks[0]["refused"]


def test_a_run_with_a_sharded_base_learns_what_one_process_does(tmp_path):
    tiny_lm(tmp_path / "lm")
    rows = [{"prompt": f"What is the colour of {i}?", "completion": ("blue", "red")[i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = ["--task", "causal_lm", "--model", "lm", "--data", "rows.jsonl", "--steps", "4", "--method", "dora"]
    said += ["--set", "train.precision=fp32", "--set", "train.threads=1"]
    told = launched(
        *["-m", "smidgen", "tune", *said, "--out", "two", "--batch", "4", "--set", "train.shard=true"], cwd=tmp_path
    )
    assert "in each of 2 processes, of " in told
    alone = [sys.executable, "-m", "smidgen", "tune", *said, "--out", "one", "--batch", "8"]
    subprocess.run(alone, cwd=tmp_path, check=True, capture_output=True)
    one, two = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5)
    notes = [json.loads((tmp_path / out / "smidgen.json").read_text()) for out in ("one", "two")]
    assert notes[0]["base"]["fingerprint"] == notes[1]["base"]["fingerprint"]


def test_a_run_of_two_processes_that_one_of_them_stops_is_resumed_to_the_bits_of_an_unbroken_one(tmp_path):
    tiny_bert(tmp_path / "bert")
    write_csv(tmp_path / "reviews.csv", reviews(60))
    (tmp_path / "recipe.yaml").write_text(
        "model: bert\ndata: reviews.csv\nmethod: {name: lora, dropout: 0.2}\n"
        "train: {steps: 6, batch: 4, learning_rate: 0.002, evaluate_every: 3, precision: fp32, threads: 1}\n"
    )
    told = launched(Path(__file__).with_name("stopped.py"), cwd=tmp_path)
    for rank in range(2):
        assert f"{rank}: stopped at step 4 of 6; all is saved, continue with --resume" in told
    assert "Resuming at step 4 of 6" in told
    reports = [json.loads((tmp_path / out / "report.json").read_text()) for out in ("unbroken", "stopped")]
    assert reports[0]["best_step"] == reports[1]["best_step"] == 6  # what is kept was learned after the stop
    assert reports[0]["curves"] == reports[1]["curves"]
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_one_process_alone_has_nobody_to_share_a_base_with(tmp_path):
    from smidgen.recipes.run import tune

    tiny_bert(tmp_path / "bert")
    write_csv(tmp_path / "reviews.csv", reviews(40))
    recipe = {"model": str(tmp_path / "bert"), "data": str(tmp_path / "reviews.csv"), "train": {"shard": True}}
    with pytest.raises(RecipeError, match=r"this run is one: start it with torchrun --nproc-per-node N"):
        tune(Recipe.model_validate(recipe | {"out": str(tmp_path / "out")}), resume=False, fresh=False, console=None)
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_not_sharded():
    with pytest.raises(ValidationError, match="the pieces of a quantised base are not spread over processes"):
        Recipe.model_validate({"model": {"path": "m", "quantize": "nf4"}, "data": "d.csv", "train": {"shard": True}})


def test_a_sharded_base_is_not_compared_with_full_fine_tuning():
    with pytest.raises(ValidationError, match="a base in shards is not fine-tuned whole"):
        Recipe.model_validate(
            {"model": "m", "data": "d.csv", "train": {"shard": True}, "report": {"against": ["full"]}}
        )
