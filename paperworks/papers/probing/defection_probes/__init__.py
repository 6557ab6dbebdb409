"""The paper `defection-probes` and the parts that only it uses."""
