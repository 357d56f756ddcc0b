"""Train what a memory, a full model or an adapter may move, on facts and documents."""
