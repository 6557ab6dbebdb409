"""The paper `sae-supervised-eval` and the parts that only it uses."""
