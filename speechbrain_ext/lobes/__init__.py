"""The parts that encoders are made of, one idea per file; they know nothing of encoders."""
