"""Settings of `apportion label` and of its exports, imports and results."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apportion.config.schema.rules import AtLeastTwo, Fraction, Name, Names, Positive, Seed, Switch, Word
from apportion.config.schema.section import Rule, Section

Port = Annotated[int, Field(ge=0, le=65535, strict=True), Rule("a port, 0 to 65535; 0 takes a free one")]
Share = Annotated[float, Field(gt=0, le=1, strict=True), Rule("a number in (0, 1]")]
DATABASE = "labels.db"


class LabelConfig(Section):
    """`apportion label`: a page where people rank the answers of each prompt, best first; every ranking is saved at
    once.

    `apportion label export`, `import` and `results` have settings of their own.
    """

    data: Name | None = None
    """samples to rank, with `prompt` and `completions` (a file, a folder, or a hub id); null serves what the database
    has."""
    split: Name | None = None
    """the split of `data` to read, of a folder or hub set with splits; null for train."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to DATABASE.bad_rows.jsonl; off, the first of them is an error."""
    database: Name = DATABASE
    """where rankings are saved: a file (SQLite), or a URL such as postgresql://user@host/labels."""
    host: Name = "127.0.0.1"
    """address to listen on; beyond this machine (0.0.0.0, say) a token is demanded."""
    port: Port = 8600
    """port to listen on."""
    token: Word | None = None
    """secret that annotators sign in with, at least 16 characters; null takes the variable APPORTION_LABEL_TOKEN."""
    tls_certificate: Word | None = None
    """file of a TLS certificate (PEM), for https."""
    tls_key: Word | None = None
    """file of its key (PEM)."""
    public_url: Word | None = None
    """address in the browser where it is not that of this server, such as https://rank.example.org behind a proxy."""
    annotators: Names | None = None
    """names that may sign in; null lets everyone choose a name."""
    title: Name = "Which answer is better?"
    """the page's heading."""
    guidelines: Word | None = None
    """a text or Markdown file with the guidelines, shown as text."""
    overlap: Fraction = 0.1
    """share of the items that several people rank, to measure agreement."""
    overlap_annotators: AtLeastTwo = 2
    """how many people rank each of these."""
    lease_minutes: Positive = 30.0
    """how long an item that someone has on the screen is given to nobody else."""
    seed: Seed = 0
    """seed of the orders in which answers are shown; kept in the database when it is made."""
    until_ranked: Share | None = None
    """stop serving when this share of the items has been ranked by all who are to rank them; null until Ctrl-C."""


class LabelExportConfig(Section):
    """`apportion label export`: rankings of a database as a file, K-wise or as pairs."""

    database: Name = DATABASE
    """the database: a file or a URL."""
    output: Name = "rankings.jsonl"
    """file to write: .jsonl or .parquet."""
    form: Literal["rankings", "pairs"] = "rankings"
    """rankings (prompt, completions, ranks), or TRL's pairs (prompt, chosen, rejected)."""
    pairs: Literal["all", "best_worst"] = "all"
    """of form pairs: all pairs of a ranking, or the best answer against the worst; ties give none."""
    replaced: Switch = False
    """also export rankings that were undone or refused, with a column `status`; for inspection, not for training."""


class LabelImportConfig(Section):
    """`apportion label import`: an export of Label Studio or Argilla as K-wise rankings."""

    source: Name = ""
    """the exported file: Label Studio's JSON, or Argilla's records as JSON, JSON lines or Parquet."""
    format: Literal["auto", "label_studio", "argilla"] = "auto"
    """the tool that exported it; auto takes rows with annotations as Label Studio's, others as Argilla's."""
    output: Name = "rankings.jsonl"
    """file to write: .jsonl or .parquet."""
    prompt: Name = "prompt"
    """the key of the prompt in a task's data (Label Studio) or in a record's fields (Argilla)."""
    completions: Names | None = None
    """keys of the answers, in order; null takes the list that was ranked (Label Studio) or the ranking's own values
    (Argilla)."""
    question: Name | None = None
    """name of the ranking question or tag; null takes the only one."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to OUTPUT.bad_rows.jsonl; off, the first of them is an error."""


class LabelResultsConfig(Section):
    """`apportion label results`: agreement, progress, times and biases of a database on one page that works offline."""

    database: Name = DATABASE
    """the database: a file or a URL."""
    output: Name = "labels.html"
    """page to write."""
