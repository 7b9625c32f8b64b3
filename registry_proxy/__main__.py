"""`python -m registry_proxy`: the same as `dadi-registry-proxy`."""

from registry_proxy.main import main

main()
