"""Commands of ``d3-hf`` that are more than a call of what the library offers anyway."""
