"""Recurrent and state-space mixers."""
