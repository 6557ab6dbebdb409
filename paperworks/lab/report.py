"""The report: one HTML file with every number, figure and exhibit in it, and nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from paperworks.core import atomic
from paperworks.lab import figures
from paperworks.lab.paper import Paper
from paperworks.lab.progress import duration
from paperworks.lab.report_style import SCRIPT, STYLE
from paperworks.lab.results import VERDICTS, Design, Outcome
from paperworks.lab.values import Value, ordinal, shown


@dataclass(frozen=True, kw_only=True)
class Section:
    """One claim in the report: its paper, how it came out, its figures by file name, and earlier designs."""

    paper: Paper
    outcome: Outcome
    images: Mapping[str, bytes] = field(default_factory=dict)
    earlier: Sequence[Design] = ()

    @property
    def control(self) -> str | None:
        """The control of this claim, in words."""
        return next((claim.control for claim in self.paper.claims if claim.name == self.outcome.name), None)


def write_report(
    path: Path, sections: Sequence[Section], *, title: str, lead: str, environment: Mapping[str, Value]
) -> Path:
    """Write the report whole or not at all and return its path."""
    page = render_report(sections, title=title, lead=lead, environment=environment)
    with atomic.writing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render_report(sections: Sequence[Section], *, title: str, lead: str, environment: Mapping[str, Value]) -> str:
    """The report as HTML; everything that is not markup of ours is escaped."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<button type="button" id="theme" title="Switch between light and dark">◐</button>
<p class="brand">paperworks</p>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{_tally(sections)}
</header>
{_summary(sections)}
{"".join(_card(number, section) for number, section in enumerate(sections, 1))}
<footer>
<h2>Where this was measured</h2>
{_numbers(environment)}
</footer>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _chip(verdict: str) -> str:
    text = "one seed only" if verdict == "one seed" else verdict
    return f'<span class="chip {escape(verdict.replace(" ", "-"))}">{escape(text)}</span>'


def _reach(outcome: Outcome) -> str:
    seeds = f", {len(outcome.seeds)} seeds" if len(outcome.seeds) > 1 else ""
    return f'<small class="reach">{escape(outcome.reach)}{seeds}</small>'


def _tally(sections: Sequence[Section]) -> str:
    counts = Counter(section.outcome.verdict for section in sections)
    chips = "".join(
        f'<span class="count"><b>{counts[verdict]}</b> {_chip(verdict)}</span>'
        for verdict in VERDICTS
        if counts[verdict]
    )
    seconds = sum(section.outcome.seconds for section in sections)
    return f'<p class="tally">{chips}<span class="count"><b>{duration(seconds)}</b> in all</span></p>'


