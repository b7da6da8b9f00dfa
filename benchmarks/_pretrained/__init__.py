"""What the benchmarks of pretrained models share."""
