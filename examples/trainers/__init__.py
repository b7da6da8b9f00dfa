"""Protection in the training loops that people have: one file each, to copy."""
