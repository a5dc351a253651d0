"""A run as one page, for whoever was not there: nothing of it comes from elsewhere, and nothing in it is executed.

Whatever a run has written (names, messages, values of a config) may be anything: all of it goes through `drawing.text`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ddpkit.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, UserError

from . import curves, history, telling
from .accounting import PHASES
from .curves import Curve, Recording, Spread
from .drawing import axis, bar, chart, nice_steps, number, picture, text
from .history import Line, is_number
from .status import Status, read_status
from .telling import clock_time, duration

_CHARTS = 60  # of a run that records more values, the first
_MARKS = 40  # restarts that are marked in each chart
_ROWS = 50  # attempts, and ranks, in a table
_LANE = 16  # height of a lane of the timeline
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: Path, out: Path) -> None:
    """Write the page of a run; reads all of its metrics.

    Args:
        run_dir: of the run.
        out: replaced whole.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    if not out.absolute().parent.is_dir():
        raise UserError(f"report: {out}: there is no directory {out.absolute().parent}")
    if out.is_dir():
        raise UserError(f"report: {out} is a directory; give the name of a file, such as {out / 'report.html'}")
    made = page(run_dir)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.write_text(made, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"report: {out} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def page(run_dir: Path) -> str:
    """The page as HTML."""
    status, told = read_status(run_dir), history.events(run_dir)
    recording = curves.read(run_dir / "metrics.jsonl")
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    name = text(Path(status.run_dir).absolute().name)
    sections = (
        _head(status),
        _failure(run_dir, status),
        _charts(recording, _restarts(told)),
        _timeline(status, told),
        _time(status),
        _ranks(recording),
        _checkpoints(status, told),
        _config(run_dir),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
        f"<title>{name} · ddpkit</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + f'\n<footer class="dim">ddpkit report, {text(clock_time(status.at))}</footer>\n</main></body></html>\n'
    )


def _section(title: str, inside: str, kind: str = "card") -> str:
    return f'<section><h2>{text(title)}</h2><div class="{kind}">{inside}</div></section>' if inside else ""


def _head(status: Status) -> str:
    state = f'<span class="state {status.state.split()[0]}">{text(status.state)}</span>'
    facts = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in _facts(status))
    track = ""
    if status.total_steps:
        part = min(1.0, status.step / status.total_steps)
        track = f'<div class="track"><i style="width:{part:.1%}"></i></div>'
    more = [f"ended early: {status.ended_early}"] if status.ended_early is not None else []
    if status.job is not None:
        more.append(f"waits for Slurm job {status.job}")
    notes = "".join(f"<p>{text(note)}</p>" for note in more + status.notes)
    return (
        f"<header><h1>{text(Path(status.run_dir).absolute().name)} {state}</h1>"
        f'<p class="dim">{text(status.run_dir)}</p>{track}{notes}<dl class="facts">{facts}</dl></header>'
    )


def _facts(status: Status) -> Iterator[tuple[str, str]]:
    of_steps = f" of {number(status.total_steps)}" if status.total_steps is not None else ""
    of_epochs = f" of {status.epochs}" if status.epochs is not None and status.max_steps is None else ""
    yield "step", f"{number(status.step, 6)}{of_steps}"
    yield "epoch", f"{status.epoch}{of_epochs}"
    yield "samples", number(status.samples)
    if status.samples_per_s is not None:
        yield "samples a second", number(status.samples_per_s)
    if status.eta_s is not None and status.state == "running":
        yield "to the end", duration(status.eta_s)
    if status.goodput is not None:
        yield "goodput", f"{status.goodput:.0%}"
    yield "attempts", str(len(status.attempts))
    for kind, line in status.metrics.items():
        if is_number(line.get("loss")):
            yield f"loss ({kind})", number(line["loss"])
    if status.best is not None:
        yield f"best {status.best['metric']}", f"{number(status.best['value'])}, step {status.best['step']}"


def _failure(run_dir: Path, status: Status) -> str:
    """The newest report; of a run that has gone on since, closed."""
    tree = history.json_file(run_dir / "failure.json")
    if tree is None:
        return ""
    said = ": ".join(str(each) for each in (tree.get("kind"), tree.get("message")) if each)
    inside = (
        f"<b>rank {text(tree.get('rank'))} on {text(tree.get('host'))} failed</b> "
        f'<span class="dim">in attempt {text(tree.get("attempt"))}</span>{_block(said)}'
    )
    inside += _block(tree.get("traceback"))
    inside += _block("\n".join(str(line) for line in _listed(tree.get("last_lines"))))
    for other in [each for each in _listed(tree.get("others")) if isinstance(each, dict)][:_ROWS]:
        first = (str(other.get("message") or "").splitlines() or [""])[0]
        inside += f"<p>then rank {text(other.get('rank'))}: {text(other.get('kind') or '')} {text(first)}</p>"
    if tree.get("log"):
        inside += f'<p class="dim">its output: {text(tree["log"])}</p>'
    if status.failure is None:
        return _section("A failure before", f"<details><summary>the run has gone on since</summary>{inside}</details>")
    return _section("Failure", inside, "card failure")


