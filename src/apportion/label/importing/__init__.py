"""Exports of other annotation tools as K-wise rankings."""

from apportion.label.importing.read import import_rankings

__all__ = ["import_rankings"]
