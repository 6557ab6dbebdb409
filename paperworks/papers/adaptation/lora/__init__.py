"""The paper `lora` and the parts that only it uses."""
