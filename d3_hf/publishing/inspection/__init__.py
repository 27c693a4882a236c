"""Reports of `check` and `audit`, as text and as one self-contained page, from what their ``as_dict`` holds."""
