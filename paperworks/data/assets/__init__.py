"""Weights and data sets by name: where they come from, and their checksums."""

from paperworks.data.assets.assets import cache_folder, cached, fetch, fetch_from_hub, names

__all__ = ["cache_folder", "cached", "fetch", "fetch_from_hub", "names"]
