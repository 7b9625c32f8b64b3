"""Other machines of ours: the superpeer, and (by and by) peers."""
