"""An environment for each peer: its package without dependencies, in a folder of its own, before ours on the path."""

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

SOURCE = Path(__file__).parents[2]  # where this package is imported from


def installed(peer: Peer) -> Path:
    """Return the folder with the peer's package, installed at the first call, whole or not at all.

    Torch, transformers and all else are those of this environment.

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
        expected, fix = "a cache folder that can be written to", "Set XDG_CACHE_HOME to a folder elsewhere."
        raise DiskError("cache folder", f"{folder.parent}: {error.strerror}", expected, fix) from error
    try:
        _pip(peer, work)
        if not folder.is_dir():  # another process may have been quicker
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _pip(peer: Peer, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), peer.spec]
    command += ["--only-binary=:all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join([line for line in said if "ERROR" in line] or said[-2:])
        got = f"{peer.spec}: pip failed: {reason}"
        fix = "Check the network, or set PIP_FIND_LINKS to a folder with its wheel."
        raise ConfigError("peer", got, "a package index that pip can reach", fix)


def environment(threads: int, first: Path | None = None) -> dict[str, str]:
    """Return the environment variables of a measured process: its path, `first` before all, and its threads."""
    paths = [str(path) for path in (first, SOURCE) if path is not None]
    given = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
