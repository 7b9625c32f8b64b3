"""The main job, shown: an ordinary image from an ordinary registry, started before it is there. `make demo`."""
