"""Images as registries have them: references, manifests, platforms (pure), and the client that fetches them."""
