from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def benchmarks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are scripts of one folder; what they set in the environment is taken back."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
