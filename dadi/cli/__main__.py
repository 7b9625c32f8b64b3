"""`python -m dadi.cli`: the same as `dadi`."""

from dadi.cli.main import main

main()
