"""Assurance: what can be said of a suspicious model without its trigger, one signal a file; a `Finding` accuses nobody."""
