"""Mixtures of experts: routers, dispatch, experts spread over processes."""
