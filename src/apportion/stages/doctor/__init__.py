"""Checks of a run before training starts, one small function each."""

from apportion.stages.doctor.case import Case
from apportion.stages.doctor.findings import Check, Finding, run_checks

__all__ = ["Case", "Check", "Finding", "run_checks"]
