"""The pictures of a purified model's card. matplotlib is loaded when one is drawn, without pyplot, which has a global state."""
