"""How long a node waits for its upstreams before it does something about it: the times that hang together. Pure.

    a peer that lacks a chunk says that it waits      FIRST_SIGN after it was asked, then each SIGN_EVERY (`server.py`)
    an answer is late: somebody else is asked too     `upstreams` (`health.py`); more than FIRST_SIGN, or each
                                                      peer that lacks something would be taken for a slow one
    one that says that it waits is late, or stuck     TRIES (`tries.py`)
    a request to a peer has failed                    PEER_READ without a byte (`line.py`)
    a superpeer that takes long is asked if it hangs  `hanging.py`; a request to the only one fails after `read.stall`
    one that did not answer is asked last             `superpeers.py`
    a read waits for its blob's place in a tree       `membership.py`
"""

from __future__ import annotations

from dadi.peers import health, tries

FIRST_SIGN = 0.1
"""Seconds."""
SIGN_EVERY = 0.3
"""Seconds between signs of life of a peer that waits."""
PEER_READ = 10.0
"""Seconds without a byte after which a request to a peer has failed; somebody else is asked long before."""
TRIES = tries.Settings(waiting=SIGN_EVERY)
_SLOWEST = 1e6


def upstreams(link: float = 0.0) -> health.Settings:
    """Return how patient a node is with its parents. `link`: bytes a second of its network link, 0 if not known.

    A parent that lacks a chunk says so after `FIRST_SIGN`; event loops of busy machines take their time too. Nobody is
    better off for a parent of less than a thirty-second of the link, nor worse off for one that gives 8 Mbit/s: what
    is between the two links may be slower than either.
    """
    slowest = min(_SLOWEST, link / 32 or _SLOWEST)
    return health.Settings(margin=0.4, longest=0.5, slowest=slowest)
