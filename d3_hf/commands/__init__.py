"""The commands of ``d3-hf``, one file each."""
