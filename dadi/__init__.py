"""dadi: container images that start before they are there (P2P, block-level, lazily loading)."""

__version__ = "0.1.0"
