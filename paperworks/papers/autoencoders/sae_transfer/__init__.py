"""The paper `sae-transfer` and the parts that only it uses."""
