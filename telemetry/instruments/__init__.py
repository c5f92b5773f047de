"""One measurement a file. Each declares the taps it needs, fills tables, and says what it costs."""
