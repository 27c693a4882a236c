"""Inspection: a model before anything is trained (`check`), and a purified one beside what it was purified from (`audit`)."""
