"""The wheel: what it holds, its metadata, and the command that it installs, run without this checkout."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import tiny

import apportion

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "apportion"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command outside this checkout's PYTHONPATH; return its standard output."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel that pip builds from the source distribution, without an index."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    flags = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run(*PIP, "wheel", *flags, archive, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` of a new environment: apportion from the wheel, its dependencies from this one's folder."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    run(*PIP, "--python", folder / "bin" / "python", "install", "--no-index", "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # a path in a .pth file is searched last, and .pth files inside it (an editable install of apportion) are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
    package = {n for n in names if n.startswith("apportion/")}
    on_disk = {p.relative_to(SOURCE.parent).as_posix() for p in SOURCE.rglob("*") if p.is_file()}
    assert package == {n for n in on_disk if "__pycache__" not in n}
    assert "apportion/py.typed" in package
    assert {Path(n).suffix for n in package} >= {".py", ".css", ".js"}
    (about,) = {n.split("/")[0] for n in names - package}
    assert re.fullmatch(r"apportion-[\d.]+\w*\.dist-info", about)
    assert f"{about}/licenses/LICENSE" in names


def test_the_metadata_is_that_of_pyproject(metadata: Message) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["Name"] == "apportion" and metadata["Version"] == apportion.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == project["requires-python"]
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(needed) == len(project["dependencies"])
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])


def test_the_long_description_has_no_relative_link(metadata: Message) -> None:
    """Package indexes show it beside no repository, so a relative picture would be a broken one."""
    description = metadata.get_payload(decode=True).decode("utf-8")
    prose = re.sub(r"^```.*?^```$", "", description, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert [t for t in targets if not t.startswith(("https://", "#"))] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\((?!https:)([^)\s]+)\)", readme)
    base = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    assert pictures and re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", description) == [
        f"{base}/raw/HEAD/{p}" for p in pictures
    ]
    for block in re.findall(r"^```.*?^```$", readme, flags=re.MULTILINE | re.DOTALL):
        assert block in description


def test_the_installed_command_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = "import apportion; print(apportion.__file__)"
    assert Path(run(installed / "python", "-c", code, cwd=tmp_path).strip()).is_relative_to(installed.parent)
    assert run(installed / "apportion", "--version", cwd=tmp_path) == f"apportion {apportion.__version__}\n"
    assert "--method" in run(installed / "apportion", "credit", "--help", cwd=tmp_path)


def test_the_installed_command_credits_a_text_and_draws_the_page(installed: Path, tmp_path: Path) -> None:
    tiny.save_reward(tmp_path / "reward")
    flags = ["--model", "reward", "--text", "a great story", "--html", "page.html", "--json"]
    out = run(installed / "apportion", "credit", *flags, cwd=tmp_path, OMP_NUM_THREADS="1")
    result = json.loads(out)
    assert "".join(result["tokens"]) == "a great story"
    for values in result["methods"].values():
        assert sum(values) == pytest.approx(result["score"], abs=1e-4 * max(1, abs(result["score"])))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    style = (SOURCE / "report" / "assets" / "heatmap.css").read_text(encoding="utf-8").strip().splitlines()[-2]
    assert style in page, "the page lacks the package's stylesheet"


def test_an_editable_install_needs_no_further_package(tmp_path: Path) -> None:
    """`make` installs so, without build isolation: the backend is locked, and the install is one path."""
    code = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", code, cwd=ROOT).strip().splitlines()[-1]
    with zipfile.ZipFile(tmp_path / name) as archive:
        (path,) = [n for n in archive.namelist() if n.endswith(".pth")]
        assert archive.read(path).decode().strip() == str(ROOT / "src")
        assert not any(n.startswith("apportion/") for n in archive.namelist())
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert re.search(r"^hatchling==", locked, flags=re.MULTILINE)
