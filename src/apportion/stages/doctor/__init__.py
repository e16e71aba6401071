"""What `apportion doctor` asks of a run before hours are spent on it: one small function a check."""

from apportion.stages.doctor.case import Case
from apportion.stages.doctor.findings import Check, Finding, examine

__all__ = ["Case", "Check", "Finding", "examine"]
