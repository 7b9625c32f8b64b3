"""The content-addressed store of sparse blobs, and the links that make a chain of stores and upstreams.

    a node's read                                       answers over HTTP
    chain          the order of the links, once         serving      GET /v1/blobs: ranges, compressed where that pays
      single_flight  one fetch, however many want it      answering    an answer, past aiohttp
      kept           what is here; what comes is kept     sending      a file's bytes to a socket
      patient        waits while all are away                         │
      turns          nobody's reads, a few at a time                  │
      verified       one around each machine asked                    │
        remote         asked by HTTP                                  │
    a superpeer's read of a registry                                  │
      joined         dear requests: few, by urgency                   │
      unpacked       tar chunks out of a compressed blob              │
    a proxy's                                                         │
      first_of       peers, then superpeers                           │
                 │                                                    │
                 └──► the store ◄─────────────────────────────────────┘
    source, store  the two contracts                    disk         the store; its head says which file does what
    config         what can be set of a store             stored, space, vouching, start_stop, ingest, files, layout
                                                        verifying    all of it against its digests
"""
