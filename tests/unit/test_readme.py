"""The README, `--help` and the Makefile agree."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from dadi.cli.main import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_verb_is_in_the_readme_with_its_own_options(name: str) -> None:
    command = cli.commands[name]
    (line,) = re.findall(rf"^\| `dadi {name}\b[^|]*\|", README, re.MULTILINE)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            assert parameter.name.upper() in line
        elif parameter.name not in ("node_socket", "platform", "help") and not (
            parameter.name == "as_json" and name == "mount"
        ):
            assert max(parameter.opts, key=len) in line


def test_the_readme_names_no_verb_that_does_not_exist() -> None:
    assert set(re.findall(r"^\| `dadi ([\w-]+)", README, re.MULTILINE)) == set(cli.commands)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_option_has_a_help_text(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_every_make_verb_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"`make ([a-z]+)`", (ROOT / document).read_text())) <= targets


def test_the_layout_that_architecture_describes_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in re.findall(r"`((?:dadi|superpeer|registry_proxy|fuse|tests)/[\w/]+\.py)`", text):
        assert (ROOT / path).exists(), path


def test_every_module_is_on_the_code_map() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    (code_map,) = re.findall(r"^## Code map\n.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    folder, said = "", dict[str, str]()
    for line in code_map.splitlines():
        if found := re.match(r"( *)(\w+)/ ", line):
            folder = f"dadi/{found[2]}" if found[1] else found[2]
        said[folder] = said.get(folder, "") + " " + line
    modules = [
        path.relative_to(ROOT)
        for name in ("dadi", "superpeer", "registry_proxy", "fuse")
        for path in (ROOT / name).rglob("*.py")
        if not path.stem.startswith("__") and "_pb2" not in path.stem
    ]
    assert not [str(path) for path in modules if not re.search(rf"\b{path.stem}\b", said.get(str(path.parent), ""))]
