"""The paper `latent-wellbeing` and the parts that only it uses."""
