"""Other machines of ours, superpeers and nodes: whom to ask for what, what to give to whom, and who may have it."""
