"""The paper `truth-ttpd` and the parts that only it uses."""
