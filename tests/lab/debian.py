"""A Debian tree with Python in it, made on this machine by debootstrap, apt and dpkg, and what a layer may do to it.

What lives here: finding the mirror that this machine's own apt uses, and the steps that change the tree. What never
does: layers (tests/lab/tree.py, tests/lab/images.py), host names of mirrors.

Packages are checked as apt is set up to check them. Noisy programs write to a log, of which a failure shows the end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

PACKAGES = ("python3-numpy", "python3-pil", "python3-lxml", "git")
"""Installed on top of the base system, as a Dockerfile's second step would be."""

REMOVED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache", "usr/bin/perl")
"""Taken away again by the third step; /usr/bin/perl is one of two names of one file."""

_INSTALL = ("install", "--yes", "--no-install-recommends")
_LOGS = ("var/log/**/*", "var/cache/ldconfig/*")
_NO_SERVICE = "#!/bin/sh\nexit 101\n"  # what invoke-rc.d(8) takes for "start nothing"


class BuildFailed(Exception):
    """A program that builds the tree failed; the text holds the end of its log."""


@dataclass(frozen=True)
class AptSource:
    """Where this machine's apt takes Debian from: `options` are debootstrap's for the check of its signature."""

    uri: str
    options: tuple[str, ...]


def codename(os_release: Path = Path("/etc/os-release")) -> str:
    match = re.search(r'^VERSION_CODENAME="?(\w+)"?', os_release.read_text(), re.MULTILINE)
    if match is None:
        raise BuildFailed(f"{os_release} names no VERSION_CODENAME: the demo image is built on Debian only")
    return match[1]


def apt_source(suite: str, etc_apt: Path = Path("/etc/apt")) -> AptSource:
    """Find the first mirror of `suite` main in apt's configuration, in either of its formats (sources.list(5))."""
    files = [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))]
    stanzas: list[Mapping[str, str]] = []
    for file in files:
        if file.is_file() and file.suffix == ".list":
            stanzas += _one_line_stanzas(file.read_text())
        elif file.is_file() and file.suffix == ".sources":
            stanzas += _deb822_stanzas(file.read_text())
    for stanza in stanzas:
        usable = "deb" in stanza["types"].split() and stanza.get("enabled", "yes") != "no"
        if usable and suite in stanza["suites"].split() and "main" in stanza["components"].split():
            for uri in stanza["uris"].split():
                if plain := _plain_uri(uri):
                    return AptSource(plain, _check_options(stanza))
    raise BuildFailed(f"no http, https or file source of {suite} main in {', '.join(map(str, files))}")


def _one_line_stanzas(text: str) -> list[Mapping[str, str]]:
    """deb [option=value …] URI SUITE COMPONENT…"""
    found: list[Mapping[str, str]] = []
    for line in text.splitlines():
        match = re.match(r"\s*(deb)\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line)
        if match:
            options = dict(o.lower().split("=", 1) for o in (match[2] or "").split() if "=" in o)
            signed = re.search(r"signed-by=(\S+)", match[2] or "", re.IGNORECASE)  # a path keeps its case
            if signed:
                options["signed-by"] = signed[1]
            uris, suites, components = match[3], match[4], match[5]
            found.append({**options, "types": "deb", "uris": uris, "suites": suites, "components": components})
    return found


def _deb822_stanzas(text: str) -> list[Mapping[str, str]]:
    """Paragraphs of "Name: value" whose values go on in lines that begin with a blank; lines with # are comments."""
    found: list[Mapping[str, str]] = []
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for paragraph in re.split(r"\n\s*\n", text):
        fields = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t]+.*)*)", paragraph, re.MULTILINE)
        stanza = {name.lower(): value.strip() for name, value in fields}
        if {"types", "uris", "suites"} <= stanza.keys():
            found.append({"components": "", **stanza})
    return found


