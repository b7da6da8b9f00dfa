"""Helpers of the evidence: cells, streams, sweeps, arms, and their pictures."""
