"""Weight formats, one file a method."""
