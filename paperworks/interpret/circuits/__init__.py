"""Circuits: patching, attribution, search for the edges that matter."""
