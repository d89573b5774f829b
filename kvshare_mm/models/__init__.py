"""Loading models, and what differs between them."""
