"""Data by name, file or hub id: tables, labelled reviews, prompts, disjoint parts, and the built-in assets."""

from apportion.data.assets import BUILTIN_DATA, BUILTIN_MODELS, builtin_model, builtin_table, cache_dir
from apportion.data.bad_rows import BadRows
from apportion.data.conversations import Conversation
from apportion.data.formats import Row
from apportion.data.label_rows import Labelled, Layout
from apportion.data.prompts import Messages, Prompt, prompts, read_prompts
from apportion.data.reviews import labelled, labelled_splits
from apportion.data.splits import PARTS, bucket, part
from apportion.data.tables import check_text, iter_rows, read_rows, require, usable

__all__ = [
    "BUILTIN_DATA",
    "BUILTIN_MODELS",
    "PARTS",
    "BadRows",
    "Conversation",
    "Labelled",
    "Layout",
    "Messages",
    "Prompt",
    "Row",
    "bucket",
    "builtin_model",
    "builtin_table",
    "cache_dir",
    "check_text",
    "iter_rows",
    "labelled",
    "labelled_splits",
    "part",
    "prompts",
    "read_prompts",
    "read_rows",
    "require",
    "usable",
]
