"""What we ask of containerd, as one of its clients: `dadi pull`, `dadi containerd-config`, and a part of `dadi doctor`.

client.py      containerd's gRPC API, as much of it as a pull needs; errors become ours here
pull.py        a lazy pull, step by step
reading.py     what containerd has of an image already
downloads.py   layers that cannot be lazy
labels.py      containerd's labels on content and snapshots (pure)
config.py      the text for config.toml (pure)
check.py       what `dadi doctor` looks at

What containerd asks of us is in `dadi/snapshotter`.
"""
