"""lm-telemetry: the instrument panel for how language models learn and reason."""