def _block(content: object) -> str:
    return f"<pre>{text(str(content).rstrip())}</pre>" if content else ""


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _restarts(told: Sequence[Line]) -> list[float]:
    steps = {event["step"] for event in told if event["event"] == "restored" and isinstance(event.get("step"), int)}
    return sorted(steps)[-_MARKS:]


def _charts(recording: Recording, restarts: Sequence[float]) -> str:
    span = recording.span
    made = [
        chart(name, _called(of_kind), span, marks=restarts)
        for name, of_kind in list(recording.values.items())[:_CHARTS]
    ]
    made.append(chart("Learning rate", recording.rates, span, marks=restarts, may_be_logarithmic=False))
    made.append(
        chart(
            "Throughput",
            _in_words(recording.speed),
            span,
            marks=restarts,
            from_zero=True,
            may_be_logarithmic=False,
        )
    )
    made.append(chart("Time of a step", _in_words(recording.phases), span, marks=restarts, unit="seconds, by phase"))
    made.append(
        chart("Memory", _in_words(recording.memory), span, marks=restarts, from_zero=True, unit="MB on a rank, mean")
    )
    told = ""
    if restarts:
        told = '<p class="dim">Dotted lines: steps at which the run went on after a restart.</p>'
    if (left := len(recording.values) - _CHARTS) > 0:
        told += f'<p class="dim">{left} more values are recorded in metrics.jsonl.</p>'
    charts = "".join(made)
    return f'<section><h2>Curves</h2><div class="charts">{charts}</div>{told}</section>' if charts else ""


_WORDS = PHASES | {
    "communication_s": "exchange of gradients (part of it)",
    "samples_per_s": "samples a second",
    "host_mb": "process",
    "device_mb": "GPU, peak",
}


def _in_words(found: Mapping[str, Curve]) -> dict[str, Curve]:
    return {_WORDS[name]: curve for name, curve in found.items()}


def _called(of_kind: Mapping[str, Curve]) -> dict[str, Curve]:
    """The step's own first, whatever came first in the file."""
    return dict(sorted(of_kind.items(), key=lambda item: item[0] != "train"))


def _timeline(status: Status, told: Sequence[Line]) -> str:
    attempts = [each for each in status.attempts if is_number(each.get("started"))]
    if not attempts:
        return ""
    begin = min(each["started"] for each in attempts)
    at_work = status.state in ("running", "starting")
    end = max([each.get("seen", begin) for each in attempts] + ([status.at] if at_work else []))
    clock = _Clock(begin, max(end - begin, 1e-3))
    newest = attempts[-1]
    spans = "".join(_span(each, clock, status, end if each is newest and at_work else None) for each in attempts)
    lanes = _lane(f"attempts, since {clock_time(begin)}", spans)
    for name, kinds in _LANES.items():
        found = [event for event in told if event["event"] in kinds and is_number(event.get("unix"))]
        lanes += _lane(f"{name}: {len(found)}", _ticks(found, clock, kinds)) if found else ""
    ticks = [(seconds / clock.length, duration(seconds)) for seconds in _clock_steps(clock.length)]
    inside = f'<div class="lanes">{lanes}{axis(ticks)}</div>{_attempts(status)}'
    return _section("Attempts", inside)


_LANES: dict[str, dict[str, str]] = {
    "saves": {"saved": "saved"},
    "stops": {"stopped": "stopped", "requeued": "stopped"},
    "failures and skipped steps": {
        "failed": "failed",
        "save_failed": "failed",
        "set_aside": "failed",
        "skipped": "failed",
    },
}
"""Events by the lane they are shown in, and what they look like."""


class _Clock:
    """Which part of the timeline a moment is at."""

    def __init__(self, begin: float, length: float) -> None:
        self.begin = begin
        self.length = length

    def part(self, unix: float) -> float:
        return min(1.0, max(0.0, (unix - self.begin) / self.length))


