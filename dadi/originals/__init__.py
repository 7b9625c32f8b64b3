"""Images as the registry has them, kept: manifests, tags, referrers and blobs in their original (compressed) form.

What the registry proxy and the superpeer have in common. `service.py` is the way in.
"""
