"""Warnings are not logged while heavy modules are imported, and are again afterwards, whatever threads do."""

from __future__ import annotations

import logging
import threading

import loclin
from loclin.common.shared import quiet_imports


def test_imports_that_overlap_leave_logging_as_it_was():
    before = logging.root.manager.disable
    first, second = quiet_imports(), quiet_imports()
    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert logging.root.manager.disable == logging.WARNING  # the other still imports
    second.__exit__(None, None, None)
    assert logging.root.manager.disable == before


def test_what_is_imported_already_leaves_logging_alone(monkeypatch):
    assert loclin.linearize is loclin.linearize
    monkeypatch.setattr(logging, "disable", None)
    assert loclin.linearize.__name__ == "linearize"
    assert loclin.freeze.__name__ == "loclin.freeze"
