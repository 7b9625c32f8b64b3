"""The superpeer's directory is `dadi/peers/directory.py`: nodes run the very same for their groups. Pure."""

from dadi.peers.directory import Directory, Settings

__all__ = ["Directory", "Settings"]
