"""Images: sources, labels, retain sets, preprocessing and augmentation."""
