"""Where images come from and what the network sees of them."""
