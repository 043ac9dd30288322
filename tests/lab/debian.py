"""Packages of any Debian suite, downloaded and unpacked without root and without installing them.

The mirror, its keyring and a proxy are those of the machine's own apt; apt itself is asked what it is
configured with, so one-line and deb822 sources are the same to us.  The download uses apt with state
directories of its own and an empty list of installed packages, so that it brings a package with everything
it needs (the C library too), and neither reads nor changes what this machine has installed.

Out of scope: other distributions, other architectures, maintainer scripts.
"""

import dataclasses
import functools
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab import LabError

KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/usr/share/keyrings/debian-archive-keyring.gpg",
)

# `#clear` works only in a file named with -c, which apt reads after the machine's own configuration.
APT_CONF = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
#clear APT::Default-Release;
APT::Architecture "amd64";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "{directory}/state";
Dir::State::status "{directory}/status";
Dir::Cache "{directory}/cache";
Dir::Etc::sourcelist "{directory}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
"""


@dataclasses.dataclass(frozen=True)
class Mirror:
    """The Debian archive that this machine's apt uses, and the release of it that is installed here."""

    uri: str
    codename: str

    def sources(self, suite: str, keyring: str | None) -> str:
        """A sources.list for `suite`, and for what it builds upon if it is a backports suite."""
        options = "[target=Packages" + (f" signed-by={keyring}" if keyring else "") + "]"
        suites = dict.fromkeys((suite.removesuffix("-backports"), suite))
        return "".join(f"deb {options} {self.uri} {each} main\n" for each in suites)


def parse_index_targets(text: str) -> list[dict[str, str]]:
    """The stanzas of ``apt-get indextargets``."""
    stanzas = []
    for block in re.split(r"\n\s*\n", text.strip()):
        fields = (line.partition(":") for line in block.splitlines() if ":" in line)
        stanzas.append({name.strip(): value.strip() for name, _, value in fields})
    return [stanza for stanza in stanzas if stanza]


def choose_mirror(targets: Sequence[Mapping[str, str]], os_release: Mapping[str, str]) -> Mirror:
    """The entry that holds Debian's own main archive for the installed release.

    Others use Debian's suite names too; the signed Release file says whose an archive is.
    """
    if os_release.get("ID") != "debian":
        name = os_release.get("PRETTY_NAME", "unknown")
        raise LabError(f"the lab needs Debian 12 or newer; this is {name}")
    for target in targets:
        ours = target.get("Origin"), target.get("Label"), target.get("Component")
        if ours == ("Debian", "Debian", "main"):
            codename = target["Codename"].removesuffix("-updates").removesuffix("-backports")
            if codename == os_release.get("VERSION_CODENAME", codename):
                return Mirror(target["Repo-URI"], codename)
    raise LabError(
        "apt is configured with no mirror of Debian's main archive, or its lists are missing; "
        "check /etc/apt/sources.list.d and run `apt-get update`"
    )


@functools.cache
def mirror() -> Mirror:
    """The mirror of this machine; raises LabError if it has none."""
    try:
        os_release = platform.freedesktop_os_release()
    except OSError:
        os_release = {}
    try:
        text = run(["apt-get", "indextargets", "Created-By: Packages"])
    except FileNotFoundError:
        text = ""  # no apt at all; os-release tells which system it is
    return choose_mirror(parse_index_targets(text), os_release)


def unpack(suite: str, packages: Sequence[str], into: Path, scratch: Path) -> dict[str, str]:
    """Unpack `packages` of `suite` with everything they depend on, and return the versions of all of them.

    Needs the network, some seconds and, in `scratch`, room for the downloads.  Raises LabError.
    """
    archives = download(suite, packages, scratch / "apt")
    versions = {}
    for archive in archives:
        name, version = run(["dpkg-deb", "-f", str(archive), "Package", "Version"]).split("\n")[:2]
        versions[name.removeprefix("Package: ")] = version.removeprefix("Version: ")
        run(["dpkg-deb", "-x", str(archive), str(into)])
        archive.unlink()
    merge_usr(into)
    return versions


def merge_usr(directory: Path) -> None:
    """Make /lib and friends lead to /usr, as on every installed Debian; 12's packages still fill both.

    Afterwards and not before, because dpkg-deb -x replaces a symbolic link by a directory.
    """
    for name in ("bin", "lib", "lib64", "sbin"):
        top, merged = directory / name, directory / "usr" / name
        merged.mkdir(parents=True, exist_ok=True)
        if top.is_dir() and not top.is_symlink():
            shutil.copytree(top, merged, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(top)
        if not top.is_symlink():
            top.symlink_to(f"usr/{name}")


def download(suite: str, packages: Sequence[str], directory: Path) -> list[Path]:
    """Download `packages` of `suite` with their dependencies into `directory`; return the .deb files."""
    source = mirror()
    archives = directory / "cache" / "archives"
    for needed in (archives / "partial", directory / "state" / "lists" / "partial"):
        needed.mkdir(parents=True, exist_ok=True)
    keyring = next((path for path in KEYRINGS if Path(path).exists()), None)
    (directory / "status").touch()
    (directory / "sources.list").write_text(source.sources(suite, keyring))
    configuration = directory / "apt.conf"
    configuration.write_text(APT_CONF.format(directory=directory))
    apt_get = ["apt-get", "-qq", "-c", str(configuration)]
    try:
        run([*apt_get, "update"])
        run([*apt_get, "-y", "--download-only", "-t", suite, "install", *packages])
    except LabError as error:
        raise LabError(
            f"could not download {' '.join(packages)} of {suite} from the mirror apt is configured with "
            f"({source.uri}); check `apt-get update`\n{error}"
        ) from None
    return sorted(archives.glob("*.deb"))


def run(command: Sequence[str]) -> str:
    """Run a program and return what it prints; LabError with its last words if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-6:]
        raise LabError(f"{shlex.join(command)}: exit status {done.returncode}\n" + "\n".join(said))
    return done.stdout
