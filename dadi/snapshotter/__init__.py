"""The containerd snapshotter: layers that are mounted lazily, and ordinary overlay layers beside and above them.

service.py       gRPC and nothing else
snapshots.py     the life cycle: what each of containerd's ten calls does; recite a call from here
lazy_layers.py   which layers can be lazy, and the mounts of images that snapshots stand on
db.py            what is kept: SQLite
directories.py   what is on disk: the upper and work directories of ordinary snapshots
images.py        what is asked of the node: resolve, mount, release
model.py, filters.py, overlay.py   records and labels; containerd's filter language; mount options (pure)
"""
