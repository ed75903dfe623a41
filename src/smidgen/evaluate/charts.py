"""The drawings of report.html as inline SVG: learning curves, interval bars, the confusion matrix.

Colours are classes that `style.py` fills in for light and dark. A drawing is small enough (420 wide) to stay readable
when a phone shrinks it; the confusion matrix keeps its size and scrolls.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from smidgen.evaluate.markup import Markup, element, join
from smidgen.evaluate.units import share_text

Curve = Sequence[tuple[int, float]]  # (step, value)
TextOf = Callable[[float], str]  # a value as it is shown

WIDTH, HEIGHT = 420.0, 238.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 398.0, 24.0, 200.0  # the plotting area
MOST_POINTS = 80  # of a curve; more are averaged in groups, which also calms a noisy training loss


def learning_curves(title: str, curves: Mapping[str, Curve], best_step: int | None, text_of: TextOf) -> Markup:
    """One figure with all curves on one axis; the best step is a dashed line, with a dot on the validation curves."""
    finite = {name: [point for point in curve if math.isfinite(point[1])] for name, curve in curves.items()}
    drawn = {name: _thinned(curve) for name, curve in finite.items() if curve}
    points = [point for curve in drawn.values() for point in curve]
    if not points:
        return Markup("")
    x_ticks = ticks(min(step for step, _ in points), max(step for step, _ in points))
    y_ticks = ticks(min(value for _, value in points), max(value for _, value in points))

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = [element("line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), class_="grid") for tick in y_ticks]
    parts += [
        element("text", text_of(tick), x=LEFT - 6, y=y(tick) + 4, class_="tick", text_anchor="end") for tick in y_ticks
    ]
    parts += [
        element("text", f"{tick:,.0f}", x=x(tick), y=BOTTOM + 16, class_="tick", text_anchor="middle")
        for tick in x_ticks
        if tick == round(tick)  # there is no half step
    ]
    parts.append(element("text", "step", x=(LEFT + RIGHT) / 2, y=HEIGHT - 4, class_="tick", text_anchor="middle"))
    if best_step is not None and x_ticks[0] <= best_step <= x_ticks[-1]:
        at = x(best_step)
        parts.append(element("line", x1=at, x2=at, y1=TOP - 4, y2=BOTTOM, class_="best"))
        anchor = "end" if at > (LEFT + RIGHT) / 2 else "start"
        parts.append(
            element("text", f"best: step {best_step:,}", x=at, y=TOP - 9, class_="tick strong", text_anchor=anchor)
        )
    for number, (name, curve) in enumerate(drawn.items()):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        parts.append(element("polyline", points=path, class_=f"curve c{number % 4}"))
        marked = [point for point in curve if point[0] == best_step and name.startswith("valid")]
        marked = marked if len(curve) > 1 else curve  # a line of one point would be invisible
        parts += [element("circle", cx=x(s), cy=y(v), r=4, class_=f"dot c{number % 4}") for s, v in marked]
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}", role="img", aria_label=title)
    legend = [element("span", _swatch(number % 4), name, class_="key") for number, name in enumerate(drawn)]
    return element("figure", element("figcaption", element("b", title), *legend), drawing)


def interval_bar(value: float, low: float, high: float, start: float, end: float, *, strong: bool) -> Markup:
    """A dot with its interval on an axis from `start` to `end`; nothing where the value is not finite."""
    if not all(map(math.isfinite, (value, low, high, start, end))):
        return Markup("")
    scale = 144 / (end - start) if end > start else 0.0

    def x(at: float) -> float:
        return 8 + (at - start) * scale if scale else 80.0

    return element(
        "svg",
        element("line", x1=8, x2=152, y1=10, y2=10, class_="grid"),
        element("line", x1=x(low), x2=x(high), y1=10, y2=10, class_="interval strong" if strong else "interval"),
        element("circle", cx=x(value), cy=10, r=5, class_="dot c0" if strong else "dot c2"),
        viewBox="0 0 160 20",
        class_="bar",
        aria_hidden="true",  # the figures stand beside it
    )


def confusion_matrix(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Markup:
    """Rows are the truth, columns the prediction; shaded by the share of the row. It keeps its size and scrolls."""
    classes = len(labels)
    cell = 64.0 if classes <= 4 else 42.0 if classes <= 12 else 30.0 if classes <= 20 else 24.0
    short = [label if len(label) <= 16 else label[:15] + "\u2026" for label in labels]
    left = 16 + 7.5 * max(map(len, short))  # 7.5 pixels: a wide letter at 12 pixels
    flat = classes <= 4 and all(len(label) <= 8 for label in short)
    top = 42.0 if flat else 34 + 0.72 * (left - 16)
    parts = [
        element("text", "predicted", x=left, y=12, class_="tick"),
        element("text", "truth", x=left - 8, y=top - 6, class_="tick", text_anchor="end"),
    ]
    for number, (full, name) in enumerate(zip(labels, short, strict=True)):
        at = (number + 0.5) * cell
        parts.append(
            element("text", element("title", full), name, x=left - 8, y=top + at + 4, class_="name", text_anchor="end")
        )
        turned = {"text_anchor": "middle"} if flat else {"transform": f"rotate(-45 {left + at:.1f} {top - 8:.1f})"}
        parts.append(element("text", element("title", full), name, x=left + at, y=top - 8, class_="name", **turned))
    for row, truth in enumerate(labels):
        total = sum(counts[row])
        for column, predicted in enumerate(labels):
            count = counts[row][column]
            share = count / total if total else 0.0
            x, y = left + column * cell, top + row * cell
            title = f"truth {truth}, predicted {predicted}: {count:,} ({share_text(share)} of {total:,})"
            shade = {"fill_opacity": f"{share:.2f}"}
            tile = element("rect", x=x, y=y, width=cell - 2, height=cell - 2, rx=3, class_="empty")
            fill = "right" if row == column else "wrong"
            inner = element("rect", x=x, y=y, width=cell - 2, height=cell - 2, rx=3, class_=fill, **shade)
            number_class = "count full" if share > 0.55 else "count"
            text = _short_count(count, cell) if count else ""
            figure = element("text", text, x=x + cell / 2 - 1, y=y + cell / 2 + 4, class_=number_class)
            parts.append(element("g", element("title", title), tile, inner, *([figure] if text else [])))
    width = left + classes * cell + (0 if flat else 0.72 * (left - 16))  # room for the last turned name
    height = top + classes * cell
    size = {"viewBox": f"0 0 {width:.0f} {height:.0f}", "width": f"{width:.0f}", "height": f"{height:.0f}"}
    return element("svg", join(*parts), **size, class_="fixed", role="img", aria_label="confusion matrix")


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round values (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    if not high > low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [number * step for number in range(first, last + 1)]


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[float, float]]:
    group = math.ceil(len(curve) / MOST_POINTS)
    if group <= 1:
        return [(float(step), value) for step, value in curve]
    groups = [curve[start : start + group] for start in range(0, len(curve), group)]
    return [(sum(step for step, _ in g) / len(g), sum(value for _, value in g) / len(g)) for g in groups]


def _swatch(number: int) -> Markup:
    line = element("line", x1=1, x2=21, y1=5, y2=5, class_=f"curve c{number}")
    return element("svg", line, viewBox="0 0 22 10", class_="swatch", aria_hidden="true")


def _short_count(count: int, cell: float) -> str:
    """The count, in thousands where the cell has no room for it."""
    text = f"{count:,}" if cell > 40 else str(count)
    return text if 7 * len(text) <= cell else f"{count / 1000:.0f}k"
