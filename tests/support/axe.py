"""axe-core, the checker of accessibility, fetched once from npm's registry into build/ and checked by its SHA-256.

It is fetched instead of kept in the repository: it is 0.6 MB of another licence (MPL-2.0) that only one test reads.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

VERSION = "4.14.1"
SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"  # of axe.min.js
FOLDER = Path(__file__).parents[2] / "build" / "axe"


def script() -> tuple[str | None, str]:
    """Return (the script, ""), or (None, why it is not there)."""
    path = FOLDER / f"axe-{VERSION}.min.js"
    if not path.is_file():
        if shutil.which("npm") is None:
            return None, "axe-core is not in build/axe, and npm is not installed"
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"axe-core@{VERSION}", "--pack-destination", str(FOLDER)]
        try:
            done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return None, "npm did not answer in time"
        if done.returncode:
            return None, f"npm could not fetch axe-core: {done.stderr.strip()[-200:]}"
        packed = FOLDER / f"axe-core-{VERSION}.tgz"
        with tarfile.open(packed) as archive:
            member = archive.extractfile("package/axe.min.js")
            assert member is not None
            path.write_bytes(member.read())
        packed.unlink()
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        return None, f"{path} is not axe-core {VERSION}: its SHA-256 differs"
    return content.decode(), ""
