"""The defences: one file each, one Config and one Trainer each."""
