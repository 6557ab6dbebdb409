"""The paper `quantized-instruct-eval` and the parts that only it uses."""
