"""Where pictures come from and what the network sees of them."""
