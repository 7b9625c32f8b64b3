"""Finding the machine's own Debian mirror in apt's two formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.debian import AptSource, BuildFailed, apt_source, codename


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_one_line_format_is_read_with_its_options(tmp_path: Path) -> None:
    options = "[arch=amd64 signed-by=/Keys/A.gpg]"
    text = f"# deb http://no.example/ bookworm main\ndeb {options} http://a.example/debian/ bookworm main contrib\n"
    write(tmp_path, "sources.list", text)
    expected = AptSource("http://a.example/debian", ("--force-check-gpg", "--keyring=/Keys/A.gpg"))
    assert apt_source("bookworm", tmp_path) == expected


def test_deb822_format_is_read_past_comments_and_other_suites(tmp_path: Path) -> None:
    text = (
        "Types: deb\n# a comment\nURIs: http://security.example/debian-security\nSuites: bookworm-security\n"
        "Components: main\n\n"
        "Types: deb deb-src\nURIs: http://b.example/debian\nSuites:\n bookworm\n bookworm-updates\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/k.gpg\n"
    )
    write(tmp_path, "sources.list.d/debian.sources", text)
    expected = AptSource("http://b.example/debian", ("--force-check-gpg", "--keyring=/usr/share/keyrings/k.gpg"))
    assert apt_source("bookworm", tmp_path) == expected


def test_disabled_and_foreign_sources_are_passed_over(tmp_path: Path) -> None:
    write(
        tmp_path,
        "sources.list.d/a.sources",
        "Enabled: no\nTypes: deb\nURIs: http://off.example/\nSuites: bookworm\nComponents: main\n",
    )
    write(tmp_path, "sources.list.d/b.list", "deb https://vendor.example/apt nodistro main\n")
    write(tmp_path, "sources.list.d/c.list", "deb [trusted=yes] http://c.example/debian bookworm main\n")
    assert apt_source("bookworm", tmp_path) == AptSource("http://c.example/debian", ("--no-check-gpg",))


def test_a_file_of_mirrors_is_followed(tmp_path: Path) -> None:
    listed = write(tmp_path, "mirrors/debian.list", "http://d.example/debian\n")
    write(
        tmp_path,
        "sources.list.d/debian.sources",
        f"Types: deb\nURIs: mirror+file://{listed}\nSuites: bookworm\nComponents: main\n",
    )
    assert apt_source("bookworm", tmp_path) == AptSource("http://d.example/debian", ("--force-check-gpg",))


def test_no_usable_source_is_said_with_the_files_that_were_read(tmp_path: Path) -> None:
    write(tmp_path, "sources.list", "deb cdrom:[Debian]/ bookworm main\n")
    with pytest.raises(BuildFailed, match=r"bookworm main in .*sources\.list"):
        apt_source("bookworm", tmp_path)


def test_codename_comes_from_os_release(tmp_path: Path) -> None:
    assert codename(write(tmp_path, "os-release", 'NAME="X"\nVERSION_CODENAME=bookworm\n')) == "bookworm"
    with pytest.raises(BuildFailed, match="VERSION_CODENAME"):
        codename(write(tmp_path, "other", "NAME=X\n"))
