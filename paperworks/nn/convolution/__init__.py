"""Convolutional blocks along time."""
