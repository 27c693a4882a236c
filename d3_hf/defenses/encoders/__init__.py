"""Defences of encoders: they need images without triggers, and no labels."""
