"""Images as registries have them, kept: manifests, tags, referrers, and blobs in their original (compressed) form.

    engine ──► registry_proxy/app.py ─┐                                ┌─ superpeer/original.py ◄── proxies on nodes
                                      ▼                                ▼
                                   serving    an `Original` over HTTP: the range, the parts as they come, or a cut
                                      │
          ┌───────────────────────────┴───────────────────────────┐
          ▼  a proxy that has superpeers                          ▼  a superpeer; a proxy that has none
       client     asks them, takes chunks from peers           service    the way in: which of the others answers
          │ waiting    a new blob: the superpeer first            │ access     may this caller? as the registry says
          │ asked      whose credentials, how long                │ │ challenges  what it wants to see of others
          │ messages   what both sides say                        │ proven     may what is here be given to him, too?
          │                                                       │ documents  manifests, lists: how old they may be
          │                                                       │ lists      what was asked for of tags, referrers
          │                                                       │ fetching   one blob from a registry, by turns with
          │                                                       │            the credentials of all who want it
          └──────────────► intake ◄───────────────────────────────┘
                             │  each blob is fetched once; no room, wrong bytes: remembered for a while
                          arriving    on its way in: hashed, kept, read meanwhile
                             │
                          original    what is given: whole, arriving, from chunks, passing by; never a wrong one whole

    caller       who asks: his Authorization header (pure)          byte_range   what a Range header means (pure)
    away         registries that are; work that callers share       records      what registries have said, on the disk
    remembered   secrets, which go after a while                    config       what can be set

Rules that more than one file keeps: a caller is shown what his own registry would show him, and his credentials go to
that registry only. Work is shared, credentials are not: what fails with one caller's goes on with the next one's. The
last byte of an answer is given only after all of it was verified.
"""
