"""The command `sparsemem`."""
