"""The superpeer: caches a datacenter's blobs, fetches each from the registry once, and indexes what it sees first."""
