"""The paper `confidence-neurons` and the parts that only it uses."""
