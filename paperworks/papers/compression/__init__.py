"""Papers on storing weights in few bits, and on the formats that do."""
