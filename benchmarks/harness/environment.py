"""The environment of a measured process: paths, threads, and a peer's package in a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

from apportion.data.assets import cache_dir
from apportion.errors import ConfigError, DiskError
from benchmarks.harness.settings import Peer

ROOT = Path(__file__).parents[2]  # of the checkout


def installed(peer: Peer) -> Path:
    """Return the folder with the peer's package, installed atomically at the first call.

    Torch, transformers and everything else come from this environment.

    Raises:
        ConfigError: pip cannot install it. DiskError: the cache folder cannot be written to.
    """
    folder = cache_dir() / "bench" / f"{peer.project}-{peer.version}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        expected, fix = "a writable cache folder", "Set XDG_CACHE_HOME to a folder elsewhere."
        raise DiskError("cache folder", f"{folder.parent}: {error.strerror}", expected, fix) from error
    try:
        _pip(peer, work)
        if not folder.is_dir():  # another process may have installed it meanwhile
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _pip(peer: Peer, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), peer.spec]
    command += ["--only-binary=:all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join([line for line in lines if "ERROR" in line] or lines[-2:])
        got = f"{peer.spec}: pip failed: {reason}"
        fix = "Check the network, or set PIP_FIND_LINKS to a folder with its wheel."
        raise ConfigError("peer", got, "a package index that pip can reach", fix)


def environment(threads: int, first: Path | None = None) -> dict[str, str]:
    """Return the environment of a measured process: its threads, and a path of `first`, then this checkout."""
    paths = [str(path) for path in (first, ROOT / "src", ROOT) if path is not None]
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
