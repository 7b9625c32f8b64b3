"""The content-addressed store of sparse blobs, and the wrappers that make a chain of stores and upstreams."""
