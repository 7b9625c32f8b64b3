"""Descriptors that outlive the process that opened them: held by systemd where it offers that, else by `dadi-keeper`.

`process` is `dadi-keeper` itself, `client` talks to it, `systemd` to systemd; `store` is what both are to the node.
"""
