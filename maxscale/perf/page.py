"""A report (perf/report.py) as one HTML file with charts, which needs no network."""

from __future__ import annotations

import collections
import html
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from maxscale.perf import report
from maxscale.perf.compiled import simulate
from maxscale.perf.compiled.trace import Loop, Move, Work
from maxscale.perf.report import BUBBLE, GIB, MIB, Report

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2em } pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 8px }
@media (max-width: 800px) { .charts { grid-template-columns: 1fr } }
"""
_COLOURS = {
  "matmul": "#2e9e5b", "attention": "#7fb24f", "grouped": "#4fb3bf", "kernel": "#3f7fbf", "vector": "#e0a030",
  "copy": "#c7b299", BUBBLE: "#8c8c8c",
}  # fmt: skip
_WAITING = "#c0392b"  # exposed transfers
_LANES = ("core", "links", "dcn", "host")


def html_page(r: Report) -> str:
  """One page with charts; it loads nothing."""
  from plotly.offline import get_plotlyjs

  name = html.escape(f"{r.config} on {r.topology}")
  blocks = [report.header(r), report.step_text(r)]
  body = [
    f"<h1>{name}</h1>", *(f"<p>{html.escape(b).replace(chr(10), '<br>')}</p>" for b in blocks),
    _charts([_bars("HBM of a device at the peak, GiB", {k: v / GIB for k, v in r.hbm.items()}, r.peak / GIB),
             _bars("predicted seconds of a step by class", r.predicted.classes, r.predicted.seconds)]),
    "<h2>One layer, predicted</h2>", *(f"<div>{_div(f)}</div>" for f in layers(r.timeline)),
    *(f"<h2>{title}</h2><pre>{html.escape(content)}</pre>" for title, content in (
      ("HBM", report.hbm_text(r)), ("Time by part", report.parts_text(r)), ("Collectives", report.collectives_text(r)),
      ("The mesh on the machine", r.torus), ("What to try next", report.advice_text(r)),
      ("Compiler options", json.dumps(r.flags, indent=2)))),
  ]  # fmt: skip
  page = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>",
          "<meta name='viewport' content='width=device-width'>",
          f"<title>{name}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>", *body,
          "</body></html>"]  # fmt: skip
  return "\n".join(page)


def _charts(figures: Iterable[Any]) -> str:
  return f"<div class='charts'>{''.join(f'<div>{_div(f)}</div>' for f in figures)}</div>"


def _div(figure: Any) -> str:
  return figure.to_html(full_html=False, include_plotlyjs=False)


def _figure(title: str, x: str, height: int) -> Any:
  import plotly.graph_objects as go

  figure = go.Figure()
  figure.update_layout(title=title, xaxis_title=x, height=height, template="plotly_white")
  figure.update_layout(margin={"l": 50, "r": 20, "t": 60, "b": 40}, title={"y": 0.97, "yanchor": "top"})
  return figure


def _bars(title: str, values: Mapping[str, float], total: float) -> Any:
  shown = sorted(((name, v) for name, v in values.items() if v > 0), key=lambda item: item[1])
  figure = _figure(title, "", max(320, 26 * len(shown) + 100))
  figure.add_bar(x=[v for _, v in shown], y=[name for name, _ in shown], orientation="h",
                 marker_color=[_colour(name) for name, _ in shown], text=[f"{v / total:.1%}" for _, v in shown],
                 hovertemplate="%{x:.4g}<extra>%{y}</extra>")  # fmt: skip
  return figure


def _colour(name: str) -> str:
  return _WAITING if name.startswith("exposed") else _COLOURS.get(name, "#5b7fa5")


def layers(spans: tuple[simulate.Span, ...]) -> list[Any]:
  """A timeline of one trip of the loop over layers of the forward pass, and one of the backward pass."""
  found = ((s for s in _loops(spans) if s.what.part == phase) for phase in ("forward", "backward"))
  longest = (max(loops, key=lambda s: s.end - s.start, default=None) for loops in found)
  return [_timeline(loop) for loop in longest if loop]


def _loops(spans: Iterable[simulate.Span]) -> Iterator[Any]:
  for span in spans:
    if isinstance(span.what, Loop):
      yield span
      yield from _loops(span.inside)


def _timeline(loop: simulate.Span) -> Any:
  """Spans of a trip, a lane for each resource."""
  assert isinstance(loop.what, Loop)
  title = f"{loop.what.part} of a layer ({loop.what.times} trips), seconds of one trip"
  figure = _figure(title, "seconds", 320)
  lanes: dict[str, list[simulate.Span]] = collections.defaultdict(list)
  for span in loop.inside:
    lanes[simulate.label(span.what) if isinstance(span.what, Move) else _kind(span)].append(span)
  for name, group in lanes.items():
    figure.add_bar(name=name, y=[s.resource for s in group], base=[s.start for s in group],
                   x=[s.end - s.start for s in group], orientation="h", customdata=[_hover(s) for s in group],
                   marker={"color": _WAITING if isinstance(group[0].what, Move) else _colour(name), "line": {"width": 0}},
                   hovertemplate="%{customdata}<extra></extra>")  # fmt: skip
  figure.update_layout(barmode="overlay", yaxis={"type": "category", "categoryorder": "array",
                                                 "categoryarray": _LANES[::-1]})  # fmt: skip
  return figure


def _kind(span: simulate.Span) -> str:
  return span.what.kind if isinstance(span.what, Work) else "loop"


def _hover(span: simulate.Span) -> str:
  what, took = span.what, f"{(span.end - span.start) * 1e6:.0f} us"
  if isinstance(what, Move):
    return f"{simulate.label(what)}, {what.bytes / MIB:.1f} MiB, {what.part}: {took}, waited {span.waited * 1e6:.0f} us"
  return f"{_kind(span)} {what.part}: {took}"
