"""The paper `gelu-analysis` and the parts that only it uses."""
