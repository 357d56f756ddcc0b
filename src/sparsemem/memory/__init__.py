"""Read a memory: lookup, pool, layer, and a model that has them."""
