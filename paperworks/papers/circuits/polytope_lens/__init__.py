"""The paper `polytope-lens` and the parts that only it uses."""
