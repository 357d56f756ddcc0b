"""Choose slots: how often each is read, which are worth training."""
