"""Spools of the tests stay in a folder of their own."""

import tempfile

import pytest


@pytest.fixture(autouse=True)
def spool_root(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
  monkeypatch.setenv("TMPDIR", str(tmp_path / "spool"))  # for child processes
  (tmp_path / "spool").mkdir()
  return tmp_path / "spool"
