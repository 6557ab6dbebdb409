"""The paper `toy-superposition` and the parts that only it uses."""
