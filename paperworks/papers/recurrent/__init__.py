"""Papers on recurrent and state-space models."""