def _plain_uri(uri: str) -> str | None:
    if uri.startswith("mirror+file:"):  # a file that lists mirrors, as in Debian's cloud images
        listed = Path(urlsplit(uri.removeprefix("mirror+")).path)
        lines = listed.read_text().split("\n") if listed.is_file() else []
        return next((plain for line in lines if line.strip() and (plain := _plain_uri(line.split()[0]))), None)
    return uri.rstrip("/") if uri.startswith(("http://", "https://", "file:")) else None


def _check_options(stanza: Mapping[str, str]) -> tuple[str, ...]:
    if stanza.get("trusted") == "yes":
        return ("--no-check-gpg",)
    if (keyring := stanza.get("signed-by", "")).startswith("/"):
        return ("--force-check-gpg", f"--keyring={keyring}")
    return ("--force-check-gpg",)  # with Debian's own keyring


class DebianTree:
    """The tree at `root`, changed step by step. `environment` marks the programs that are started; see cleanup.py."""

    def __init__(self, root: Path, work: Path, downloads: Path, environment: Mapping[str, str]) -> None:
        self.root = root
        self._work = work
        self._downloads = downloads
        self._environment = {**environment, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        self._log = work / "build.log"

    def bootstrap(self) -> None:
        """Step 1: Debian's minimal system and Python."""
        suite = codename()
        source = apt_source(suite)
        self._downloads.mkdir(parents=True, exist_ok=True)
        command = ["debootstrap", "--variant=minbase", "--include=python3", f"--cache-dir={self._downloads}"]
        self._run([*command, *source.options, suite, str(self.root), source.uri])
        for pattern in ("var/cache/apt/**/*", "var/lib/apt/lists/**/*", *_LOGS):
            _remove_files(self.root, pattern)
        _remove_files(self.root, "etc/*-")
        # what debootstrap took from this machine, and the one file that knows today's date
        (self.root / "etc/resolv.conf").write_text("")
        (self.root / "etc/hostname").write_text("image\n")
        shadow = self.root / "etc/shadow"
        shadow.write_text(re.sub(r"^(\w[^:]*:[^:]*):\d+:", r"\1:20000:", shadow.read_text(), flags=re.MULTILINE))

    def install(self, packages: Sequence[str] = PACKAGES) -> None:
        """Step 2: more packages, fetched by this machine's apt for the tree's own state, installed by the tree's."""
        try:
            debs = self._fetch(packages)
        except BuildFailed:  # no package lists yet, or older than what the mirror has now
            self._run(["apt-get", "update"])
            debs = self._fetch(packages)
        inside = self.root / "packages"
        inside.mkdir()
        for deb in debs:
            shutil.copy(deb, inside)
        policy = self.root / "usr/sbin/policy-rc.d"
        policy.write_text(_NO_SERVICE)
        policy.chmod(0o755)
        clean = ["/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "TZ=UTC"]
        command = ["DEBIAN_FRONTEND=noninteractive", "apt-get", "-oAPT::Sandbox::User=root", *_INSTALL]
        self._run(["chroot", str(self.root), *clean, *command, *(f"/packages/{deb.name}" for deb in debs)])
        policy.unlink()
        shutil.rmtree(inside)
        for pattern in (*_LOGS, "var/cache/apt/*.bin", "var/lib/dpkg/*-old", "etc/*-"):
            _remove_files(self.root, pattern)

    def _fetch(self, packages: Sequence[str]) -> list[Path]:
        """Return the .deb files that `packages` need in the tree; those downloaded earlier are not fetched again."""
        archives = self._work / "apt/archives"
        shutil.rmtree(archives.parent, ignore_errors=True)
        (archives / "partial").mkdir(parents=True)
        self._downloads.mkdir(parents=True, exist_ok=True)
        options = {
            "Dir::State::status": self.root / "var/lib/dpkg/status",
            "Dir::State::extended_states": self._work / "extended_states",
            "Dir::Cache": archives.parent,
            "APT::Sandbox::User": "root",
            "Acquire::Retries": 3,
            "Debug::NoLocking": 1,
        }
        command = ["apt-get", *(f"-o{key}={value}" for key, value in options.items()), *_INSTALL, *packages]
        listing = self._run([*command, "--print-uris"])
        names = re.findall(r"^'\S+' (\S+\.deb) ", listing, re.MULTILINE)
        for name in names:  # apt compares what it finds there with the signed index
            if (self._downloads / name).exists():
                os.link(self._downloads / name, archives / name)
        self._run([*command, "--download-only"])
        for name in names:
            if not (self._downloads / name).exists():
                os.link(archives / name, self._downloads / name)
        return sorted(archives / name for name in names)

    def reshape(self) -> None:
        """Step 3: take away, replace, and change the type of what the steps before have put there."""
        root = self.root
        for path in REMOVED:
            _remove(root / path)
        # a directory in a directory's place: the layer must hide what was below (an opaque directory)
        licenses = root / "usr/share/common-licenses"
        fresh = root / "usr/share/common-licenses.new"
        fresh.mkdir()
        (fresh / "README").write_text("The full texts are at the packages' sources.\n")
        _remove(licenses)
        fresh.rename(licenses)
        (root / "etc/issue").write_text("A lab image\n")  # other content
        _remove(root / "etc/issue.net")  # a file becomes a symlink
        (root / "etc/issue.net").symlink_to("issue")
        release = (root / "usr/lib/os-release").read_bytes()
        _remove(root / "etc/os-release")  # a symlink becomes a file
        (root / "etc/os-release").write_bytes(release)
        _remove(root / "usr/share/lintian")  # a directory becomes a file
        (root / "usr/share/lintian").write_text("was a directory\n")
        _remove(root / "usr/share/pixmaps")  # a directory becomes a symlink
        (root / "usr/share/pixmaps").symlink_to("misc")
        _remove(root / "etc/fstab")  # a file becomes a directory
        (root / "etc/fstab").mkdir()
        (root / "etc/fstab/none").write_text("")
        (root / "usr/bin/env").chmod(0o750)  # attributes only
        self._add_rarities(root / "opt/rarities")

    def _add_rarities(self, directory: Path) -> None:
        """What ordinary images seldom hold, one of each."""
        directory.mkdir()
        (directory / ("n" * 255)).write_text("a name as long as names can be\n")
        os.mkfifo(directory / "fifo")
        (directory / "one").write_text("two names\n")
        os.link(directory / "one", directory / "two")
        stranger = directory / "stranger"
        stranger.write_text("ids that need more than 16 bits\n")
        os.chown(stranger, 1_000_001, 2_000_002)
        os.utime(stranger, ns=(0, 1_700_000_000_123_456_789))
        os.setxattr(stranger, "user.lab", b"a value")
        # struct vfs_cap_data, revision 2 (linux/capability.h): cap_net_raw, permitted and effective
        os.setxattr(stranger, "security.capability", bytes.fromhex("01000002 00200000 00000000 00000000 00000000"))
        with (directory / "sparse").open("wb") as file:
            file.truncate(3 << 20)
            file.write(b"a hole follows")

    def _run(self, command: Sequence[str]) -> str:
        """Run in namespaces of its own, so that its processes and mounts end with it; return what it printed."""
        own = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with self._log.open("ab") as log:
            start = log.tell()
            done = subprocess.run(
                [*own, "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                check=False,
            )
        printed = self._log.read_bytes()[start:].decode(errors="replace")
        if done.returncode != 0:
            end = "\n".join(printed.splitlines()[-25:])
            raise BuildFailed(f"{command[0]} failed with status {done.returncode}:\n{end}")
        return printed


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_files(root: Path, pattern: str) -> None:
    for path in root.glob(pattern):
        if path.is_file() and not path.is_symlink():
            path.unlink()
