"""The units' texts, for a version of systemd. Pure.

Why each setting, where it is no matter of course:

    KillMode, FileDescriptorStore…   the FUSE mount of lazy images must outlive the node. From systemd 254 on it keeps
                                     /dev/fuse itself, over a stop too; before, `dadi-keeper` does, a process of the
                                     unit: so a stop may end the node's own process only
    RuntimeDirectoryPreserve         the FUSE mount is below it
    no Protect…, Private…            of the node: each of them gives it a mount namespace of its own, where containerd
                                     would not see its mounts. What needs no namespace is there
    OOMPolicy                        a program that we run, for credentials, may be killed for memory: not we
    OOMScoreAdjust                   reads of lazy images wait for the node
    WatchdogSec                      its event loop tells that it runs; SIGABRT if it does not, and a new one goes on
    Restart=always, no start limit   whatever happens: what waits for it waits until it is there
"""

from __future__ import annotations

import re
import textwrap
from typing import Final

from dadi.errors import InvalidRequest

PROGRAMS: Final = ("dadi-node", "dadi-superpeer", "dadi-registry-proxy")
KEEPS_DESCRIPTORS: Final = 254
"""The version of systemd that has FileDescriptorStorePreserve=."""
CAPABILITIES: Final = (
    "SYS_ADMIN", "SYS_RESOURCE", "MKNOD", "CHOWN", "FOWNER", "FSETID", "DAC_OVERRIDE", "DAC_READ_SEARCH", "KILL",
    "NET_BIND_SERVICE",
)  # fmt: skip
"""What the node needs: mounts and loop devices, descriptors, loop nodes, directories of any owner, ports."""
_PLAIN = re.compile(r"[\w/.,:+@%-]+")
_STATES = {"dadi-node": "node", "dadi-superpeer": "superpeer", "dadi-registry-proxy": "proxy"}
"""Below /var/lib/dadi: the last part of each configuration's `state`, where nothing else may be written."""
_ABOUT = {
    "dadi-node": "container images that start before they are there",
    "dadi-superpeer": "the datacenter's cache of container images",
    "dadi-registry-proxy": "a mirror of any registry for container engines",
}


def unit(program: str, systemd: int, binaries: str) -> str:
    """Return the text of `program`.service; `binaries`: the directory that has the program.

    Raises InvalidRequest for one that systemd would not find.
    """
    if not binaries.startswith("/") or not binaries.isprintable() or set(binaries) & set("\\\"'"):
        why = "is not an absolute path, without quotes and the like"
        raise InvalidRequest(f"{binaries!r} {why}", hint="--bin names a directory like /usr/bin")
    service = _NODE if program == "dadi-node" else _SERVER
    name = program.removeprefix("dadi-")
    keep = _KEPT if systemd >= KEEPS_DESCRIPTORS else _NOT_KEPT
    before = "Before=containerd.service\n" if program == "dadi-node" else ""
    return textwrap.dedent(f"""\
        [Unit]
        Description=dadi: {_ABOUT[program]}
        Wants=network-online.target
        After=network-online.target
        {{before}}StartLimitIntervalSec=0

        [Service]
        Type=notify
        NotifyAccess=main
        ExecStart={{command}} --config /etc/dadi/{name}.toml
        Restart=always
        RestartSec=1
        WatchdogSec=60
        TimeoutStopSec=90
        LimitNOFILE=1048576
        OOMPolicy=continue
        TasksMax=infinity
        StateDirectory=dadi/{_STATES[program]}
        StateDirectoryMode=0700
        {{service}}
        [Install]
        WantedBy=multi-user.target
        """).format(before=before, command=_quoted(f"{binaries}/{program}"), service=service.format(
            keep=keep, capabilities=" ".join(f"CAP_{name}" for name in CAPABILITIES)))  # fmt: skip


def _quoted(path: str) -> str:
    """Return a program's path as systemd.service(5) has it."""
    path = path.replace("%", "%%")  # systemd.unit(5): specifiers
    return path if _PLAIN.fullmatch(path) else f'"{path}"'


_KEPT = """\
# Lazy images outlive a restart, and a stop: systemd holds their /dev/fuse.
KillMode=mixed
FileDescriptorStoreMax=8
FileDescriptorStorePreserve=yes"""
_NOT_KEPT = """\
# Lazy images outlive a restart, and a stop: dadi-keeper, a process of this unit, holds their /dev/fuse.
KillMode=process"""
_COMMON = """\
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictNamespaces=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
"""
_NODE = """\
RuntimeDirectory=dadi
RuntimeDirectoryPreserve=yes
OOMScoreAdjust=-900
{keep}
# No ProtectSystem=, PrivateTmp= and the like: its mounts would be seen by itself only.
CapabilityBoundingSet={capabilities}
""" + _COMMON
_SERVER = """\
OOMScoreAdjust=-500
KillMode=mixed
# Another `state` in the configuration needs ReadWritePaths= in a drop-in.
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
CapabilityBoundingSet=CAP_NET_BIND_SERVICE CAP_DAC_OVERRIDE
RestrictSUIDSGID=yes
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
""" + _COMMON
