"""Defences of a whole CLIP, both towers: they need images with captions and without triggers."""
