"""The report of a run: one HTML file that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from maxscale import storage
from maxscale.goodput import events as event_log
from maxscale.goodput import ledger as books
from maxscale.goodput.metrics import PANELS, read_metrics

_POINTS = 4000  # of a curve, and spans of the timeline: more cannot be seen and make the file slow
_ROWS = 500  # newest rows of the table of events
_TABLED = ("config", "restore", "commit", "checkpoint_bad", "eval", "skip", "profile", "exit", "torn")
_COLOURS = {  # of the classes of time: progress green, what went wrong red, the rest told apart
  "step": "#2e9e5b", "start": "#8c8c8c", "device_init": "#b0a18f", "data_init": "#c7b299", "init": "#9a8fb0",
  "restore": "#3f7fbf", "compile": "#7a5fb5", "data_wait": "#e0a030", "save": "#4fb3bf", "eval": "#7fb24f",
  "finish": "#a8a8a8", "exit": "#c8c8c8", "down": "#c0392b", "lost": "#e67e6a",
}  # fmt: skip
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2em } pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 10px; text-align: left; vertical-align: top }
tr:nth-child(even) { background: #f5f5f5 } .charts { display: grid; grid-template-columns: 1fr 1fr; gap: 8px }
@media (max-width: 800px) { .charts { grid-template-columns: 1fr } }
"""


def write_report(run_dir: str) -> str:
  """Writes <run_dir>/report.html from the events, the metrics and config.json of the run; returns its path.

  Of a log or metrics that are still open, what was not flushed is missing.

  Raises:
    ValueError: the run has no events.
    FileNotFoundError: it has no config.json.
  """
  events, metrics = event_log.read(run_dir), read_metrics(run_dir)
  book = books.ledger(events)
  config = json.loads((storage.path(run_dir) / "config.json").read_text())
  name = html.escape(str(config["run"]["name"]))
  body = [
    f"<h1>{name}</h1>",
    _header(book, events),
    f"<h2>Where the time went</h2><pre>{html.escape(books.summary(book))}</pre>",
    _charts([_by_class(book), _timeline(books.spans(events))]),
    "<h2>Training</h2>",
    _charts(_curves(metrics)),
    "<h2>Checkpoints, evaluations and incidents</h2>",
    _event_table(events),
    f"<h2>Config</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre>",
  ]
  page = [
    "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
    "<meta name='viewport' content='width=device-width'>",
    f"<title>{name}</title><style>{_STYLE}</style><script>{_plotly_js()}</script></head><body>",
    *body,
    "</body></html>",
  ]
  path = storage.path(run_dir) / "report.html"
  storage.write(path, "\n".join(page))
  return str(path)


def _plotly_js() -> str:
  from plotly.offline import get_plotlyjs

  return get_plotlyjs()


def _header(book: books.Ledger, events: list[dict]) -> str:
  jobs = [e for e in events if e["kind"] == "job"]
  devices = [e for e in events if e["kind"] == "devices"]
  facts = {
    "run": book.run,
    "config hash": book.attempts[-1].config_hash,
    "devices": f"{devices[-1]['devices']} x {devices[-1]['device_kind']}" if devices else "unknown",
    "processes": book.attempts[-1].processes,
    **(jobs[-1]["versions"] if jobs else {}),
  }
  return "<p>" + " &middot; ".join(f"{key} <b>{html.escape(str(value))}</b>" for key, value in facts.items()) + "</p>"


def _charts(figures: Iterable[Any]) -> str:
  divs = (f"<div>{figure.to_html(full_html=False, include_plotlyjs=False)}</div>" for figure in figures)
  return f"<div class='charts'>{''.join(divs)}</div>"


def _figure(title: str, x: str, y: str = "", height: int = 320) -> Any:
  import plotly.graph_objects as go

  figure = go.Figure()
  figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, height=height, template="plotly_white")
  figure.update_layout(margin={"l": 50, "r": 20, "t": 60, "b": 40}, title={"y": 0.97, "yanchor": "top"})
  figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"})
  return figure


def _by_class(book: books.Ledger) -> Any:
  shown = sorted((item for item in book.seconds.items() if item[1]), key=lambda item: item[1])
  figure = _figure("seconds by class", "seconds")
  figure.add_bar(
    x=[seconds for _, seconds in shown],
    y=[cls for cls, _ in shown],
    orientation="h",
    marker_color=[_COLOURS[cls] for cls, _ in shown],
    text=[f"{seconds / book.total:.1%}" for _, seconds in shown],
    customdata=[event_log.CLASSES[cls].meaning for cls, _ in shown],
    hovertemplate="%{x:.1f} s: %{customdata}<extra>%{y}</extra>",
  )
  return figure


def _timeline(spans: Sequence[tuple[int, str, float, float]]) -> Any:
  """One row an attempt, one colour a class. Of very many spans the longest are drawn."""
  figure = _figure("attempts over time (lost steps are shown as steps)", "seconds since the first start", "attempt")
  longest = sorted(spans, key=lambda s: s[2] - s[3])[:_POINTS]
  for cls, colour in _COLOURS.items():
    of_class = [s for s in longest if s[1] == cls]
    if of_class:
      figure.add_bar(
        name=cls,
        y=[str(s[0]) for s in of_class],
        base=[s[2] for s in of_class],
        x=[s[3] - s[2] for s in of_class],
        orientation="h",
        marker={"color": colour, "line": {"width": 0}},
        hovertemplate="%{x:.1f} s<extra>" + cls + "</extra>",
      )
  figure.update_layout(
    barmode="overlay",
    legend={"orientation": "v", "y": 1, "yanchor": "top"},
    yaxis={"type": "category", "autorange": "reversed"},
  )
  return figure


def _curves(metrics: list[dict]) -> Iterable[Any]:
  names = {name: None for row in metrics for name, v in row.items() if name not in ("step", "wall") and v is not None}
  named = {name for group in PANELS.values() for name in group}
  others: dict[str, tuple[str, ...]] = {}
  for name in names:  # those of layers, name/number, are drawn together
    if name not in named:
      others[name.partition("/")[0]] = (*others.get(name.partition("/")[0], ()), name)
  panels = [*PANELS.items(), *others.items()]
  for title, group in panels:
    shown = [name for name in group if name in names]
    if not shown:
      continue
    figure = _figure(title, "step")
    for name in shown:
      rows = [(row["step"], row[name]) for row in metrics if name in row]
      rows = rows[:: len(rows) // _POINTS + 1]
      mode = "lines+markers" if len(rows) < 100 else "lines"
      figure.add_scatter(name=name, x=[s for s, _ in rows], y=[v for _, v in rows], mode=mode)
    figure.update_layout(showlegend=len(shown) > 1)
    yield figure


def _event_table(events: list[dict]) -> str:
  rows = [e for e in events if e["kind"] in _TABLED and (e["process"] == 0 or e["kind"] in ("checkpoint_bad", "torn"))]
  cells = []
  for e in rows[-_ROWS:]:
    fields = ", ".join(f"{key} {value}" for key, value in e.items() if key not in event_log.ENVELOPE)
    texts = (e["attempt"], books.duration(e["mono"]), e["kind"], fields)
    cells.append("<tr>" + "".join(f"<td>{html.escape(str(text))}</td>" for text in texts) + "</tr>")
  note = f"<p>The newest {_ROWS} of {len(rows)}.</p>" if len(rows) > _ROWS else ""
  head = "<tr><th>attempt</th><th>after</th><th>kind</th><th></th></tr>"
  return f"{note}<table>{head}{''.join(cells)}</table>"
