"""The stages' settings: one pydantic model a stage, with a rule at every field. Imports no model code."""

from apportion.config.demo import DemoConfig
from apportion.config.diagnose import DiagnoseConfig
from apportion.config.dpo import DPOConfig
from apportion.config.evaluate import EvaluateConfig, EvaluationSampling
from apportion.config.label import LabelConfig, LabelExportConfig, LabelImportConfig, LabelResultsConfig
from apportion.config.monitors import MonitorsConfig
from apportion.config.reward import PreferenceConfig, RewardConfig
from apportion.config.reward_specs import RewardSpec, reward_models, reward_path, reward_specs
from apportion.config.rl import PPOConfig, RLConfig
from apportion.config.sample import AnswerSampling, SampleConfig
from apportion.config.schema.section import Section, to_dict
from apportion.config.sections import LoraConfig, OptimConfig, SamplingConfig, ScoreConfig
from apportion.config.sft import SFTConfig
from apportion.config.trainer import AdamWConfig, TrainerConfig

__all__ = [
    "AnswerSampling",
    "AdamWConfig",
    "DPOConfig",
    "DemoConfig",
    "DiagnoseConfig",
    "EvaluateConfig",
    "EvaluationSampling",
    "LabelConfig",
    "LabelExportConfig",
    "LabelImportConfig",
    "LabelResultsConfig",
    "LoraConfig",
    "MonitorsConfig",
    "OptimConfig",
    "PPOConfig",
    "PreferenceConfig",
    "RLConfig",
    "RewardConfig",
    "SampleConfig",
    "RewardSpec",
    "reward_models",
    "reward_path",
    "reward_specs",
    "SFTConfig",
    "SamplingConfig",
    "ScoreConfig",
    "Section",
    "TrainerConfig",
    "to_dict",
]
