"""The table that `benchmarks.speed` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness.figures import WORK
from benchmarks.harness.settings import ENOUGH


def speed_table(result: Mapping[str, Any]) -> None:
    """Print both sides, a row a figure, and the two ratios."""
    ours, peer, settings = result["ours"], result["peer"], result["settings"]
    table = Table("a batch", f"ours ({settings['ours']})", f"{settings['peer']} ({peer['precision']})")
    for title, cell in rows(result):
        table.add_row(title, cell(ours), cell(peer))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a file has no width of its own
        console.width = 140
    console.print(table)
    for precision, trial in peer["trials"].items():
        console.print(f"{settings['peer']} in {precision}: {trial['seconds']:.2f} s a batch")
    rates, box = result["rates"], result["machine"]
    console.print(
        f"matmul here: {rates['float32_flops'] / 1e9:.0f} GFLOP/s in float32, {rates['bfloat16_flops'] / 1e9:.0f} in "
        f"bfloat16; reading {rates['read_bytes'] / 1e9:.1f} GB/s ({box['cpu']}, {box['threads']} threads)"
    )
    console.print(f"time_ratio (peer over ours): {_range(result['time_ratio'])}")
    console.print(f"memory_ratio (ours over peer): {_range(result['memory_ratio'])}")
    if not result["enough"]:
        console.print(f"Fewer than {ENOUGH} timed batches: the medians say little.")


def rows(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (title, side -> text) of every row of the table."""
    work = [(name.replace("_", " "), lambda s, n=name: f"{s['work'][n] / s['batches']:,.0f}") for name in WORK]
    phases = [(f"{name}, s", lambda s, n=name: f"{s['phases'][n]['median']:.2f}") for name in result["phases"]]
    return [
        *work,
        *phases,
        ("total, s [min, max]", lambda s: _range(s["seconds"])),
        ("generated tokens/s", lambda s: f"{s['tokens_per_s']['generated_in_generate']:,.0f}"),
        ("trained tokens/s of the update", lambda s: f"{s['tokens_per_s']['trained_in_update']:,.0f}"),
        ("operations, GFLOP", lambda s: f"{s['flop']['total'] / 1e9:,.1f}"),
        ("GFLOP/s, all", lambda s: _rate(s["flops"]["total"])),
        ("GFLOP/s, update", lambda s: _rate(s["flops"]["update"])),
        ("peak memory, MB", lambda s: f"{s['memory_mb']['median']:,.0f}"),
        ("weights changed by a step", lambda s: f"{s['weights_changed']:.1%}"),
    ]


def _rate(rate: Mapping[str, float]) -> str:
    """Return a rate with its shares of the matmul rates."""
    return f"{rate['flops'] / 1e9:,.0f} ({rate['of_bfloat16']:.0%} of bfloat16, {rate['of_float32']:.0%} of float32)"


def _range(value: Mapping[str, float]) -> str:
    """Return "median [min, max]"."""
    return f"{value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]"
