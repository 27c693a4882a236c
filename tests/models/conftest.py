"""Fixtures that make networks. Here and not above, where they would make the process that only hands out tests import timm."""

from networks import network, timm_folder, vit_folder  # noqa: F401
