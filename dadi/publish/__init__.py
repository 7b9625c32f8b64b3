"""Making indexes at build time, and bringing them (and converted images) into a registry or a directory.

    index.py      `index_image`: an index for an image, beside it
    convert.py    `convert_image`: a copy of an image whose layers are seekable, with its index
                  (documents.py: its manifests; convert_report.py: its figures)
    layer.py      one layer: its bytes in, its index and seek table out
    packed.py     the sink that packs a layer as zstd, one frame a chunk
    known.py      what the registry has already: the image's index, the layers of other images
    images.py     which manifests are meant, and what they say
    local.py      images and blobs in OCI layouts; archive.py: in docker archives
    target.py     where things go: a registry or an OCI layout
    artifacts.py  the artifact and its signature, pushed
    progress.py   what long work tells about itself
    work.py       several layers at a time

Only `dadi/cli` and whoever calls it as a library import this package; it imports `dadi/oci` and `dadi/index`.
"""
