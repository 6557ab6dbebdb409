"""Probes: what can be read from the residual stream."""
