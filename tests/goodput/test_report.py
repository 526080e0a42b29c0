"""The report: one file that needs no network, holding what was logged."""

import re

import pytest

from maxscale import config as configs
from maxscale import storage
from maxscale.goodput.events import CLASSES, EventLog
from maxscale.goodput.metrics import MetricsWriter
from maxscale.goodput.report import _COLOURS, write_report


def make_run(run):
  storage.write(f"{run}/config.json", configs.to_json(configs.Config(run=configs.Run(name="tiny <b>"))))
  log, metrics = EventLog(run, config_hash="abc123"), MetricsWriter(run, tensorboard=False)
  log.event("devices", devices=8, device_kind="cpu")
  log.enter("step")
  for step in range(1, 31):
    log.event("step", step=step, seconds=0.1, tokens=100)
    metrics.write(step, {"loss": 3 - step / 20, "mfu": float("nan"), "grad_norm": 1.0, "router_balance": 0.9})
  metrics.write(30, {"heldout_loss": 1.6})
  log.event("eval", step=30, loss=1.6, seconds=0.2)
  log.event("checkpoint_bad", step=20, array="layers/mlp/w", reason="fingerprint differs")
  metrics.close()
  log.close(0, "done <i>")


def test_report(tmp_path):
  make_run(str(tmp_path))
  path = write_report(str(tmp_path))
  page = (tmp_path / "report.html").read_text()
  assert path == str(tmp_path / "report.html")
  assert page.count("plotly.js v") == 1  # the library, once
  outside = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.S)
  assert not re.search(r"(src|href)=", outside) and "http" not in outside
  assert "tiny &lt;b&gt;" in page and "done &lt;i&gt;" in page and "<i>" not in outside
  for text in ("abc123", "8 x cpu", "goodput", "fingerprint differs", "heldout_loss", "router_balance"):
    assert text in outside
  titles = set(re.findall(r'"title":\{"text":"([^"]*)"', outside))
  assert {"seconds by class", "gradient norm", "router_balance"} <= titles
  assert titles.isdisjoint({"learning rate", "share of peak FLOP\\u002fs", "share of peak FLOP/s"})  # nothing to draw


def test_every_class_has_a_colour():
  assert _COLOURS.keys() == CLASSES.keys()


def test_report_of_nothing(tmp_path):
  with pytest.raises(ValueError):
    write_report(str(tmp_path))
