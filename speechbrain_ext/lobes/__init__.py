"""Building blocks of encoders, one idea per file. They do not depend on any encoder."""