def _span(attempt: Line, clock: _Clock, status: Status, until: float | None) -> str:
    end: float = until or attempt.get("ended") or attempt.get("seen") or attempt["started"]
    title = (
        f"attempt {attempt['attempt']}: {telling.how(attempt, status)}, {duration(max(0.0, end - attempt['started']))}"
    )
    left = clock.part(attempt["started"])
    found = bar(left, clock.part(end), _LANE, _kind(attempt, until is not None), title)
    if is_number(attempt.get("began")) and attempt["began"] > attempt["started"]:
        found += bar(left, clock.part(min(attempt["began"], end)), _LANE, "start", f"{title}; it starts")
    return found


def _kind(attempt: Line, at_work: bool) -> str:
    """What an attempt's bar looks like, by how it ended."""
    if at_work:
        return "running"
    how, code = str(attempt.get("how", "")), attempt.get("exit_code")
    if "requeued" in attempt or code in (EXIT_STOPPED, EXIT_INTERRUPTED) or how.startswith("stopped"):
        return "stopped"
    if code == EXIT_DONE or how == "done":
        return "done"
    return "failed" if how else "lost"


def _ticks(found: Sequence[Line], clock: _Clock, kinds: Mapping[str, str]) -> str:
    """A line for each event; of those that fall together the newest, with its words."""
    columns: dict[int, Line] = {int(clock.part(event["unix"]) * curves.COLUMNS): event for event in found}
    return "".join(
        bar(part := clock.part(event["unix"]), part + 0.003, _LANE, kinds[event["event"]], _told(event))
        for event in columns.values()
    )


def _told(event: Line) -> str:
    why = event.get("reason") or event.get("cause") or event.get("problem")
    return f"{event['event']} at step {event.get('step')}" + (f": {why}" if why else "")


def _lane(title: str, inside: str) -> str:
    return f'<div class="lane"><small>{text(title)}</small>{picture(_LANE, inside, title)}</div>'


def _clock_steps(length: float) -> list[float]:
    """Moments to write under a timeline: round numbers of the unit that fits."""
    unit = next(size for size in (86400.0, 3600.0, 60.0, 1.0, 0.001) if length >= 2 * size or size == 0.001)
    return [tick * unit for tick in nice_steps(0, length / unit, 4) if tick * unit < 0.75 * length] + [length]


def _attempts(status: Status) -> str:
    rows = [
        (
            ("attempt", str(attempt["attempt"])),
            ("started", clock_time(attempt["started"]) if is_number(attempt.get("started")) else ""),
            ("took", _took(attempt)),
            ("steps", _steps(attempt)),
            ("ranks", str(attempt.get("ranks") or "")),
            ("where", _where(attempt)),
            ("end", telling.how(attempt, status)),
        )
        for attempt in status.attempts
    ]
    earlier, newest = rows[:-_ROWS], rows[-_ROWS:]
    more = f"<details><summary>{len(earlier)} earlier ones</summary>{_table(earlier)}</details>" if earlier else ""
    return _table(newest) + more


