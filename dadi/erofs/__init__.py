"""EROFS metadata: the layers of an image merged into one tree, as the bytes that the kernel mounts. All pure."""
