"""Charts as pieces of a page: lines and bars in SVG that stretches, words in HTML that does not.

So one page is right at every width. Nothing of it needs a script.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from .curves import Curve, Point

_WIDTH, _HEIGHT = 1000, 300  # of the pictures' own coordinates
_DOTTED = 60  # a curve of so few points shows them
_WIDE = 100.0  # a curve that spans so much is drawn on a logarithmic scale
_COLOURS = 6
_SMALLEST = 1e-300  # beyond it is nothing to be seen


def text(value: object) -> str:
    """Anything that comes from a run, as text of a page and of an attribute; lines stay lines."""
    shown = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in str(value))
    return html.escape(shown, quote=True)


def number(value: float, digits: int = 4) -> str:
    """Short: "0.01234", "12.3k", "4.5M"."""
    if not 1e4 <= abs(value) < 1e15:
        whole = 4 if 100 <= abs(value) < 1e4 else 1  # no power of ten where all digits have room
        return f"{value:.{max(digits, whole)}g}"
    size, unit = next(each for each in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= each[0])
    return f"{value / size:.{digits}g}{unit}"


def chart(
    title: str,
    curves: Mapping[str, Curve],
    span: float,
    *,
    marks: Sequence[float] = (),
    from_zero: bool = False,
    may_be_logarithmic: bool = True,
    unit: str = "",
) -> str:
    """A figure of some curves over steps; empty if none of them has a point.

    Args:
        title: above it.
        curves: by what they are called.
        span: the last step.
        marks: steps at which something happened: faint lines.
        from_zero: whether the scale begins there.
        may_be_logarithmic: whether the scale may be, where values are far apart.
        unit: of the values.
    """
    points = {name: found for name, curve in curves.items() if (found := curve.points())}
    if not points:
        return ""
    low = min(curves[name].low for name in points)
    high = max(curves[name].high for name in points)
    is_log = may_be_logarithmic and low > 0 and high / low >= _WIDE
    scale = _Scale.of(low, high, is_log, from_zero)
    lines = "".join(_line(found, span, scale, index) for index, found in enumerate(points.values()))
    faint = "".join(f'<path class="mark" d="M{_x(step, span):.1f} 0V{_HEIGHT}"/>' for step in marks)
    grid = "".join(f'<path class="grid" d="M0 {y:.1f}H{_WIDTH}"/>' for y in (scale.y(tick) for tick in scale.ticks))
    ys = "".join(
        f'<span style="top:{scale.y(tick) / _HEIGHT:.1%}">{words}</span>'
        for tick, words in zip(scale.ticks, _told_apart(scale.ticks), strict=True)
    )
    notes = ", ".join(filter(None, (unit, "logarithmic" if is_log else "")))
    return (
        f'<figure class="chart"><figcaption><b>{text(title)}</b><small>{text(notes)}</small>'
        f"{_legend({name: curves[name] for name in points})}</figcaption>"
        f'<div class="plot"><div class="ys">{ys}</div>'
        f"{picture(_HEIGHT, grid + faint + lines, f'{title} over steps')}</div>{axis(_steps(span))}</figure>"
    )


def picture(height: int, inside: str, label: str) -> str:
    """An SVG that takes the room it is given."""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" preserveAspectRatio="none" role="img" aria-label="{text(label)}">'
        f"{inside}</svg>"
    )


def axis(ticks: Sequence[tuple[float, str]]) -> str:
    """Words under a picture, each at a part of its width."""
    spans = "".join(f'<span style="left:{part:.1%}"{_side(part)}>{text(words)}</span>' for part, words in ticks)
    return f'<div class="xs">{spans}</div>'


def bar(begin: float, end: float, height: int, kind: str, title: str = "") -> str:
    """A bar from one part of the width to another; never too thin to be seen."""
    width = max((end - begin) * _WIDTH, 1.5)
    told = f"<title>{text(title)}</title>" if title else ""
    return (
        f'<rect class="{kind}" x="{min(begin * _WIDTH, _WIDTH - width):.1f}" y="0" width="{width:.1f}" '
        f'height="{height}">{told}</rect>'
    )


def nice_steps(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, a few of them."""
    room = high - low
    if not room > _SMALLEST:
        return [low]
    size = 10.0 ** math.floor(math.log10(room / most))
    step = next(size * factor for factor in (1, 2, 5, 10) if room / (size * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """Where a value is drawn."""

    def __init__(self, low: float, high: float, is_log: bool, ticks: Sequence[float]) -> None:
        self._is_log = is_log
        self._low, self._high = self._placed(low), self._placed(high)
        self.ticks = ticks

    @classmethod
    def of(cls, low: float, high: float, is_log: bool, from_zero: bool) -> _Scale:
        if is_log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            every = max(1, math.ceil(len(powers) / 6))
            inside = [10.0**power for power in powers if power % every == 0 and low <= 10.0**power <= high]
            return cls(low, high, True, inside)
        low = min(low, 0.0) if from_zero else low
        margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        low, high = (low if from_zero and low == 0.0 else low - margin), high + margin
        return cls(low, high, False, nice_steps(low, high, 5))

    def y(self, value: float) -> float:
        return _HEIGHT * (1 - (self._placed(value) - self._low) / (self._high - self._low))

    def _placed(self, value: float) -> float:
        return math.log10(value) if self._is_log else value


def _told_apart(values: Sequence[float]) -> list[str]:
    """Each value in as many digits as it takes."""
    for digits in range(4, 12):
        words = [number(value, digits) for value in values]
        if len(set(words)) == len(words):
            break
    return words


def _x(step: float, span: float) -> float:
    return min(step / span, 1.0) * _WIDTH if span > 0 else _WIDTH / 2


def _line(points: Sequence[Point], span: float, scale: _Scale, index: int) -> str:
    places = [f"{_x(x, span):.1f} {scale.y(y):.1f}" for x, y in points]
    colour = f"c{index % _COLOURS}"
    found = f'<path class="line {colour}" data-points="{len(points)}" d="M{"L".join(places)}"/>'
    if len(points) <= _DOTTED:
        found += f'<path class="dots {colour}" d="{"".join(f"M{place}h0" for place in places)}"/>'
    return found


def _legend(curves: Mapping[str, Curve]) -> str:
    return "".join(
        f'<span class="key"><i class="c{index % _COLOURS}"></i>{text(name)} <b>{number(curve.last)}</b>'
        f" <small>({number(curve.low, 3)} to {number(curve.high, 3)}{_missing(curve)})</small></span>"
        for index, (name, curve) in enumerate(curves.items())
    )


def _missing(curve: Curve) -> str:
    return f"; {curve.missing} not finite" if curve.missing else ""


def _steps(span: float) -> list[tuple[float, str]]:
    if span <= 0:
        return [(0.5, "step 0")]
    ticks = [tick for tick in nice_steps(0, span, 5) if tick < 0.75 * span]
    return [(tick / span, number(tick)) for tick in ticks] + [(1.0, f"step {number(span)}")]


def _side(part: float) -> str:
    """Words at the ends stay inside."""
    return ' class="first"' if part < 0.02 else ' class="last"' if part > 0.98 else ""
