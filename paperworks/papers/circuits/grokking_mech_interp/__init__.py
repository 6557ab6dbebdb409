"""The paper `grokking-mech-interp` and the parts that only it uses."""
