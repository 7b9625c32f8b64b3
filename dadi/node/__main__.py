"""`python -m dadi.node`: the same as `dadi-node`."""

from dadi.node.main import main

main()
