"""The report: one HTML file, made from a run directory, for people who decide and do not read code."""

from __future__ import annotations

from distunlearn.report.render import write_report

__all__ = ["write_report"]
