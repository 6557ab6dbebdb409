"""Small worlds and prepared models that several papers share."""
