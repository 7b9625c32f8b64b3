"""`python -m superpeer`: the same as `dadi-superpeer`."""

from superpeer.main import main

main()