def _table(rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Of plain texts; on a narrow screen each row is a block of its own, and each cell says what it is."""
    if not rows:
        return ""
    heads = "".join(f"<th>{text(name)}</th>" for name, _ in rows[0])
    body = "".join(
        "<tr>" + "".join(f'<td data-name="{text(name)}">{text(value)}</td>' for name, value in row) + "</tr>"
        for row in rows
    )
    return f'<table class="rows"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _took(attempt: Line) -> str:
    if is_number(attempt.get("started")) and is_number(attempt.get("ended")):
        return duration(max(0.0, attempt["ended"] - attempt["started"]))
    return ""


def _steps(attempt: Line) -> str:
    if attempt.get("from_step") is None:
        return ""
    return (
        f"{attempt['from_step']} to {attempt['to_step']}"
        if attempt.get("to_step") is not None
        else f"{attempt['from_step']} on"
    )


def _where(attempt: Line) -> str:
    job = f"job {attempt['job']}" if "job" in attempt else None
    return ", ".join(str(each) for each in (attempt.get("launcher"), job, attempt.get("host")) if each)


def _time(status: Status) -> str:
    """Where the time since the first start went, and that of training."""
    inside = ""
    if status.account is not None:
        inside += _stack(telling.parts(status.account), f"{duration(status.account.wall_s)} since the first start")
        inside += (
            f"<p><b>Goodput {status.account.goodput:.0%}</b> "
            '<span class="dim">is the first part: time in steps that survive. A step that was done again counts once.'
            "</span></p>"
        )
    if any(status.phases.values()):
        inside += _stack([(PHASES[name], seconds) for name, seconds in status.phases.items()], "training, by phase")
    return _section("Where the time went", inside)


def _stack(parts: Sequence[tuple[str, float]], title: str) -> str:
    whole = sum(seconds for _, seconds in parts) or 1.0
    bars = "".join(f'<i class="c{index}" style="width:{each[1] / whole:.2%}"></i>' for index, each in enumerate(parts))
    keys = "".join(
        f'<span class="key"><i class="c{index}"></i>{text(name)} <b>{seconds / whole:.1%}</b> '
        f"<small>{duration(seconds)}</small></span>"
        for index, (name, seconds) in enumerate(parts)
        if seconds > 0
    )
    stack = f'<div class="stack">{bars}</div><div class="keys">{keys}</div>'
    return f'<div class="lane"><small>{text(title)}</small>{stack}</div>'


def _ranks(recording: Recording) -> str:
    """Step times of each rank, and what of them it spent waiting."""
    steps = recording.by_rank.get("step_s", {})
    if not steps:
        return ""
    parts = [name for name in _WAITS if any(each.high > 0 for each in recording.by_rank.get(name, {}).values())]
    longest = max(spread.mean for spread in steps.values()) or 1.0
    exchanges = recording.by_rank.get("communication_s", {})
    waits = {rank: exchanges[rank].mean if rank in exchanges else 0.0 for rank in steps}
    shown = sorted(sorted(steps, key=lambda rank: waits[rank] - steps[rank].mean)[:_ROWS])
    heads = "".join(f"<th>{text(words)}</th>" for words in ("rank", "seconds a step", "mean", "from, to"))
    heads += "".join(f"<th>{text(_WAITS[name])}</th>" for name in parts)
    rows = "".join(_rank(rank, recording.by_rank, parts, longest) for rank in shown)
    keys = "".join(
        f'<span class="key"><i class="{kind}"></i>{text(words)}</span>'
        for kind, words in (("work", "the rest of the step"), *((name, _WAITS[name]) for name in parts))
    )
    left = f"Of {len(steps)} ranks the {_ROWS} that wait least for the others. " if len(steps) > _ROWS else ""
    return _section(
        "Ranks",
        f'<table class="rows"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        f'<div class="keys">{keys}</div>'
        f'<p class="dim">{left}From the recorded lines, each of which has the mean of its steps. Ranks wait for each '
        "other within a step, so their times are nearly alike: the one that holds the others up is the one that waits "
        "least in the exchange of gradients.</p>",
    )


_WAITS = {"data_s": "waiting for data", "communication_s": "exchange of gradients"}


def _rank(rank: int, by_rank: Mapping[str, Mapping[int, Spread]], parts: Sequence[str], longest: float) -> str:
    """A row: the mean step as a bar of what it consists of, and the numbers."""
    step = by_rank["step_s"][rank]
    means = {name: by_rank[name][rank].mean for name in parts if rank in by_rank[name]}
    inside, place = "", 0.0
    for name, seconds in {"work": max(0.0, step.mean - sum(means.values())), **means}.items():
        inside += bar(place / longest, (place + seconds) / longest, 12, name)
        place += seconds
    cells = [("mean", number(step.mean, 3)), ("from, to", f"{number(step.low, 3)} to {number(step.high, 3)}")]
    cells += [(_WAITS[name], number(means[name], 3) if name in means else "") for name in parts]
    return (
        f'<tr><td data-name="rank">{rank}</td><td class="wide">{picture(12, inside, f"step time of rank {rank}")}</td>'
        + "".join(f'<td data-name="{text(name)}">{text(value)}</td>' for name, value in cells)
        + "</tr>"
    )


def _checkpoints(status: Status, told: Sequence[Line]) -> str:
    saved = {event.get("step"): event for event in told if event["event"] == "saved"}
    rows = [
        (
            ("step", str(step)),
            ("state", condition),
            ("size", _size(saved.get(step, {}).get("bytes"))),
            ("written in", _seconds(saved.get(step, {}).get("seconds"))),
            ("training held", _seconds(saved.get(step, {}).get("held_s"))),
        )
        for step, condition in [
            *status.checkpoints.items(),
            *((step, "broken, set aside earlier") for step in status.set_aside),
        ]
    ]
    return _section("Checkpoints", _table(rows))


def _size(count: object) -> str:
    return f"{number(float(count))}B" if isinstance(count, int) else ""


def _seconds(seconds: object) -> str:
    return duration(float(seconds)) if isinstance(seconds, (int, float)) else ""


def _config(run_dir: Path) -> str:
    try:
        content = (run_dir / "config.yaml").read_text(errors="replace")
    except OSError:
        return ""
    return _section("Config", f"<details><summary>config.yaml</summary>{_block(content)}</details>")
