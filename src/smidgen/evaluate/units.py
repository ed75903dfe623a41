"""Figures as people read them: 84.2 %, 0.31 %, 412 KB, 1 min 23 s.  Plain ASCII, so they survive any terminal.

A metric that is a share, or that its field gives in per cent all the same, as WER (`SHARES`), is shown in per cent and
its differences in points; any other, correlations among them, as a plain number. What is undefined (None or NaN) is
"n/a". Bytes are decimal: 1 KB = 1000 bytes.
"""

import math
import re

SHARES = frozenset(
    {"accuracy", "balanced_accuracy", "token_accuracy", "exact_match", "top_5_accuracy", "f1", "macro_f1", "micro_f1"}
    | {"weighted_f1", "precision", "recall", "macro_precision", "macro_recall", "error_rate"}
    | {"map50", "map50_95", "ndcg", "mrr"}
    | {"rouge_l", "cer", "wer"}  # of the two rates, above 1 where more is written than there is
)

NONE = "n/a"


def metric_text(name: str, value: float) -> str:
    """One value of the metric `name`: "84.2 %" for a share, "0.613" otherwise."""
    if math.isnan(value):
        return NONE
    return f"{100 * value:.1f} %" if is_share(name) else number_text(value)


def interval_text(name: str, low: float, high: float) -> str:
    """An interval of the metric `name`: "[82.5, 85.9]", in per cent or points for a share."""
    if math.isnan(low) or math.isnan(high):
        return f"[{NONE}]"
    if is_share(name):
        return f"[{_unsigned_zero(f'{100 * low:.1f}')}, {_unsigned_zero(f'{100 * high:.1f}')}]"
    size = max(abs(low), abs(high))
    return f"[{number_text(low, size)}, {number_text(high, size)}]"


def difference_text(name: str, value: float) -> str:
    """A difference of two values of the metric `name`: "6.2 points" for a share, "0.062" otherwise."""
    if math.isnan(value):
        return NONE
    return f"{_unsigned_zero(f'{100 * value:.1f}')} points" if is_share(name) else number_text(value)


def number_text(value: float, size: float | None = None) -> str:
    """A number with as many decimals as a number of `size` (its own, if left out) deserves."""
    size = abs(value) if size is None else size
    if math.isnan(value):
        return NONE
    if 0 < size < 0.001 or (math.isfinite(size) and size >= 1e9):
        return f"{value:.1e}"
    decimals = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    return _unsigned_zero(f"{value:,.{decimals}f}")


def share_text(share: float) -> str:
    """A share in per cent, two significant digits when small: "100 %", "12.3 %", "0.31 %", "0.0042 %"."""
    percent = 100 * share
    if math.isnan(percent):
        return NONE
    if percent in (0, 100):
        return f"{percent:.0f} %"
    if percent >= 1:
        return f"{percent:.1f} %"
    return f"{percent:.{1 - math.floor(math.log10(percent))}f} %"


def bytes_text(size_bytes: int | None) -> str:
    """A size: "0 B", "912 B", "412 KB", "1.3 GB"."""
    if size_bytes is None:
        return NONE
    size = float(size_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration: "0.42 s", "23 s", "1 min 23 s", "2 h 5 min"."""
    if math.isnan(seconds):
        return NONE
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def metric_and_part(name: str) -> tuple[str, str | None]:
    """A share with the part of the data that it is about: "f1 PER" is ("f1", "PER"); any other name is whole."""
    metric, _, part = name.partition(" ")
    return (metric, part) if part and is_share(metric) else (name, None)


def is_share(name: str) -> bool:
    """Also of a metric cut off at a rank, or of one part: "recall@10", "f1 PER"."""
    return re.split(r"[ @]", name)[0] in SHARES


def _unsigned_zero(text: str) -> str:
    """ "-0.0" says that something is below zero when nothing visible is."""
    return text.removeprefix("-") if not text.strip("-0.") else text
