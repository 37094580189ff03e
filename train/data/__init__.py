"""The images: where they come from, in which order and which views a network sees them."""
