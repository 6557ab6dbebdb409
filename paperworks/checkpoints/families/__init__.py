"""Families of checkpoints, one object a model_type: config and tensor names, both ways."""

from paperworks.checkpoints.families.registry import FAMILIES, lookup, names, spec_from_config, writer

__all__ = ["FAMILIES", "lookup", "names", "spec_from_config", "writer"]
