"""The node: what runs on a machine that runs containers."""
