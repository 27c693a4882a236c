"""CIFAR networks that hubs lack, registered with timm when timm is imported."""
