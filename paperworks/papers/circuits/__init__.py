"""Papers on circuits."""
