"""The paper `circuit-reuse` and the parts that only it uses."""
