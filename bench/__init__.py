"""Speed and memory, measured with real parts and written down as tables and plots. `make bench`."""
