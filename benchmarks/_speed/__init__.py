"""Helpers of the speed benchmarks: clocks, limits of a device, models, rivals."""
