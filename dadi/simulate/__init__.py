"""How long a peak takes with a given topology: a simulation that runs the real directory and the real peer choice."""
