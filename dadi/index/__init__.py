"""What is where in an image: chunk tables, layer indexes, image indexes, and the pass that makes them."""
