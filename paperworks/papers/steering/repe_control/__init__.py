"""The paper `repe-control` and the parts that only it uses."""