def _summary(sections: Sequence[Section]) -> str:
    rows = "".join(
        f"<tr><td class='number'>{number}</td>"
        f'<td class="claim"><a href="#claim-{number}">{escape(section.outcome.statement)}</a>'
        f"<small>{escape(section.paper.key)}</small></td>"
        f"<td>{escape(section.outcome.paper)}</td>"
        f"<td>{_brief(section.outcome.measured)}</td>"
        f"<td>{_brief(section.outcome.control or {})}</td>"
        f"<td>{_chip(section.outcome.verdict)}{_reach(section.outcome)}</td>"
        f"<td class='number'>{section.outcome.seconds:.1f}</td></tr>"
        for number, section in enumerate(sections, 1)
    )
    heads = "".join(f"<th>{head}</th>" for head in ("", "Claim", "The paper says", "Measured", "Control", "Verdict"))
    return (
        '<div class="wide"><table class="summary"><thead><tr>'
        f"{heads}<th class='number'>Seconds</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _brief(values: Mapping[str, Value], most: int = 3) -> str:
    """Write the first few numbers for the summary table; the card below has them all."""
    if not values:
        return '<span class="none">–</span>'
    lines = [f"{escape(name)} <b>{escape(shown(value))}</b>" for name, value in list(values.items())[:most]]
    return "<br>".join(lines)


def _card(number: int, section: Section) -> str:
    outcome, paper = section.outcome, section.paper
    parts = [
        f'<section class="card" id="claim-{number}">',
        f'<p class="source">{number}. {escape(paper.title)} · {escape(paper.authors)} {paper.year}'
        f" · {escape(paper.ref)}</p>",
        f"<h2>{escape(outcome.statement)} {_chip(outcome.verdict)}</h2>",
        f'<p class="says"><b>The paper:</b> {escape(outcome.paper)}</p>',
    ]
    if section.control:
        parts.append(f'<p class="says"><b>Control:</b> {escape(section.control)}</p>')
    parts += [_figure(name, section.images[name]) for name in outcome.figures if name in section.images]
    parts += [_text(text) for text in outcome.texts]
    parts += [_table(table) for table in outcome.tables]
    if outcome.arms:
        parts.append(_arms(outcome))
    if outcome.measured or outcome.control:
        parts.append('<div class="columns">')
        parts.append(f"<div><h3>Measured</h3>{_numbers(outcome.measured)}</div>")
        if outcome.control:
            parts.append(f"<div><h3>Control</h3>{_numbers(outcome.control)}</div>")
        parts.append("</div>")
    if outcome.interval:
        low, high = shown(outcome.interval["low"]), shown(outcome.interval["high"])
        parts.append(
            f'<p class="interval">{escape(outcome.difference)}: <b>{escape(shown(outcome.interval["mean"]))}</b>, '
            f"95% interval {escape(low)} to {escape(high)} (bootstrap, paired by seed)</p>"
        )
    if outcome.checks and outcome.verdict != "ran":  # a smoke run judges nothing
        checks = "".join(
            f'<li class="{"pass" if passed else "fail"}">{escape(name)}</li>' for name, passed in outcome.checks.items()
        )
        parts.append(f'<ul class="checks">{checks}</ul>')
    if outcome.note:
        tag = "pre" if outcome.verdict == "error" else "p"
        parts.append(f'<{tag} class="note">{escape(outcome.note)}</{tag}>')
    parts.append(_history(section))
    evidence = outcome.kind if outcome.kind == outcome.reach else f"{outcome.kind} · {outcome.reach}"
    parts.append(f'<p class="seconds">{escape(evidence)} · {outcome.seconds:.1f} s</p></section>')
    return "\n".join(parts)


def _arms(outcome: Outcome) -> str:
    """Table of every arm and seed: one row an arm and metric, one column a seed, and the mean."""
    columns = ["arm", "metric", *(f"seed {seed}" for seed in outcome.seeds), "mean"]
    rows = [
        [arm, metric, *values, fmean(values)]
        for arm, metrics in outcome.arms.items()
        for metric, values in metrics.items()
    ]
    return _table({"title": "Arms over seeds", "columns": columns, "rows": rows})


def _history(section: Section) -> str:
    """What the earlier designs of this claim came to."""
    designs = [
        f"<li>{ordinal(number)} design: {escape(design.verdicts[section.outcome.name])}, "
        f"seeds {', '.join(map(str, design.seeds))}{escape(f', {design.date}') if design.date else ''}</li>"
        for number, design in enumerate(section.earlier, 1)
        if section.outcome.name in design.verdicts
    ]
    return f'<p class="says"><b>Earlier:</b></p><ul class="earlier">{"".join(designs)}</ul>' if designs else ""


def _numbers(values: Mapping[str, Value]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(shown(value))}</td></tr>" for name, value in values.items())
    return f'<table class="numbers"><tbody>{rows}</tbody></table>'


def _text(text: Mapping[str, str]) -> str:
    caption, body = escape(text["title"]), escape(text["body"])
    return f'<figure class="text"><figcaption>{caption}</figcaption><pre>{body}</pre></figure>'


def _table(table: Mapping[str, Any]) -> str:
    columns, rows = table["columns"], table["rows"]
    numeric = [all(type(row[column]) in (int, float) for row in rows) for column in range(len(columns))]
    opening = [" class='number'" if right else "" for right in numeric]
    heads = "".join(f"<th{style}>{escape(name)}</th>" for style, name in zip(opening, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{s}>{escape(shown(cell))}</td>" for s, cell in zip(opening, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<figure class="data"><figcaption>{escape(table["title"])}</figcaption><div class="wide"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def _figure(name: str, content: bytes) -> str:
    if name.endswith(".svg"):
        return f'<figure class="drawing">{_themed(content.decode())}</figure>'
    data = base64.b64encode(content).decode()
    return f'<figure class="drawing raster"><img alt="{escape(name)}" src="data:image/png;base64,{data}"></figure>'


def _themed(svg: str) -> str:
    """The svg element alone, as wide as the page allows, its neutral colours following the page's theme."""
    element = svg[svg.index("<svg") :]
    opening, rest = element.split(">", 1)
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", opening) + ' role="img"'
    for color, variable in ((figures.INK, "--ink"), (figures.FAINT, "--faint"), (figures.PAPER, "--card")):
        rest = rest.replace(color, f"var({variable})")
    return f"{opening}>{rest}"
