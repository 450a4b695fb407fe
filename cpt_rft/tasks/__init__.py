"""The real datasets: one file each, from a raw row to an `Example` or a `Drop`."""
