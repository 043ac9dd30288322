"""cpr as a user installs it: its wheel and what it needs, for the image's Python, with `tests` beside it.

pip is asked for files of the image's Python and platform, so it does not matter which Python this machine has.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from tests.host import image
from tests.lab import LabError, cache

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPE = "1"
TOP = Path(__file__).parents[2]
PYTHON = "3.13"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64", "manylinux2010_x86_64")


def obtain(python: Path) -> Path:
    """The artifact with ``site.ext4``.  python: the image's, to compile with."""
    needed = dependencies()
    sources = sorted(files())
    digest = hashlib.sha256()
    for file in sources:
        digest.update(f"{file.relative_to(TOP)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())

    def build(workspace: cache.Workspace) -> None:
        site = workspace.scratch / "site"
        shutil.copytree(needed, site)
        source = workspace.scratch / "source"
        for file in sources:
            for top in [source] if file.parts[len(TOP.parts)] != "tests" else [site]:
                target = top / file.relative_to(TOP)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        wheels = workspace.scratch / "wheels"
        pip("wheel", "--no-deps", "-w", str(wheels), str(source))
        (wheel,) = wheels.glob("*.whl")
        pip("install", "--no-compile", "--no-deps", "--target", str(workspace.scratch / "cpr"), str(wheel))
        shutil.copytree(workspace.scratch / "cpr", site, dirs_exist_ok=True)
        image.compile_all(python, [site])
        image.make_disk(site, workspace.out / "site.ext4", spare=4 << 20)

    return cache.artifact("host-site", f"{RECIPE} {needed} {python} {digest.hexdigest()}", build)


def files() -> Iterator[Path]:
    """What the disk is made of, as far as it is ours."""
    yield from (TOP / name for name in ("pyproject.toml", "README.md", "LICENSE"))
    for name in ("cpr", "tests/__init__.py", "tests/lab", "tests/host"):
        path = TOP / name
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file


def dependencies() -> Path:
    """An artifact with what pyproject.toml says that cpr needs, for the image's Python."""
    wanted = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["dependencies"]

    def build(workspace: cache.Workspace) -> None:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        only = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON]
        pip("install", "--no-compile", "--target", str(workspace.out), *only, *platforms, *wanted)

    return cache.artifact("host-needed", " ".join((RECIPE, PYTHON, *wanted)), build)


def pip(*words: str) -> None:
    """Run pip.  Raises LabError with its last words."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"pip {words[0]}: exit status {done.returncode}\n{done.stderr[-1500:]}")
