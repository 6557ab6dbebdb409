"""Positions: rotary, absolute, relative."""
