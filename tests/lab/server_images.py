"""Images of servers, on Debian's minimal system: a web server and a database, each with a script that starts it.

What lives here: what is in these images. What never does: how trees and layers are made (tests/lab/images.py).

The first line that an image's program prints comes when the server has given its first answer: to a request from inside
the container, since a container of these tests has no network but its own loopback.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.lab import debian, images, oci_layout
from tests.lab.cleanup import Lab
from tests.lab.images import CACHE, Report
from tests.lab.oci_layout import Image

_WEB = r"""#!/bin/bash
# Start the web server; the first answer's first line is ours.
/usr/sbin/nginx || exit 1
until exec 3<>/dev/tcp/127.0.0.1/80; do :; done 2>/dev/null
printf 'GET / HTTP/1.0\r\n\r\n' >&3
read -r line <&3
echo "ready: ${line%$'\r'}"
"""

_DATABASE = r"""#!/bin/bash
# Start the database; our first line is the answer to a first query.
bin=$(echo /usr/lib/postgresql/*/bin)
version=${bin#/usr/lib/postgresql/}
version=${version%/bin}
mkdir -p /run/postgresql
chown postgres /run/postgresql
setpriv --reuid=postgres --regid=postgres --init-groups \
    "$bin/postgres" -D "/var/lib/postgresql/$version/main" \
    -c "config_file=/etc/postgresql/$version/main/postgresql.conf" >/dev/null 2>&1 &
until answer=$(setpriv --reuid=postgres --regid=postgres --init-groups \
    "$bin/psql" -h /run/postgresql -d postgres -tAc 'select 6 * count(*) from generate_series(1, 7)' 2>/dev/null)
do sleep 0.02; done
echo "ready: $answer"
"""


def web_server(cache: Path = CACHE, report: Report = lambda text: None) -> Image:
    """Debian and nginx; its program says "ready: HTTP/1.1 200 OK"."""
    return _server("web-server", ("nginx-light",), _WEB, "ready: HTTP/1.1 200 OK", cache, report)


def database(cache: Path = CACHE, report: Report = lambda text: None) -> Image:
    """Debian and PostgreSQL with a cluster made by its package; its program says "ready: 42"."""
    return _server("database", ("postgresql",), _DATABASE, "ready: 42", cache, report)


def _server(
    name: str, packages: Sequence[str], script: str, first_line: str, cache: Path, report: Report
) -> Image:
    def build(layout: Path, lab: Lab) -> None:
        made = debian.DebianTree(lab.root / "tree", lab.root, cache / "downloads", lab.environment)
        made.root.mkdir()
        steps = images.Steps(layout, made.root)
        report(f"installing Debian's minimal system (debootstrap) for the image {name}")
        made.bootstrap()
        steps.layer()
        report(f"installing {', '.join(packages)} on top (apt)")
        made.install(packages)
        steps.layer()
        start = made.root / "start"
        start.write_text(script)
        start.chmod(0o755)
        steps.layer()
        steps.image("latest", ["/start"], first_line=first_line)

    key = [debian.codename(), *packages, script, *images.sources(debian)]
    return oci_layout.load(images.cached(cache, name, key, build), "latest")
