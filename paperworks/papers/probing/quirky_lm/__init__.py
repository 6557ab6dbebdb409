"""The paper `quirky-lm` and the parts that only it uses."""
