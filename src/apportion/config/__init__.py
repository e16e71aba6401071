"""The stages' settings: one pydantic model a stage, with a rule at every field. Imports no model code."""

from apportion.config.demo import DemoConfig
from apportion.config.diagnose import DiagnoseConfig
from apportion.config.evaluate import EvaluateConfig
from apportion.config.label import LabelConfig, LabelExportConfig, LabelImportConfig, LabelResultsConfig
from apportion.config.monitors import MonitorsConfig
from apportion.config.reward import RewardConfig
from apportion.config.rl import PPOConfig, RLConfig
from apportion.config.section import Section, to_dict
from apportion.config.sections import LoraConfig, OptimConfig, SamplingConfig, ScoreConfig

__all__ = [
    "DemoConfig",
    "DiagnoseConfig",
    "EvaluateConfig",
    "LabelConfig",
    "LabelExportConfig",
    "LabelImportConfig",
    "LabelResultsConfig",
    "LoraConfig",
    "MonitorsConfig",
    "OptimConfig",
    "PPOConfig",
    "RLConfig",
    "RewardConfig",
    "SamplingConfig",
    "ScoreConfig",
    "Section",
    "to_dict",
]
