"""Keep what was learned."""
