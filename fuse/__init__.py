"""The FUSE kernel protocol, spoken directly: one read-only mount with a file per blob.

`wire` is the bytes, `device` decides between hit and miss, `session` talks to /dev/fuse. Nothing here knows about
images, chunk tables or networks: what is missing is asked from the file's own `read`.
"""
